"""Branch diversity is read off what a fork shows, with and without a tail after its window."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvpo.engine.explorers import noise_branches, routes
from kvpo.engine.forks import Fork
from kvpo.engine.noise import BranchTape, SeededTape
from kvpo.engine.scoring import Scores
from kvpo.training import diversity
from kvpo.training.diversity import Diversity, Laboratory, Place, ReadOff
from tests.tiny_world import ToyPrompts, tiny_config, toy_setup


@pytest.mark.parametrize(("tail", "read"), [(4, 4), (0, 6)])
def test_without_a_tail_the_window_is_read(monkeypatch: pytest.MonkeyPatch, tail: int, read: int) -> None:
    lengths = []

    def observe(videos: torch.Tensor) -> tuple[list[tuple], torch.Tensor]:
        lengths.append(videos.shape[1])
        return [(n % 2,) for n in range(len(videos))], torch.ones(len(videos))

    scores = SimpleNamespace(local_KM=torch.arange(4.0)[None])
    monkeypatch.setattr(diversity, "score_group", lambda *given, **named: scores)
    group: Any = SimpleNamespace(clean_MTCHW=torch.rand(4, 6 + tail, 3, 2, 2), window_frames=6)
    judges: Any = SimpleNamespace(scorer=None, weights_K=torch.ones(1))
    codec: Any = SimpleNamespace(decode=lambda latents: latents)
    generator: Any = SimpleNamespace(block=3)
    look = Laboratory(generator, codec, {}, lambda *key: torch.empty(0), judges, ReadOff(observe, 0.5))
    found = look.measure([group])
    assert lengths == [read]
    assert found.attribute_diversity == pytest.approx(2 / 3) and found.broken_share == 0


def test_a_measurement_in_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of three branches, each of one grey; the anchor, far from them, counts nowhere."""
    greys = [torch.tensor([0.0, 0.1, 0.4, 9.0]), torch.tensor([0.2, 0.2, 0.2, 9.0])]
    shape = (4, 8, 3, 2, 2)
    groups: Any = [
        SimpleNamespace(clean_MTCHW=grey[:, None, None, None, None].expand(shape).clone(), window_frames=6)
        for grey in greys
    ]
    groups[0].clean_MTCHW[:, 6:] = 0.7  # the tail is read, and not measured
    tables = [torch.tensor([[1.0, 2.0, 4.0, 90.0]]), torch.tensor([[3.0, 3.0, 3.0, 90.0]])]
    scores = [Scores(("one",), table, 1000 * table.square()) for table in tables]
    scored = iter(scores)
    monkeypatch.setattr(diversity, "score_group", lambda *given, **named: next(scored))

    def observe(videos: torch.Tensor) -> tuple[list[tuple], torch.Tensor]:
        assert videos.shape == (3, 2, 3, 2, 2)
        first = bool(videos[0, 0, 0, 0, 0] > 0.5)
        shown: list[tuple] = [("red",), ("red",), ("blue",)] if first else [("red",)] * 3
        return shown, torch.tensor([0.4, 0.6, 0.5])

    judges: Any = SimpleNamespace(scorer=None, weights_K=torch.ones(1))
    codec: Any = SimpleNamespace(decode=lambda latents: latents)
    generator: Any = SimpleNamespace(block=3)
    read_off = ReadOff(observe, 0.5)
    look = Laboratory(generator, codec, {}, SeededTape(("t",), (1,)), judges, read_off)
    found = look.measure(groups)
    assert found.attribute_diversity == pytest.approx((2 / 3 + 0) / 2)
    assert found.pixel_distance == pytest.approx(((0.1 + 0.3 + 0.4) / 3 + 0) / 2)
    assert look.pixel_distance(groups) == found.pixel_distance
    assert found.broken_share == pytest.approx(1 / 3)
    assert found.reward_std == pytest.approx((7 / 3) ** 0.5 / 2)
    rows = [asdict(found), asdict(Diversity(0.0, 0.0, 0.0, 0.0))]
    assert diversity.mean_diversity(rows)["broken_share"] == pytest.approx(1 / 6)


def test_branch_noise_is_mixed_inside_the_window_alone() -> None:
    plain = SeededTape(("any", 0), (40, 50))
    own = {}
    for branch in range(2):
        mixed = BranchTape(plain, ("any", branch), range(2, 5), strength=0.6)
        for block in (1, 5):
            assert torch.equal(mixed(2, block, "initial"), plain(2, block, "initial"))
        assert torch.equal(mixed(2, 3, "context"), plain(2, 3, "context"))
        for block in (2, 4):
            for kind in ("initial", "renoise 1"):
                noise = mixed(2, block, kind)
                assert torch.equal(noise, mixed(2, block, kind))
                own[branch, block, kind] = (noise - 0.8 * plain(2, block, kind)) / 0.6
    drawn = torch.stack(list(own.values())).flatten(1)
    correlations = drawn @ drawn.T / drawn.shape[1]
    assert bool(((correlations - torch.eye(len(own))).abs() < 0.12).all()), "standard normal, each its own"


@pytest.mark.parametrize(
    ("apart", "within"),
    [
        (lambda s: s, 1e-9), (lambda s: 3 * s**2, 1e-9), (lambda s: s**0.6, 1e-9),
        (lambda s: s * (1.4 - 0.4 * s), 0.01),
    ],
)  # fmt: skip
def test_noise_lies_as_far_apart_as_it_is_asked_to(
    monkeypatch: pytest.MonkeyPatch, apart: Callable[[float], float], within: float
) -> None:
    """Pixel distances that grow like powers of the strength, and nearly so."""
    monkeypatch.setattr(Laboratory, "pixel_distance", lambda self, groups: groups)
    look = Laboratory(*[None] * 6)  # type: ignore[arg-type]
    explore: Any = lambda noise: apart(noise.keywords["strength"])  # noqa: E731
    for strength in (0.1, 0.3, 0.7):
        found = look.matched_strength(explore, apart(strength), apart(1.0))
        assert apart(found) == pytest.approx(apart(strength), rel=within)
    assert look.matched_strength(explore, 2 * apart(1.0), apart(1.0)) == 1.0
    assert look.matched_strength(explore, 0.0, apart(1.0)) == 0.0


def test_branches_without_noise_of_their_own_are_the_anchor(tiny_base: Path) -> None:
    setup = toy_setup(tiny_config(tiny_base))
    prompts = tuple(ToyPrompts(2)(0))
    read_off = ReadOff(lambda videos: ([], videos), 0.5)
    texts, tape = setup.backbone.texts(prompts), setup.backbone.tape("any")
    look = Laboratory(setup.generator, setup.backbone.codec, texts, tape, setup.judges, read_off)
    place = Place(prompts, Fork(12, replace(setup.config.exploration, branches=2)))
    explorers = [routes, *(partial(noise_branches, strength=strength) for strength in (0.0, 0.5))]
    with look.roots(place) as explore:
        routed, silent, noisy = (explore(explorer) for explorer in explorers)
    for explorer, groups in zip(explorers, (routed, silent, noisy), strict=True):
        for alone, group in zip(look.branches(place, explorer), groups, strict=True):
            assert torch.equal(alone.clean_MTCHW, group.clean_MTCHW), (
                "earlier branches left the roots as they were"
            )
    for one, other, loud in zip(routed, silent, noisy, strict=True):
        anchor = one.clean_MTCHW[-1]
        assert len(one.routes) == 2 and other.routes == loud.routes == (None, None)
        for clean in other.clean_MTCHW:
            torch.testing.assert_close(clean, anchor, rtol=0, atol=1e-5)
        assert all(float((anchor - clean).abs().max()) > 1e-3 for clean in one.clean_MTCHW[:-1])
        clean = loud.clean_MTCHW
        assert len(clean) == 3
        torch.testing.assert_close(clean[-1], anchor, rtol=0, atol=1e-5)
        assert all(float((clean[a] - clean[b]).abs().max()) > 1e-3 for a, b in ((0, 1), (0, 2), (1, 2)))
        shapes = [group.trajectories.states_MPSFCHW.shape for group in (one, other, loud)]
        assert shapes == [one.trajectories.velocities_MPSFCHW.shape] * 3
    assert not torch.equal(routed[0].clean_MTCHW[-1], routed[1].clean_MTCHW[-1])
