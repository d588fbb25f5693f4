"""`kvpo doctor`: finds what would stop a run on this machine, before the run does."""

import importlib.metadata
import logging
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvpo import __version__
from kvpo.app.build import build_setup, check_device, source_of
from kvpo.app.configuration import PLACES_OF_A_RUN, flat, preset, settings
from kvpo.app.named_rewards import reach_servers
from kvpo.app.sources.wan_parts import adapters_of
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError
from kvpo.models.hub import resolve_location, split_entry
from kvpo.models.quantised import check_rollouts
from kvpo.training.device import GB, computing
from kvpo.training.ranks import Ranks, joined_ranks
from kvpo.training.trainer import Trainer

logger = logging.getLogger(__name__)

ENOUGH_MEMORY, ENOUGH_DISK = 4 * GB, 10 * GB
"""Host memory and disk below which to warn: a checkpoint of a 1.3B adapter takes 5.6 GB."""
SLOW_DISK = 50e6
"""Bytes per second below which saving that checkpoint takes two minutes."""
MEMINFO = Path("/proc/meminfo")
WRITTEN = 64 * 2**20
"""Bytes that the write test writes."""
SKEW = 1.0
"""Seconds by which clocks may differ before logs of several nodes are hard to read side by side."""
RANK_TIMEOUT = timedelta(minutes=2)
"""Timeout of all communication between ranks in these checks."""
EXCHANGED = 2**22
"""Number of float32 values in the gradient exchange test: 16 MB."""
BFLOAT16 = "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); assert (a @ a)[0, 0] == 64"
NO_FILES = ("device", "rewards.cache", "backbone.geometry")
"""Settings among PLACES_OF_A_RUN that name no file that must exist."""
DRY = {
    "optim.prompts_per_update": 2,
    "exploration.branches": 4,
    "exploration.blocks": 1,
    "exploration.tail_blocks": 0,
    "optim.updates": 1,
}
"""Settings that cut an update of the embedded world down to a second."""

Level = Literal["ok", "warn", "fail"]
LEVELS: tuple[Level, ...] = ("ok", "warn", "fail")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    subject: str
    level: Level
    found: str
    way_out: str = ""

    def line(self) -> str:
        """The finding as one line of text."""
        return f"{self.level:4}  {self.subject}: {self.found}" + (f"; {self.way_out}" if self.way_out else "")


def doctor(config: Config, out: Path) -> list[list[Finding]]:
    """Examine the machine and return the findings of every rank; under torchrun each rank examines its own.

    Raises LostRank if the ranks cannot reach each other.
    """
    with joined_ranks(config.device, long=RANK_TIMEOUT) as ranks:
        checks: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
            ("versions", versions),
            ("device", partial(device, config)),
            ("precision", partial(precision, config)),
            ("memory", partial(memory, config)),
            ("output", partial(output, out)),
            ("files", partial(files, config)),
            ("rewards", partial(rewards, config)),
            ("ranks", partial(exchanges, ranks, config, out)),
            ("dry update", partial(dry_update, ranks, config)),
        )
        own = [finding for subject, check in checks for finding in _examined(subject, check)]
        return ranks.gather(own, "reporting")


def worst(findings: list[list[Finding]]) -> int:
    """Exit status for all findings: 0 all ok, 1 warnings, 2 failures."""
    return max(LEVELS.index(finding.level) for own in findings for finding in own)


def _examined(subject: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """Run a check and return its findings; an exception counts as a failure."""
    try:
        return check()
    except Exception as error:
        logger.debug("%s", subject, exc_info=error)
        what = " ".join(str(error).split()) or "no message"
        return [Finding(subject, "fail", f"{type(error).__name__}: {what}")]


def versions() -> list[Finding]:
    """Check the versions of Python, kvpo and torch, and list missing packages."""
    found = f"kvpo {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    missing: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("kvpo") or ():
        name, _, marker = requirement.partition(";")
        extra = re.search(r"extra == ['\"](\w+)['\"]", marker)
        package = re.split(r"[ <>=\[]", name, maxsplit=1)[0]
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.setdefault(extra[1] if extra else "", []).append(package)
    findings = [Finding("versions", "ok", found)]
    if required := missing.pop("", []):
        way_out = "install them with: pip install kvpo"
        findings.append(Finding("packages", "fail", f"{', '.join(required)} missing", way_out))
    for extra_name, packages in sorted(missing.items()):
        way_out = f"needed for some uses only: pip install 'kvpo[{extra_name}]'"
        level: Level = "ok" if extra_name in ("dev", "raft", "trackers") else "warn"
        findings.append(Finding(f"extra {extra_name}", level, f"{', '.join(packages)} missing", way_out))
    return findings


def device(config: Config) -> list[Finding]:
    """Check the configured device and its driver."""
    check_device(config.device)
    if torch.device(config.device).type != "cuda":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return [Finding("device", "ok", f"{config.device} with {cores} cores, {platform.machine()}")]
    own = torch.cuda.get_device_properties(config.device)
    driver = _driver()
    return [
        Finding("device", "ok", f"{own.name}, {own.total_memory / GB:.0f} GB, CUDA {torch.version.cuda}"),
        Finding("driver", "ok" if driver else "warn", driver or "nvidia-smi does not answer"),
    ]


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.split("\n")[0].strip()


def precision(config: Config) -> list[Finding]:
    """Check bfloat16 matrix products, the attention kernels that support it, and the rollout precision."""
    check_rollouts(config.optim.rollout_precision, config.device, config.model)
    if torch.device(config.device).type != "cuda":
        # In a subprocess, since a CPU may advertise instructions that it traps on, which ends the process.
        done = subprocess.run([sys.executable, "-c", BFLOAT16], capture_output=True, timeout=120)
        if done.returncode:
            way_out = "set ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16 before the run, or keep --optim.autocast none"
            return [Finding("bfloat16", "warn", f"a product ends with status {done.returncode}", way_out)]
        return [Finding("bfloat16", "ok", "products run")]
    findings = [Finding("bfloat16", "ok" if torch.cuda.is_bf16_supported() else "warn", "on this device")]
    query = torch.randn(1, 2, 128, 128, device=config.device, dtype=torch.bfloat16)
    works = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend):
                scaled_dot_product_attention(query, query, query)
            works.append(backend.name.lower())
        except RuntimeError:
            continue
    way_out = "" if works else "install a torch that is built for this device"
    found = ", ".join(works) or "only the slow kernel runs"
    return [*findings, Finding("attention", "ok" if works else "warn", found, way_out)]


def memory(config: Config) -> list[Finding]:
    """Check the free memory of host and device."""
    if MEMINFO.exists():
        # MemFree would leave out memory that only caches files.
        (available,) = re.findall(r"MemAvailable: *(\d+) kB", MEMINFO.read_text(encoding="utf-8"))
        free = 1024 * int(available)
        way_out = "" if free >= ENOUGH_MEMORY else "end other processes; `kvpo plan` says what a run needs"
        findings = [Finding("host memory", "warn" if way_out else "ok", f"{free / GB:.1f} GB free", way_out)]
    else:
        unknown = f"this system has no {MEMINFO}, so what is free is not known"
        findings = [Finding("host memory", "warn", unknown, "`kvpo plan` says what a run needs")]
    if torch.device(config.device).type == "cuda":
        left, total = torch.cuda.mem_get_info(config.device)
        crowded = left < 0.9 * total
        way_out = "another process holds some of it; nvidia-smi says which" if crowded else ""
        found = f"{left / GB:.0f} of {total / GB:.0f} GB free; `kvpo plan` says what a run needs"
        findings.append(Finding("device memory", "warn" if crowded else "ok", found, way_out))
    return findings


def output(out: Path) -> list[Finding]:
    """Check the free space and the write speed of the output directory."""
    place = _place(out)
    free = shutil.disk_usage(place).free
    way_out = "" if free >= ENOUGH_DISK else "a run of a 1.3B model keeps three checkpoints of 5.6 GB"
    findings = [Finding("disk", "warn" if way_out else "ok", f"{free / GB:.1f} GB free at {place}", way_out)]
    with TemporaryDirectory(dir=place, prefix=".kvpo-doctor-") as scratch:
        started = time.perf_counter()
        with (Path(scratch) / "test").open("wb") as file:
            file.write(bytes(WRITTEN))
            file.flush()
            os.fsync(file.fileno())
        rate = WRITTEN / (time.perf_counter() - started)
    slow = rate < SLOW_DISK
    way_out = "checkpoints will take long; choose a faster --out" if slow else ""
    return [*findings, Finding("write speed", "warn" if slow else "ok", f"{rate / 1e6:.0f} MB/s", way_out)]


def files(config: Config) -> list[Finding]:
    """Check the prompts and weights that the configuration names."""
    findings = []
    values = flat(asdict(config))
    for path in PLACES_OF_A_RUN:
        value = values[path]
        if path in NO_FILES or settings()[path].type is not str or not value:
            continue
        try:
            every = adapters_of(value) if path == "backbone.lora" else [value]
            found = [str(resolve_location(split_entry(one)[0], download=False)) for one in every]
            findings.append(Finding(path, "ok", ", ".join(found)))
        except ValueError as error:
            findings.append(Finding(path, "warn", str(error)))
    try:
        training, validation, test = source_of(config).split(config)
    except ConfigurationError as error:
        return [*findings, Finding("prompts", "fail", str(error))]
    counts = {"validation": validation, "test": test}
    evaluated = ", ".join(f"{sum(map(len, sets.values()))} for {name}" for name, sets in counts.items())
    return [*findings, Finding("prompts", "ok", f"{len(training) or 'drawn'} for training, {evaluated}")]


def rewards(config: Config) -> list[Finding]:
    """Check the names of the configured rewards and reach their servers; loads no reward in this process."""
    reach_servers(config)
    names = [*config.rewards.scorers, *config.evaluation.watchers]
    return [Finding("rewards", "ok", f"{', '.join(names)} (known; no model was loaded)")]


def exchanges(ranks: Ranks, config: Config, out: Path) -> list[Finding]:
    """Check communication between ranks, their clocks, and that they share one output directory."""
    if ranks.count == 1:
        return [Finding("ranks", "ok", "one process; start this under torchrun to examine several")]
    ranks.gather(None, "meeting")
    started = time.perf_counter()
    clocks = ranks.gather(time.time(), "comparing clocks")
    status = time.perf_counter() - started
    flat_N = torch.ones(EXCHANGED // ranks.count * ranks.count, device=config.device)
    ranks.exchange_parts(flat_N)
    started = time.perf_counter()
    whole = ranks.join_parts(ranks.exchange_parts(flat_N).sum(0))
    right = bool((whole == ranks.count).all())
    rate = 2 * flat_N.nbytes / (time.perf_counter() - started)
    skew = max(clocks) - min(clocks)
    token = ranks.gather(f".kvpo-doctor-{secrets.token_hex(4)}", "naming a file")[0]
    here = _place(out)
    ranks.once("writing a file", (here / token).touch)
    seen = (here / token).exists()
    ranks.gather(None, "looking for a file")
    if ranks.main:
        (here / token).unlink()
    wrong = "" if right else "the sum of gradients is wrong; update the driver and NCCL"
    return [
        Finding("ranks", "ok", f"{ranks.count} ranks, a status takes {1e3 * status:.1f} ms"),
        Finding("gradients", "ok" if right else "fail", f"{rate / 1e6:.0f} MB/s from rank to rank", wrong),
        Finding("clocks", "ok" if skew < SKEW else "warn", f"{skew:.3f} s apart",
                "" if skew < SKEW else "synchronise them (NTP)"),
        Finding("shared directory", "ok" if seen else "fail", f"{here} {'is' if seen else 'is not'} shared",
                "" if seen else "give an --out that every node sees"),
    ]  # fmt: skip


def _place(out: Path) -> Path:
    """The output directory, or its nearest existing parent."""
    return next(path for path in (out, *out.absolute().parents) if path.is_dir()).absolute()


def dry_update(ranks: Ranks, config: Config) -> list[Finding]:
    """Make one update of the embedded world on the configured device, as a run does."""
    small = preset("demo", {**DRY, "device": config.device})
    started = time.perf_counter()
    with computing(small):
        with ranks.together("building the embedded world"):
            trainer = Trainer(build_setup(small, ranks))
        numbers: dict[str, Any] = trainer.step()
    found = f"{time.perf_counter() - started:.1f} s, gradient norm {numbers['gradient_norm']:.2g}"
    return [Finding("dry update", "ok", found)]
