"""Count the FLOPs of CPU code, and measure the FLOP rate that this process can reach."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measuring import alternated
from torch.utils.flop_counter import FlopCounterMode

from kvpo.models.linear import AVAILABLE, linear


def _product_flops(x: Any, weight: Any, *rest: Any, **named: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_gradient_flops(gradient: Any, *tensors: Any, **named: Any) -> int:
    # Recomputes the scores, then takes two products for each of the two forward ones.
    return 5 * _attention_flops(*tensors[:3]) // 2


CPU_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_gradient_flops,
}
"""FLOPs, from argument shapes, of operations that torch's counter does not know."""
if AVAILABLE:
    CPU_FLOPS[torch.ops.mkldnn._linear_pointwise] = _product_flops


def counted_flops(run: Callable[[], object]) -> int:
    """FLOPs of the matrix products and the attention in ``run``."""
    with FlopCounterMode(display=False, custom_mapping=CPU_FLOPS) as counter:
        run()
    return counter.get_total_flops()


def product_rate(rows: int, width: int) -> float:
    """FLOPs per CPU-second of float32 matrix products, by torch or oneDNN, whichever is faster here."""
    x, weight, bias = torch.randn(rows, width), torch.randn(width, width), torch.randn(width)
    kinds = [lambda: F.linear(x, weight, bias), lambda: linear(x, weight, bias)]
    arms = {str(n): lambda kind=kind: [kind() for _ in range(50)] for n, kind in enumerate(kinds)}
    alternated(arms, 1)
    return 50 * 2 * rows * width**2 / min(alternated(arms, 5, clock=time.process_time).values())
