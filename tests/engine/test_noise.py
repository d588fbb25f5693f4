"""Noise is data: a pure function of what it is for."""

import hashlib
import itertools

import torch

from kvpo.engine.noise import SeededTape, keyed_generator, keyed_normal

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


def keys_that_share_32_bits():
    """Two tape keys, of some 27,000, whose 64-bit hashes agree in the bits that a torch seed makes use of."""
    seen = {}
    for video in range(80_000):
        key = ("tape", "training", 0, video, 7, "initial")
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        word = (int.from_bytes(digest, "little") >> 1) % 2**32
        if word in seen:
            return seen[word], key
        seen[word] = key
    raise AssertionError("80,000 keys and no collision")


def test_all_of_a_key_counts_not_32_bits_of_its_hash():
    one, other = keys_that_share_32_bits()
    tape = SeededTape(("training", 0), SHAPE)
    assert not torch.equal(tape(*one[3:]), tape(*other[3:]))
    assert not torch.equal(keyed_normal(SHAPE, *one), keyed_normal(SHAPE, *other))
    first, second = (torch.rand(8, generator=keyed_generator(*key)) for key in (one, other))
    assert not torch.equal(first, second)


def test_the_values_of_a_key():
    """On every machine and with every version of torch and numpy: runs are compared on equal noise."""
    drawn = SeededTape(("training", 0), (2, 2))(5, 2, "initial")
    assert drawn.tolist() == [
        [-1.1617562770843506, -0.15563754737377167],
        [0.6678549647331238, -0.7470360994338989],
    ]
    generator = keyed_generator("routes", 0, 3)
    assert torch.randperm(10, generator=generator).tolist() == [8, 5, 3, 0, 9, 2, 6, 1, 7, 4]
    assert torch.rand(2, generator=generator).tolist() == [0.33728235960006714, 0.33791202306747437]
