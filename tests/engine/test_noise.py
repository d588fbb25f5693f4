"""Noise is data: a pure function of what it is for."""

import itertools

import torch

from kvpo.engine.noise import SeededTape, keyed_generator

SHAPE = (3, 2, 4, 4)


def test_a_tape_always_says_the_same():
    first, second = SeededTape(("training", 3), SHAPE), SeededTape(("training", 3), SHAPE)
    torch.manual_seed(1)
    drawn = first(5, 2, "initial")
    torch.manual_seed(2)
    torch.rand(7)
    assert torch.equal(drawn, second(5, 2, "initial"))
    assert drawn.shape == SHAPE


def test_every_part_of_the_key_gives_other_noise():
    drawn = [
        SeededTape(key, SHAPE)(video, block, kind)
        for key in (("a", 0), ("a", 1), ("b", 0))
        for video in (0, 1, 10)
        for block in (0, 1, 11)
        for kind in ("initial", "renoise 1", "context")
    ]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    together = torch.stack(drawn)
    assert abs(float(together.mean())) < 0.02 and abs(float(together.std()) - 1) < 0.02


def test_drawing_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    SeededTape(("a",), SHAPE)(0, 0, "initial")
    torch.rand(1, generator=keyed_generator("b"))
    assert torch.equal(state, torch.get_rng_state())


def test_keys_do_not_run_together():
    def value(*key):
        return float(torch.rand((), generator=keyed_generator(*key)))

    assert len({value(1, 23), value(12, 3), value("1", 23), value(123), value("1, 23")}) == 5
