"""Muon in the parameters' own precision.

``torch.optim.Muon`` orthogonalises in bfloat16, which CPUs without bfloat16 instructions emulate. On those it
took longer than the forward and backward passes together.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan et al. 2024, "Muon"), as in ``torch.optim.Muon``."""


def orthogonalised(matrix_NMN: Tensor) -> Tensor:
    """Roughly the nearest matrices with orthonormal rows (or columns): singular values about 0.7 to 1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix_NMN.shape[-2] > matrix_NMN.shape[-1]
    x = matrix_NMN.mT if tall else matrix_NMN
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):  # the default of ``torch.optim.Muon``
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum, scaled to the size of AdamW's updates (Liu et al. 2025).

    Matrices of the same shape are updated together. The update equals that of ``torch.optim.Muon`` with
    ``adjust_lr_fn="match_rms_adamw"``, up to the latter's rounding.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Apply one update to every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                directions = []
                for matrix in matrices:
                    if matrix not in self.state:
                        self.state[matrix]["momentum"] = torch.zeros_like(matrix)
                    average = self.state[matrix]["momentum"]
                    average.lerp_(matrix.grad, 1 - group["momentum"])
                    directions.append(matrix.grad.lerp(average, group["momentum"]))
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                updates = orthogonalised(torch.stack(directions))
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)
