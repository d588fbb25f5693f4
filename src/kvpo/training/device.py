"""Peak device memory, and the process settings that a run computes with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvpo.config import Config

GB = 1e9


def forget_peak(device: torch.device | str) -> None:
    """Reset the peak-memory counter."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device | str) -> dict[str, float]:
    """``device_peak_gb``: peak memory of tensors since ``forget_peak``; empty on a CPU."""
    if torch.device(device).type != "cuda":
        return {}
    return {"device_peak_gb": torch.cuda.max_memory_allocated(device) / GB}


@contextmanager
def computing(config: Config) -> Iterator[None]:
    """Prefer deterministic kernels and use a configuration's threads; the settings are restored on exit.

    On a CPU all kernels are deterministic. On CUDA the backward pass of attention is not: torch only takes
    the deterministic one if it may also refuse operations that have none.

    On a CPU the default is one thread. Threads synchronise after every operation, so if another process
    occupies one of the cores, all of them wait for the thread that shares it.
    """
    before = torch.get_num_threads()
    by_default = 1 if config.on_cpu else before
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    dtype = torch.get_default_dtype()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.set_num_threads(config.threads or by_default)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # only finds bugs, and costs time
        with torch.random.fork_rng(devices=[]):  # new layers draw from it before their weights are loaded
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_num_threads(before)
