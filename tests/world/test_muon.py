"""The optimiser of the embedded generator's matrices, beside torch's own."""

import pytest
import torch
from torch import nn

from kvpo.world.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)])
def test_singular_values_become_nearly_one(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64, generator=generator)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalised(matrices)
    values = torch.linalg.svdvals(found)
    assert 0.3 < float(values.min()) and float(values.max()) < 1.3
    # the same singular vectors, so that u' X v is diagonal
    core = u.mT @ found @ vh.mT
    assert torch.allclose(core, torch.diag_embed(core.diagonal(dim1=-2, dim2=-1)), atol=1e-10)


def test_updates_are_those_of_torch_up_to_its_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 16), (16, 64), (64, 16), (16, 16)]
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    first = [p.detach().clone() for p in ours]
    own = Muon(ours, lr=0.01, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        own.step()
        reference.step()
    for one, other, start in zip(ours, theirs, first, strict=True):
        off, moved = (one - other).detach().norm(), (one - start).detach().norm()
        assert float(off / moved) < 0.02, one.shape


def test_what_has_no_gradient_stays() -> None:
    one, other = nn.Parameter(torch.eye(3)), nn.Parameter(torch.eye(3))
    one.grad = torch.ones(3, 3)
    Muon([one, other], lr=0.1).step()
    assert torch.equal(other, torch.eye(3)) and not torch.equal(one, torch.eye(3))
