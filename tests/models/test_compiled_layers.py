"""Compiled layers: the same numbers within rounding, for any rows, contexts and adapters."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from kvpo.models.adapters import load_adapter, reference_policy, trained_parameters
from kvpo.models.cache import FrameCache, PageShape
from kvpo.models.causal_wan import CausalWan
from kvpo.models.context import PageContext
from tests.models.tiny import SHAPE, random_adapter, tiny_model

TOLERANCE = 1e-5

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # a compiler runs for minutes


def model(*, compiled: bool, checkpointing: bool = False) -> CausalWan:
    made = tiny_model()
    load_adapter(made, random_adapter(made))
    made.checkpointing = checkpointing
    with torch.no_grad():
        for value in trained_parameters(made).values():
            value += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(9))
    if compiled:
        made.compile_blocks()
    return made


def call(made: CausalWan, rows: int, frames: int, context: int, *, encode: bool = False) -> Tensor:
    """A call of some rows and frames after so many context frames; one text for all rows."""
    draws = torch.Generator().manual_seed(rows + 10 * frames + 100 * context)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws)

    shape = PageShape(SHAPE.num_layers, SHAPE.tokens_per_frame, SHAPE.num_heads, SHAPE.head_dim)
    cache = FrameCache(shape, rows * context)
    size = (SHAPE.num_layers, rows, context, SHAPE.tokens_per_frame, SHAPE.num_heads, SHAPE.head_dim)
    ids = cache.write(draw(*size), draw(*size)) if context else []
    pages = torch.tensor(ids, dtype=torch.long).view(rows, context)
    x = draw(rows, frames, SHAPE.channels, SHAPE.latent_height, SHAPE.latent_width)
    text = draw(1, SHAPE.text_len, SHAPE.text_dim)
    where = PageContext(cache, pages, torch.full((rows,), context))
    sigma = torch.linspace(1, 0.25, rows)
    found = made(x, sigma, text, where, text_rows=torch.zeros(rows, dtype=torch.long), encode=encode)
    return torch.stack(found) if encode else found


def worst(found: Tensor, expected: Tensor) -> float:
    assert expected.abs().max() > 0.1
    return float((found - expected).detach().abs().max())


CALLS = [(1, 3, 0), (1, 3, 5), (2, 3, 9), (4, 3, 12), (3, 3, 2), (5, 3, 30), (1, 12, 3), (2, 12, 3)]


def test_contexts_of_any_size_give_the_same_numbers_from_the_same_graphs() -> None:
    plain, compiled = model(compiled=False), model(compiled=True)

    def compare(calls: list[tuple[int, int, int]]) -> None:
        for rows, frames, context in calls:
            for encode in (False, True):
                with torch.no_grad():
                    expected = call(plain, rows, frames, context, encode=encode)
                    assert worst(call(compiled, rows, frames, context, encode=encode), expected) <= TOLERANCE
                    with reference_policy(plain), reference_policy(compiled):
                        other = call(plain, rows, frames, context, encode=encode)
                        found = call(compiled, rows, frames, context, encode=encode)
                assert worst(found, other) <= TOLERANCE and worst(other, expected) > 100 * TOLERANCE

    compare(CALLS)
    graphs = counters["stats"]["unique_graphs"]
    compare([(6, 3, 7), (7, 3, 11), (1, 3, 15), (1, 12, 1), (3, 12, 9)])
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_adapter(checkpointing: bool) -> None:
    gradients = []
    for compiled in (False, True):
        made = model(compiled=compiled, checkpointing=checkpointing)
        for rows, context in ((2, 9), (1, 4), (4, 12)):
            call(made, rows, 3, context).square().mean().backward()
        gradients.append({name: value.grad for name, value in trained_parameters(made).items()})
    plain, found = gradients
    for name, expected in plain.items():
        assert (found[name] - expected).abs().max() <= TOLERANCE * max(1.0, expected.abs().max()), name
        assert expected.abs().max() > 0
