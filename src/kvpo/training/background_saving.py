"""Background checkpointing of sharded weights, by one thread on each rank of the first team.

The threads write a copy in host memory and communicate through their own process group, so training never
waits for a disk. A checkpoint exists only once all of its parts are written; see `kvpo.training.checkpoint`.
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from kvpo.engine.background import in_background
from kvpo.files import storage_error
from kvpo.training.checkpoint import save_checkpoint
from kvpo.training.ranks import LONG, Ranks
from kvpo.training.sharding import SAVING, write_parts
from kvpo.training.trainer import Trainer, architecture

logger = logging.getLogger(__name__)
IN_THIS_THREAD = StagingOptions(False, False, False, False)
"""Copies are complete when the call returns, in memory that is neither pinned nor shared."""


class BackgroundSaving:
    """Saves a trainer with sharded weights, one checkpoint at a time; all ranks must call it together."""

    def __init__(self, trainer: Trainer) -> None:
        ranks, team = trainer.setup.ranks, trainer.teams.team
        self.trainer, self.ranks = trainer, ranks
        group = dist.new_group(list(range(team.count)), timeout=LONG, backend="gloo")  # the first team
        self.writers = Ranks(team.rank, team.count, group, traces=ranks.traces)
        self.submit = ranks.leaving.enter_context(in_background())
        self.under_way: tuple[int, Future[None] | None] | None = None
        """The update being saved, and the future of this rank's write (None if it writes nothing)."""

    def begin(self, directory: Path, state: Mapping[str, Any], then: Callable[[], None]) -> None:
        """Copy the trainer's state and start writing it to ``directory`` together with ``state``.

        The first rank calls ``then`` once the checkpoint is complete. The previous save must be settled.
        """
        trainer, writing = self.trainer, None
        with self.ranks.together(SAVING):
            if trainer.teams.index == 0:
                tensors, own = trainer.tensors_and_state()
                stager = DefaultStager(IN_THIS_THREAD)
                copies = stager.stage(tensors)
                stager.close()
                assert isinstance(copies, dict)
                writing = partial(self._write, directory, copies, {**own, **state}, then)
        self.under_way = trainer.update, writing and self.submit(writing)

    def settle(self, *, wait: bool) -> int | None:
        """Return the update that was being saved if its checkpoint is complete, else None.

        ``wait`` blocks until it is complete. If a rank failed to write, it raises its own error and the other
        ranks raise RankError.
        """
        if self.under_way is None:
            return None
        update, writing = self.under_way
        ended = writing is not None and writing.done()
        if not wait and not self.ranks.any(ended, SAVING):
            return None
        try:
            with self.ranks.together(SAVING):
                if writing is not None:
                    writing.result()
        except Exception:  # after a signal the write goes on, and `settle_alone` waits for it
            self.under_way = None
            raise
        self.under_way = None
        return update

    def settle_alone(self) -> int | None:
        """Settle after an error, without communicating with other ranks; a failed write is only a warning."""
        if self.under_way is None:
            return None
        update, writing = self.under_way
        failure = writing and writing.exception()
        if failure is not None:
            logger.warning("update %d was not saved: %s", update, failure)
        return update if failure is None else None

    def _write(
        self, folder: Path, copies: Mapping[str, Tensor], state: Mapping[str, Any], then: Callable[[], None]
    ) -> None:
        update, kind = state["update"], architecture(self.trainer.setup.backbone.weights)
        with self.writers.together(SAVING):
            if self.writers.main:
                save_checkpoint(folder, update, copies, state, architecture=kind, write=self._write_parts)
                then()
                return
            try:
                self._write_parts(copies, folder)  # into the first rank's directory
            except OSError as error:
                raise storage_error(folder, error) from error

    def _write_parts(self, copies: Mapping[str, Tensor], file: Path) -> None:
        write_parts(copies, self.writers.gather(file, SAVING)[0], self.writers)
