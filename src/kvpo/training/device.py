"""What torch says of a device's memory; on a CPU it keeps no count."""

import torch

GB = 1e9


def forget_peak(device: torch.device | str) -> None:
    """Count the most memory anew from here on."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device | str) -> dict[str, float]:
    """``device_peak_gb``: the most that tensors took since ``forget_peak``; empty on a CPU."""
    if torch.device(device).type != "cuda":
        return {}
    return {"device_peak_gb": torch.cuda.max_memory_allocated(device) / GB}
