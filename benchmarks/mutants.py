"""Test the tests with single changes of the source that they should catch: ``make mutants``.

Each mutant changes one expression or drops one statement of the method, the engine, the training loop, or the
parts of the models that histories depend on. It runs in a copy of the repository, in a process forked from
one that has torch loaded, against the tests that execute the changed lines, until one fails. The sample
depends only on the text of the changes, not on their position. Results are kept below ``scratch/mutants``:
the same command continues where it was stopped, and tests are recorded again only after a change. Mutants
that change no result are listed with the reason in ``mutants.yaml``; if too few of the others are caught, the
command fails.
"""

import argparse
import gc
import importlib
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import Phase, settings
from kept import ROOT, Kept, digest
from mutations import Mutant, Signatures, mutants_of

SOURCES = [f"src/kvpo/{room}/*.py" for room in ("method", "engine", "training", "plan")]
SOURCES += [
    f"src/kvpo/models/{name}.py" for name in ("cache", "context", "deployment", "settings", "causal_wan")
]
TESTS = [f"tests/{room}/test_*.py" for room in ("method", "engine", "training", "plan", "models", "parity")]
TESTS += ["tests/app/test_plan.py"]
REVIEWED = Path(__file__).with_suffix(".yaml")
PRELOADED = (
    *("numpy", "torch", "pytest", "hypothesis", "safetensors.torch", "transformers", "diffusers", "peft"),
    *("torch.utils.tensorboard", "torch.utils.checkpoint", "torch.nn.attention.flex_attention"),
)
TIMES = itertools.count(1_000_000_000)
"""Modification times given to mutated files, in seconds since 1970."""
SHORT = 0.5
"""Tests up to this many seconds run before longer ones."""
LONG = 20.0
"""Tests from this many seconds on do not run: a short test should notice what they do."""
HIDDEN = 5.0
"""Assumed seconds of a test's work in other processes, whose time is unknown."""
ENOUGH = 40.0
"""Seconds of tests per mutant; a mutant that these do not catch has survived."""
LEAST = 0.95
"""Share of the mutants that must be caught."""
MEMORY = 8 * 2**30
"""Memory limit of a mutant, in bytes."""
ELSEWHERE = -1
"""Stands for lines executed in other processes, which the trace function does not see."""


class Recorder:
    """Pytest plugin for one test file: records the source lines that each test executes, and its seconds."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = {str(Path(path).resolve()): path for path in sources}
        texts = {path: Path(path).read_text(encoding="utf-8") for path in sources}
        self.ranked = {(path, ELSEWHERE) for path in sources if re.search(r"Ranks|setup\.ranks", texts[path])}
        """Sources that use ranks, which run in their own processes."""
        self.starters = {str(Path(path).resolve()) for path in ("tests/ranks.py", "tests/processes.py")}
        """Files with functions that start other processes."""
        self.lines: dict[str, set[tuple[str, int]]] = {}
        self.hit = self.shared = set[tuple[str, int]]()
        """Lines of imports and of fixtures that outlive a test: every test in the file may depend on them."""
        self.seconds: dict[str, float] = {}
        self.hidden = 0.0
        self.failed: list[str] = []

    def enter(self, frame: Any, event: str, argument: Any) -> Any:
        """Trace function for calls; it also traces lines if the called function is in a source."""
        path = self.sources.get(frame.f_code.co_filename)
        if path is None:
            if frame.f_code.co_filename in self.starters:
                self.hidden = HIDDEN
                self.hit |= self.ranked if frame.f_code.co_name == "on_ranks" else set()
            return None

        def line(frame: Any, event: str, argument: Any) -> Any:
            self.hit.add((path, frame.f_lineno))
            return line

        return line(frame, event, argument)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.hit, begun = self.lines.setdefault(item.nodeid, set()), sum(os.times()[:4])
        self.hidden = 0.0
        threading.settrace(self.enter)
        sys.settrace(self.enter)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)
            self.seconds[item.nodeid] = sum(os.times()[:4]) - begun + self.hidden

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        own = self.hit
        self.hit = own if fixturedef.scope == "function" else self.shared
        try:
            return (yield)
        finally:
            self.hit = own

    def pytest_sessionfinish(self) -> None:
        imported = {getattr(module, "__file__", "") for module in [*sys.modules.values()]}
        self.shared |= {(self.sources[file], 0) for file in imported & self.sources.keys()}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed += [report.nodeid] if report.failed else []


@dataclass
class Chosen:
    """Pytest plugin: run only these tests, short ones first, and remember the first failure."""

    seconds: Mapping[str, float]
    """Test -> its seconds."""
    failure: list[str] = field(default_factory=list)

    def pytest_sessionstart(self) -> None:
        """One failure is enough: keep Hypothesis from shrinking it."""
        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("mutants", parent=settings(), phases=phases)
        settings.load_profile("mutants")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self.seconds]
        items.sort(key=lambda item: self.seconds[item.nodeid])

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        self.failure = self.failure or [node.nodeid, call.excinfo.typename]


def run_file(file: str, plugin: Any, *options: str) -> bool:
    """True if the tests of one file pass, or if none of them is chosen."""
    always = "-p no:cacheprovider -p no:xdist --tb=line --basetemp=temporary/pytest".split()
    return pytest.main([*always, *options, file], plugins=[plugin]) in (0, 5)


@dataclass
class Job:
    """Work for a forked process in its slot's copy of the repository."""

    function: Callable[[], Any]
    """Must return JSON-serialisable data."""
    seconds: float
    """Limit in seconds of CPU time; the wall-clock limit is ten times this."""
    mutant: Mutant | None = None


def run_jobs(jobs: Iterable[Job], slots: Sequence[Path]) -> Iterator[tuple[Job, Any]]:
    """Yield each job with its result, one job per slot at a time; None if it timed out or died."""
    queue, running = iter(jobs), {}
    job: Job | None
    while True:
        for slot in slots:
            if slot not in running and (job := next(queue, None)):
                running[slot] = (job, _start(job, slot), time.monotonic() + 10 * job.seconds)
        if not running:
            return
        for slot, (job, process, deadline) in list(running.items()):
            ended = os.waitpid(process, os.WNOHANG)[0]
            if not ended and time.monotonic() < deadline:
                continue
            with suppress(ProcessLookupError):  # also ends what the job started
                os.killpg(process, signal.SIGKILL)
            if not ended:
                os.waitpid(process, 0)
            if job.mutant:
                shutil.copy2(slot.parent / "original" / job.mutant.path, slot / job.mutant.path)
            del running[slot]
            result = slot / "result.json"
            yield job, json.loads(result.read_text(encoding="utf-8")) if result.exists() else None
        time.sleep(0.02)


def _start(job: Job, slot: Path) -> int:
    """Fork and do the job in the new process; returns its id."""
    result = slot / "result.json"
    result.unlink(missing_ok=True)
    if job.mutant:
        path = slot / job.mutant.path
        path.write_text(job.mutant.text, encoding="utf-8")
        # Bytecode is cached by its source's modification time, so give every version its own.
        os.utime(path, times=(stamp := next(TIMES), stamp))
    process = os.fork()
    if process:
        return process
    try:
        os.setsid()
        log = os.open(slot / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        seconds = math.ceil(job.seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        os.chdir(slot)
        sys.path[:0] = [str(slot / "src"), str(slot)]
        os.environ |= {"PYTHONPATH": str(slot / "src"), "TMPDIR": str(slot / "temporary")}
        result.write_text(json.dumps(job.function()), encoding="utf-8")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(0)


def slots_in(directory: Path, count: int) -> list[Path]:
    """Copies of the repository to run in, next to an original from which mutated files are restored."""
    for name in ["original", *map(str, range(count))]:
        (directory / name / "temporary").mkdir(parents=True)
        shutil.copy2(ROOT / "pyproject.toml", directory / name)
        for part in ("src", "tests", "benchmarks", "docs"):
            skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / part, directory / name / part, ignore=skipped)
    return [directory / str(n) for n in range(count)]


@dataclass(frozen=True)
class Recorded:
    """The lines that each test executes and its seconds, measured on the unchanged source."""

    tests: Mapping[tuple[str, int], set[str]]
    """(source, line) -> tests."""
    seconds: Mapping[str, float]

    def tests_of(self, mutant: Mutant) -> set[str]:
        """Tests that execute the change, or else its function or, outside functions, import the file."""
        tests = set(self.tests.get((mutant.path, ELSEWHERE), ()))
        for lines in (mutant.lines, mutant.scope):
            if found := [self.tests[at] for line in lines if (at := (mutant.path, line)) in self.tests]:
                return tests.union(*found)
        return tests


def record(slots: Sequence[Path], files: Sequence[str], kept: Kept) -> Recorded:
    """Run every test once. A test that fails on the unchanged source is left out."""
    sources = in_files(SOURCES)

    def one(file: str) -> dict[str, Any]:
        recorder = Recorder(sources)
        failed = [] if run_file(file, recorder) else recorder.failed or [file]
        lines = {test: sorted(hit | recorder.shared) for test, hit in recorder.lines.items()}
        return {"failed": failed, "lines": lines, "seconds": recorder.seconds}

    found = {file: kept.read("lines", file, *SOURCES) for file in files}
    missing: dict[Callable[[], Any], str] = {partial(one, file): file for file in files if not found[file]}
    for job, result in run_jobs([Job(function, 1800) for function in missing], slots):
        assert result, f"{missing[job.function]} takes too long"
        found[missing[job.function]] = result
        kept.write(result, [missing[job.function]], "lines", missing[job.function], *SOURCES)
    tests, seconds = defaultdict[tuple[str, int], set[str]](set), dict[str, float]()
    for result in found.values():
        for failed in result["failed"]:
            print(f"fails without any mutant: {failed}", flush=True)
        seconds |= result["seconds"]
        for test, hits in result["lines"].items():
            if test not in result["failed"] and seconds[test] < LONG:
                for path, line in hits:
                    tests[path, line].add(test)
    return Recorded(tests, seconds)


def attempt(mutant: Mutant, recorded: Recorded) -> Job:
    """A job that runs a mutant's tests until one fails: short ones first, its own file's before others."""
    own = f"test_{Path(mutant.path).name}"
    parts: dict[tuple[bool, bool, str], dict[str, float]] = defaultdict(dict)
    for test in recorded.tests_of(mutant):
        file, seconds = test.split("::")[0], recorded.seconds[test]
        parts[seconds > SHORT, own not in file, file][test] = seconds
    taken = {part: sum(seconds.values()) for part, seconds in parts.items()}
    chosen: dict[tuple[bool, bool, str], dict[str, float]] = defaultdict(dict)
    spent = 0.0
    for part in sorted(parts, key=lambda part: (*part[:2], taken[part], part)):
        for test, seconds in sorted(parts[part].items(), key=itemgetter(1)):
            if spent < ENOUGH:
                chosen[part][test] = seconds
                spent += seconds

    def failure() -> list[str] | None:
        for part, own_seconds in chosen.items():
            plugin = Chosen(own_seconds)
            if not run_file(part[-1], plugin, "-x"):
                return plugin.failure or [part[-1], "stopped"]
        return None

    return Job(lambda: {"failure": failure()}, 15 + 2 * spent, mutant)


@dataclass(frozen=True)
class Outcome:
    """The fate of one mutant."""

    file: str
    function: str
    change: str
    outcome: str
    """assertion, error (any other exception), time (timed out, or the process died) or survived."""
    test: str
    """The test that failed first."""
    reason: str
    """Why no test can distinguish a reviewed survivor from the source."""


def outcome(mutant: Mutant, result: Any, reasons: Mapping[tuple[str, str, str], str]) -> Outcome:
    """The fate of a mutant, given its job's ``result``."""
    how, test = "time", ""
    if result and result["failure"]:
        test, error = result["failure"]
        how = "assertion" if error in {"AssertionError", "Failed"} else "error"
    elif result:
        how = "survived"
    reason = reasons.get(mutant.key, "") if how == "survived" else ""
    return Outcome(*mutant.key, how, test, reason)


def table(found: Sequence[Outcome]) -> str:
    """Counts per file, as Markdown."""
    ways = ("assertion", "error", "time", "equivalent", "survived")
    rows = [f"| file | mutants | {' | '.join(ways)} |", "|---" * 7 + "|"]
    for file in [*sorted({one.file for one in found}), "all"]:
        own = [one for one in found if file in (one.file, "all")]
        how = Counter("equivalent" if one.reason else one.outcome for one in own)
        cells = [file.removeprefix("src/kvpo/"), len(own), *(how[way] for way in ways)]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def in_files(patterns: Sequence[str]) -> list[str]:
    """Files that match, as paths from the repository's root. Raises SystemExit if a pattern matches none."""
    found = {pattern: sorted(ROOT.glob(pattern)) for pattern in patterns}
    if empty := [pattern for pattern, paths in found.items() if not paths]:
        raise SystemExit(f"no file matches {', '.join(empty)}")
    return sorted(str(path.relative_to(ROOT)) for paths in found.values() for path in paths)


def sampled(count: int, match: str, key: str) -> list[Mutant]:
    """The first ``count`` mutants that contain ``match``, in an order that depends only on their text."""
    signatures = Signatures.of([path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")])
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in in_files(SOURCES)}
    every = [one for path, text in texts.items() for one in mutants_of(path, text, signatures)]
    if gone := set(reviewed()) - {mutant.key for mutant in every}:
        raise SystemExit(f"{REVIEWED.name} has changes that no mutant makes: {sorted(gone)}")
    matching = [mutant for mutant in every if match in " ".join(mutant.key)]
    sample = sorted(matching, key=lambda mutant: mutant.rank(key))[: count or None]
    print(f"{len(sample)} of {len(every)} mutants", flush=True)
    return sample


def reviewed() -> dict[tuple[str, str, str], str]:
    """Why no test can catch it, for every reviewed mutant."""
    rows = yaml.safe_load(REVIEWED.read_text(encoding="utf-8"))
    return {(row["file"], row["function"], row["change"]): row["reason"] for row in rows}


def run(
    sample: Sequence[Mutant], tests: Sequence[str], workers: int, kept: Kept
) -> Iterator[tuple[Mutant, Any]]:
    """Yield each mutant with the failure that it causes as soon as it is known; None if it did not finish."""
    os.environ |= {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"}
    os.environ.setdefault("KVPO_GOLDEN", str(ROOT.parent / "shared" / "golden"))
    files, missing, started = in_files(tests), [], time.monotonic()
    digest([*files, *in_files(SOURCES)])  # reads every file now, before it is copied below
    for mutant in sample:
        if found := kept.read("mutant", *mutant.key):
            yield mutant, found[0]
        else:
            missing.append(mutant)
    if not missing:
        return
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        slots = slots_in(Path(directory).resolve(), workers)
        for name in PRELOADED:
            importlib.import_module(name)
        gc.freeze()  # so that forked processes share loaded modules
        recorded = record(slots, files, kept)
        print(f"{len(recorded.seconds)} tests recorded in {time.monotonic() - started:.0f} s", flush=True)
        for job, result in run_jobs((attempt(mutant, recorded) for mutant in missing), slots):
            assert job.mutant
            caught = result and result["failure"]
            rests_on = [result["failure"][0].split("::")[0]] if caught else files
            kept.write([result], [job.mutant.path, *rests_on], "mutant", *job.mutant.key)
            yield job.mutant, result


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--count", type=int, default=160, help="mutants; 0: all (default: %(default)s)")
    parser.add_argument("--match", default="", help="only those whose file, function and change contain this")
    parser.add_argument("--key", default="", help="another key, another sample")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="files of tests (default: all that matter)")
    parser.add_argument("--list", action="store_true", help="print the sample and stop")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument(
        "--kept", type=Path, default=ROOT / "scratch" / "mutants", help="where results are kept"
    )
    parser.add_argument("--json", type=Path, help="where everything found goes")
    arguments = parser.parse_args()
    started = time.monotonic()
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.check_output(describe, cwd=ROOT, text=True).strip()
    sample = sampled(arguments.count, arguments.match, arguments.key)
    if arguments.list:
        print("\n".join("  ".join([mutant.operator, *mutant.key]) for mutant in sample))
        return
    found, reasons = [], reviewed()
    for mutant, result in run(sample, arguments.tests, arguments.workers, Kept(arguments.kept)):
        found.append(one := outcome(mutant, result, reasons))
        print(f"{one.outcome:9}  {one.file}  {one.function}: {one.change[:160]}  {one.test}", flush=True)
    found.sort(key=lambda one: astuple(one)[:3])
    seconds = round(time.monotonic() - started)
    if arguments.json:
        numbers = {"key": arguments.key, "commit": commit, "mutants": [asdict(one) for one in found]}
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(found)}\n\n{seconds} s, {arguments.workers} at a time\n")
    survived = [one for one in found if one.outcome == "survived"]
    print(*(f"- {one.file} {one.function}: {one.change}\n  {one.reason}" for one in survived), sep="\n")
    caught, judged = len(found) - len(survived), sum(not one.reason for one in found)
    if caught < LEAST * judged:
        raise SystemExit(f"{caught} of {judged} caught: fewer than {LEAST:.0%}")


if __name__ == "__main__":
    main()
