"""Branch diversity is read off what a fork shows, with and without a tail after its window."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvpo.training import diversity


@pytest.mark.parametrize(("tail", "read"), [(4, 4), (0, 6)])
def test_without_a_tail_the_window_is_read(monkeypatch: pytest.MonkeyPatch, tail: int, read: int) -> None:
    lengths = []

    def observe(videos: torch.Tensor) -> tuple[list[tuple], torch.Tensor]:
        lengths.append(videos.shape[1])
        return [(n % 2,) for n in range(len(videos))], torch.ones(len(videos))

    scores = SimpleNamespace(totals=lambda weights, share: torch.arange(4.0))
    monkeypatch.setattr(diversity, "score_groups", lambda groups, *given, **named: [scores] * len(groups))
    group: Any = SimpleNamespace(clean_MTCHW=torch.rand(4, 6 + tail, 3, 2, 2), window_frames=6)
    judges: Any = SimpleNamespace(
        codec=SimpleNamespace(decode=lambda latents: latents), scorer=None, weights_K=torch.ones(1)
    )
    generator: Any = SimpleNamespace(block=3)
    look = diversity.Explorer(generator, {}, lambda *key: torch.empty(0), judges, observe, 0.5)
    found = look.measure([group])
    assert lengths == [read]
    assert found.attribute_diversity == pytest.approx(2 / 3) and found.broken_share == 0
