"""Threads that compute on the CUDA device of the thread that starts them."""

import threading
from collections.abc import Callable

import torch


def start_thread(work: Callable[[], object], name: str) -> threading.Thread:
    """Run ``work`` in a new daemon thread with this thread's current CUDA device, and return the thread.

    Every thread has its own current device, which is the first one of the machine in a new thread. Under
    torchrun, "cuda" would thus mean another device there.
    """
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        if device is not None:
            torch.cuda.set_device(device)
        work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
