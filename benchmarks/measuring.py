"""Parts that benchmarks share: alternating arms, the machine they ran on, tables."""

import ctypes
import gc
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kvpo.app.configuration import parse_flags
from kvpo.models.cache import FrameCache
from kvpo.rewards.service.client import RemoteScorer, connect

Arms = Mapping[str, Callable[[], Any]]


def alternated(
    arms: Arms,
    repeats: int,
    synchronise: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each arm, running the arms in turn and in reverse order every other round.

    This way, other load on the machine affects all arms alike. Warm up by running each arm once before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(repeats):
        for name in reversed(list(arms)) if round_ % 2 else arms:
            synchronise()
            started = clock()
            arms[name]()
            synchronise()
            seconds[name].append(clock() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


@contextmanager
def peak_pages(cache: FrameCache) -> Iterator[list[int]]:
    """Yield a list whose only item is the largest number of pages in use after any write so far."""
    peak, write = [cache.pages_in_use], cache.write

    def observed(keys_LRFTND: torch.Tensor, values_LRFTND: torch.Tensor) -> list[list[int]]:
        ids = write(keys_LRFTND, values_LRFTND)
        peak[0] = max(peak[0], cache.pages_in_use)
        return ids

    cache.write = observed  # type: ignore[method-assign]
    try:
        yield peak
    finally:
        cache.write = write  # type: ignore[method-assign]


def peak_memory(run: Callable[[], object]) -> int:
    """Largest growth of this process's resident memory during ``run``, in bytes (Linux)."""

    def resident(field: str) -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(f"{field}:"))

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current resident size
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def machine(device: str = "cpu") -> dict[str, Any]:
    """Facts about the machine that results depend on."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = [line.split(":") for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
        about = {name.strip(): value.strip() for name, value in reversed(lines)}
        cpu = about.get("model name", cpu)
        if "cpu family" in about:  # a virtual machine may hide the rest of the name
            cpu += f" (family {about['cpu family']}, model {about['model']})"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def commit_of(path: Path, *under: str) -> str:
    """The last commit of the checkout at ``path``, or the last that changed files below ``under``."""
    if not (path / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(path), "log", "-1", "--format=%H", "--", *under]
    return subprocess.check_output(command, text=True).strip()


@contextmanager
def reward_server(reward: str, environment: Mapping[str, str]) -> Iterator[RemoteScorer]:
    """Serve a benchmark's reward function with `kvpo reward-server` in another process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvpo", "reward-server", "--reward", reward, "--port", str(port)],
            cwd=Path(__file__).parent,
            env={**os.environ, **environment},
            stderr=said,
        )
        try:
            while not _listens(port):
                if process.poll() is not None:
                    said.seek(0)
                    raise SystemExit(f"the reward server ended: {said.read().strip()}")
                time.sleep(0.1)
            remote = connect(f"http://127.0.0.1:{port}", [reward])
            yield remote
            remote.close()
        finally:
            process.terminate()
            process.wait(60)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def given_settings(words: Sequence[str]) -> dict[str, Any]:
    """Settings by path, parsed from command-line words ``--path value`` as `kvpo` parses them."""
    paths = [word.removeprefix("--") for word in words[::2]]
    return parse_flags(dict(zip(paths, words[1::2], strict=True)))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats have three significant digits."""
    lines = [list(columns), ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard deviation (ddof 1) over seeds."""
    about = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.{digits}f}{about}"


def section(title: str, *paragraphs: str) -> None:
    """Write one section of Markdown to standard output."""
    sys.stdout.write("\n\n".join([f"## {title}", *paragraphs]) + "\n\n")
    sys.stdout.flush()


def write_json(path: Path | None, numbers: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write all measurements to ``path``, if given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
