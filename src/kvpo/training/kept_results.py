"""Held-out results of unfinished work, on disk by batch: a process that continues makes what is missing."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from kvpo.files import make_directory, write_atomic
from kvpo.models.tensor_files import FETCH_AGAIN, read_safetensors, storable
from kvpo.rewards.cache import code_version
from kvpo.training.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptResults:
    """A policy's results in a folder. Its owner sees that the settings they were made with stay the same."""

    folder: Path | None = None
    """None: nothing is kept."""
    policy: str = ""
    """Identifies the weights."""
    ranks: Ranks = ALONE
    """All processes that evaluate the policy."""

    def name(self, *asked: object) -> str:
        """Digest of the policy, kvpo's code and what is ``asked``, which must have telling texts."""
        content = json.dumps([self.policy, code_version((".",)), *map(str, asked)])
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def read(self, names: Sequence[str]) -> list[dict[str, Tensor] | None]:
        """Results under each name; None where there are none, or their file is damaged.

        All ranks get what the first one finds: a network file system may show a file to one machine earlier
        than to another, and ranks that share weights must generate the same videos.
        """
        return self.ranks.once("looking for kept results", lambda: [self._read(name) for name in names])

    def _read(self, name: str) -> dict[str, Tensor] | None:
        file = self._file(name)
        if file is None or not file.is_file():
            return None
        try:
            # Copies, because a network file system cannot remove files that are mapped into memory.
            return {field: values.clone() for field, values in read_safetensors(file).items()}
        except ValueError as error:
            logger.warning("%s; its videos are made again", str(error).removesuffix(FETCH_AGAIN))
            return None

    def write(self, name: str, results: Mapping[str, Tensor]) -> None:
        """Keep results in one step. Raises StorageError."""
        if (file := self._file(name)) is not None:
            make_directory(file.parent)
            write_atomic(file, save(storable(results)))

    def remove(self) -> None:
        """Remove the results of all policies from the folder."""
        for file in self.folder.glob("*.safetensors") if self.folder is not None else ():
            file.unlink()

    def _file(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.safetensors"


NOTHING_KEPT = KeptResults()
