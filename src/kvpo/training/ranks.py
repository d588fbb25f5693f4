"""The processes (ranks) of a run and all communication between them; a single process exchanges nothing.

Settings, prompts, routes and noise follow from the configuration on every rank, so only results are
exchanged: scores, held-out numbers, gradients, and failures. Exchanges that may have to wait for a reward or
a slower rank have a long time-out; sums of gradients follow at once and have a short one.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _dump_fr_trace_json

from kvpo.config_checks import ConfigurationError
from kvpo.training.clock import Clock

logger = logging.getLogger(__name__)

LONG, SHORT = timedelta(hours=1), timedelta(minutes=5)
"""Time-outs of exchanges that wait for rewards or validations, and of gradient sums."""
POLL = 0.02
"""Seconds between two checks for ranks that have arrived."""
STOPPED = "stopped with rank"
"""Start of the message of a rank that stops because another one has failed."""
T = TypeVar("T")


class RankError(ValueError):
    """Another rank has failed, or differs; the message is one line for the user."""


class RanksDiffer(RankError):
    """The ranks are not in the same state of the same run."""


class LostRank(ConnectionError):
    """Another rank is gone or does not respond; the message is one line for the user."""


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of its run. The default is a single process, which exchanges nothing."""

    rank: int = 0
    count: int = 1
    patient: Any = None
    """Process group with the long time-out, on the CPU."""
    prompt: Any = None
    """Process group with the short time-out, on the device's backend."""
    traces: Path | None = None
    """Directory for the flight recorder's dump; None: the working directory."""
    numbers: tuple[int, ...] = ()
    """Numbers of these ranks in the run, if they are only some of its ranks."""
    clock: Clock = field(default_factory=Clock)
    """Time and traffic of this rank, by phase."""
    leaving: ExitStack = field(default_factory=ExitStack)
    """Callbacks to run before the process groups are destroyed."""

    @property
    def main(self) -> bool:
        """True on rank 0, which writes the run's files."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's share of the items: every ``count``-th one."""
        return list(items[self.rank :: self.count])

    def deal(self, items: Sequence[T]) -> list[T]:
        """Deal items like ``share``, but equally many to each rank: the last item repeats if they run out."""
        rounds = -(-len(items) // self.count)
        return [items[min(self.rank + n * self.count, len(items) - 1)] for n in range(rounds)]

    def gather(self, value: T, doing: str) -> list[T]:
        """Gather all ranks' values, in rank order. Raises LostRank, and RankError if a rank has failed."""
        return self._exchange("", value, doing)

    def _exchange(self, failure: str, value: T, doing: str) -> list[T]:
        """Gather values and failures of all ranks, so that none waits for one that has failed."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with self._in_touch(doing), self.clock("wait"):
            dist.all_gather_object(found, (failure, value), group=self.patient)
        for rank, (report, _) in enumerate(found):
            if report and not failure:
                again = report.startswith(STOPPED)  # it only reports the failure of another one
                text = f"{STOPPED} {self._number(rank)}, which failed while {doing}: {report}"
                error = RankError(report if again else text)
                vars(error)["told"] = id(self)
                raise error
        return [one for _, one in found]

    def _number(self, rank: int) -> int:
        return self.numbers[rank] if self.numbers else rank

    def in_order(self, shares: Sequence[T], doing: str) -> list[T]:
        """Gather the results of items that ``share`` or ``deal`` dealt, in their order; repeats come last."""
        every = self.gather(list(shares), doing)
        return [own[n] for n in range(len(every[0])) for own in every if n < len(own)]

    def any(self, flag: bool, doing: str) -> bool:
        """True on every rank if it is true on one."""
        return any(self.gather(flag, doing))

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Context for work that each rank does on its own; if it fails on one rank, it fails on all.

        The block's exception propagates. The other ranks raise a RankError that names the rank that failed,
        instead of waiting for it in their next exchange. ``doing`` describes the work in their messages.
        """
        try:
            yield
        except LostRank:
            raise
        except Exception as error:
            self._tell(error, doing)
            raise
        self._exchange("", None, doing)

    def once(self, doing: str, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0 only and return its result on all ranks; if it fails, all ranks fail."""
        if not self.main:
            return self._exchange("", None, doing)[0]  # type: ignore[return-value]
        try:
            value = action()
        except Exception as error:
            self._tell(error, doing)
            raise
        self._exchange("", value, doing)
        return value

    def _tell(self, error: Exception, doing: str) -> None:
        """Report a failure to the other ranks, unless it or an error that caused it has been reported."""
        known = id(self) in _told(error)
        vars(error)["told"] = id(self)
        if not known:
            self._exchange(_line(error), None, doing)

    def demand_equal(self, found: Callable[[], Mapping[str, object]], doing: str) -> None:
        """Raise RanksDiffer on every rank, naming the first one whose ``found()`` differs from rank 0's."""
        if self.count == 1:
            return
        every = self.gather(dict(found()), doing)
        for rank, own in enumerate(every):
            different = [name for name in own if own[name] != every[0][name]]
            if different:
                there, here = (str(side[different[0]])[:200] for side in (own, every[0]))
                raise RanksDiffer(
                    f"rank {rank} differs from rank 0 in its {' and '.join(different)} after {doing}: "
                    f"{there} there, {here} on rank 0; this update is not saved. See that all ranks read the "
                    "same files, and start again with --resume"
                )

    def exchange_parts(self, flat_N: Tensor) -> Tensor:
        """Receive part ``rank`` of ``count`` equal parts of every rank's tensor: ``[count, N / count]``.

        Raises LostRank.
        """
        if self.count == 1:
            return flat_N[None]
        self.clock.bytes["reduce"] += flat_N.nbytes * (self.count - 1) // self.count
        found = torch.empty_like(flat_N)
        with self._in_touch("adding up gradients"):
            dist.all_to_all_single(found, flat_N, group=self.prompt, async_op=True).wait()
        return found.view(self.count, -1)

    def join_parts(self, part_P: Tensor) -> Tensor:
        """Concatenate the parts of all ranks in rank order: ``[count * P]``. Raises LostRank."""
        if self.count == 1:
            return part_P
        self.clock.bytes["reduce"] += part_P.nbytes * (self.count - 1)
        whole_RP = part_P.new_empty(self.count, len(part_P))
        with self._in_touch("adding up gradients"):
            dist.all_gather(list(whole_RP), part_P, group=self.prompt, async_op=True).wait()
        return whole_RP.flatten()

    @contextmanager
    def _in_touch(self, doing: str) -> Iterator[None]:
        """Turn torch's error for a lost or silent rank into LostRank, and dump the flight recorder."""
        try:
            yield
        except RuntimeError as error:
            number = self._number(self.rank)
            trace = (self.traces or Path()) / f"flight-recorder-rank-{number}.json"
            try:
                trace.write_bytes(_dump_fr_trace_json())
            except OSError as unwritable:
                logger.warning("the flight recorder could not be written: %s", unwritable)
            raise LostRank(
                f"rank {number} of {self.count} lost touch with another rank while {doing}; look at the "
                f"first error of the others (one that was killed left none) and at {trace} ({_line(error)})"
            ) from error

    def some(self, numbers: Sequence[int], *, patient: Any, prompt: Any) -> "Ranks":
        """This rank among a subset of the run's ranks, which has its own process groups."""
        own = tuple(numbers)
        return Ranks(own.index(self.rank), len(own), patient, prompt, self.traces, own, self.clock)


ALONE = Ranks()
"""A run of one process."""


@dataclass(frozen=True)
class Teams:
    """The ranks of a run in teams of equal size; a team shares its groups and divides their branches."""

    team: Ranks = ALONE
    """The ranks of this rank's team."""
    peers: Ranks = ALONE
    """The ranks at this rank's place in each team, in the order of the teams."""

    @property
    def index(self) -> int:
        """Number of this rank's team."""
        return self.peers.rank

    @property
    def count(self) -> int:
        """Number of teams."""
        return self.peers.count


ONE_TEAM = Teams()
"""The team of a run of one process."""


def teams_within(ranks: int, size: int) -> int:
    """The largest team size, at most ``size``, that divides the number of ranks."""
    return max(n for n in range(1, min(size, ranks) + 1) if ranks % n == 0)


def teams_of(ranks: Ranks, size: int) -> Teams:
    """Form teams of neighbouring ranks, of ``size`` or the next smaller size that divides the ranks.

    All ranks must call it together. Raises LostRank, and RankError if another rank has already failed.
    """
    size = teams_within(ranks.count, size)
    if size == 1:
        return Teams(ALONE, ranks)
    if size == ranks.count:
        return Teams(ranks, ALONE)
    # Forming a group would wait even for a rank that has failed; gathering raises instead.
    ranks.gather(None, "loading the generator and the rewards")
    backend, every = dist.get_backend(ranks.prompt), range(ranks.count)

    def mine(parts: Sequence[Sequence[int]]) -> Ranks:
        found = None
        for numbers in parts:  # every rank takes part in forming every group
            patient = dist.new_group(list(numbers), timeout=LONG, backend="gloo")
            prompt = dist.new_group(list(numbers), timeout=SHORT, backend=backend)
            if ranks.rank in numbers:
                found = ranks.some(numbers, patient=patient, prompt=prompt)
        assert found is not None
        return found

    teams = [every[at : at + size] for at in range(0, ranks.count, size)]
    return Teams(mine(teams), mine([every[place::size] for place in range(size)]))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _told(error: BaseException) -> list[int]:
    """Ids of the ranks (`Ranks`) to which an error, or one that caused it, has been reported."""
    own = [vars(error)["told"]] if "told" in vars(error) else []
    return own if error.__cause__ is None else own + _told(error.__cause__)


def added_up(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sum the counts by name."""
    return {name: sum(own[name] for own in counts) for name in counts[0]}


def launched() -> bool:
    """True if torchrun started this process together with others.

    Raises ValueError if WORLD_SIZE is set but not 1, and it or RANK is not a number.
    """
    count, rank = os.environ.get("WORLD_SIZE") or "1", os.environ.get("RANK", "")
    if count != "1" and not (count.isdecimal() and rank.isdecimal()):
        raise ValueError(
            f"WORLD_SIZE = {count} and RANK = {rank or 'unset'}: torchrun sets both to numbers; start kvpo "
            "under torchrun, or unset WORLD_SIZE"
        )
    return int(count) > 1


def fresh_part(store: dist.Store, rank: int, count: int, patience: timedelta) -> dist.Store:
    """Return a part of a store that only the current ranks have written to, once all of them have arrived.

    torchrun keeps one store for a run and all its restarts, in which killed ranks have left the addresses at
    which they listened. Every rank therefore announces itself under a unique name, and rank 0 answers each
    name with the name of the part until all have confirmed it; it answers again when a current rank replaces
    a stale one. Raises LostRank if a rank does not arrive within ``patience``.
    """
    name, until, missing = uuid4().hex, time.monotonic() + patience.total_seconds(), list(range(1, count))
    if rank:
        store.set(f"here/{rank}", name)
        missing = [0]
    while missing:
        if time.monotonic() > until:
            raise LostRank(f"rank {missing[0]} did not come within {patience}; look at its own first error")
        if rank and store.check([f"part/{name}"]):
            name, missing = store.get(f"part/{name}").decode(), []
            store.set(f"{name}/{rank}", "")
        elif not rank:
            for other in filter(lambda other: store.check([f"here/{other}"]), missing):
                store.set(f"part/{store.get(f'here/{other}').decode()}", name)
            missing = [other for other in missing if not store.check([f"{name}/{other}"])]
        time.sleep(POLL if missing else 0)  # in Python, so that signals are handled
    return dist.PrefixStore(name, store)


@contextmanager
def _rank_0_leaves_first(store: dist.Store, rank: int, patience: timedelta) -> Iterator[None]:
    """After an error that the ranks have reported, keep the others until rank 0 has left the block.

    torchrun kills all ranks soon after the first one has ended, and rank 0 may have updates to save.
    """
    try:
        yield
    except Exception as error:
        until = time.monotonic() + patience.total_seconds()
        with suppress(RuntimeError):  # the store may be rank 0's own
            while rank and _told(error) and not store.check(["left"]) and time.monotonic() < until:
                time.sleep(POLL)
        raise
    finally:
        if not rank:
            with suppress(RuntimeError):
                store.set("left", "")


@contextmanager
def joined_ranks(
    device: str,
    *,
    sharded: bool = False,
    traces: Path | None = None,
    long: timedelta = LONG,
    short: timedelta = SHORT,
    rendezvous: tuple[dist.Store, int, int] | None = None,
) -> Iterator[Ranks]:
    """Join the ranks that torchrun started together with this process; yields ALONE if it was started alone.

    Args:
        device: the configuration's; on CUDA, each rank uses the device of its number on its machine.
        sharded: layers are gathered while they run. On NCCL, a lost rank then ends the process through
            torch's watchdog, without LostRank.
        rendezvous: store, rank and number of ranks, in place of torchrun's environment.

    Raises:
        ConfigurationError: the machine has fewer CUDA devices than ranks.
        LostRank: the other ranks do not arrive.
    """
    if not (launched() or rendezvous):
        yield ALONE
        return
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        place, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if place >= there:
            raise ConfigurationError(
                f"device: {device!r} cannot be used by local rank {place}: torch finds {there} CUDA devices "
                "here; start at most one process for each, or use --device cpu"
            )
        torch.cuda.set_device(place)
        if not sharded:  # waiting for each gather of a layer would be slow
            # Read when NCCL's groups are formed: `wait` then raises errors and time-outs of NCCL, in place of
            # a watchdog that aborts the process. Only asynchronous operations can be waited for.
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=long)) if not rendezvous else rendezvous
        own = fresh_part(store, rank, count, long)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=count, timeout=long)
        prompt = dist.new_group(timeout=short, backend="nccl" if on_cuda else "gloo")
    except RuntimeError as error:
        raise LostRank(f"the ranks of this run did not meet: {_line(error)}") from error
    try:
        with _rank_0_leaves_first(own, rank, long), ExitStack() as leaving:
            place = dist.get_rank(), dist.get_world_size()
            yield Ranks(*place, dist.group.WORLD, prompt, traces, leaving=leaving)
    finally:
        dist.destroy_process_group()
