"""GELU, normalisation and attention on the CPU are torch's own, and so are their gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvpo.models.causal_wan import PatchEmbedding
from kvpo.models.cpu import GELU, attention, rms_norm


def with_gradients(function, *inputs: Tensor) -> list[Tensor]:
    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def drawn(*sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)), dtype=torch.float64).to(
        dtype
    )


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients_are_those_of_torch(dtype: torch.dtype, close: float) -> None:
    x, weight = 3 * drawn(4, 5, 48, dtype=dtype), 1 + drawn(48, dtype=dtype)
    pairs = [
        (with_gradients(GELU(), x), with_gradients(lambda x: F.gelu(x, approximate="tanh"), x)),
        (
            with_gradients(lambda x, w: rms_norm(x, w, 1e-6), x, weight),
            with_gradients(lambda x, w: F.rms_norm(x, (48,), w, 1e-6), x, weight),
        ),
    ]
    for ours, theirs in pairs:
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one, other, rtol=close, atol=close)


def test_second_derivatives_are_refused() -> None:
    x, weight = drawn(3, 8, dtype=torch.float64).requires_grad_(), torch.ones(8, dtype=torch.float64)
    for out in (GELU()(x), rms_norm(x, weight, 1e-6)):
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_extreme_values_stay_finite() -> None:
    x = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4])
    out, gradient = with_gradients(GELU(), x)
    assert torch.equal(out, F.gelu(x, approximate="tanh")) and bool(gradient.isfinite().all())
    zeros = torch.zeros(2, 8)
    assert torch.equal(rms_norm(zeros, torch.ones(8), 1e-6), zeros)
    assert bool(with_gradients(lambda x: rms_norm(x, torch.ones(8), 1e-6), zeros)[1].isfinite().all())


@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 4, 4), (1, 1, 1)])
def test_patches_are_the_convolution(patch: tuple[int, int, int]) -> None:
    patches = PatchEmbedding(3, 10, patch, stride=patch).double()
    latents = drawn(2, 4, 3, 8, 8, dtype=torch.float64)
    own = patches(latents)
    other = F.conv3d(latents.transpose(1, 2), patches.weight, patches.bias, stride=patch)
    torch.testing.assert_close(own, other.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_under_autocast_is_torch_s(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same to rounding in float64, were that autocast's precision; as close as bfloat16 is in that."""
    rng = torch.Generator().manual_seed(1)
    drawn = [torch.randn(3, 2, n, 5, generator=rng, dtype=torch.float64) for n in (6, 9, 9)]
    mask = torch.rand(3, 1, 1, 9, generator=rng) > 0.3 if masked else None

    def found(dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in drawn]
        out = attention(*inputs, mask)
        return [out, *torch.autograd.grad(out.double().square().sum(), inputs)]

    exact = found(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = found(torch.float32)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float64)
    for ours, close, theirs in zip(found(torch.float64), rounded, exact, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 and not torch.equal(ours, theirs)
        assert (close - theirs).norm() <= 0.02 * theirs.norm()
