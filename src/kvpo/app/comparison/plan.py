"""A comparison as requested, and the files that hold the results of its pieces."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvpo.app.comparison.arms import TrainingArm, trials
from kvpo.app.configuration import flat
from kvpo.app.taken import PLAN
from kvpo.config import Config
from kvpo.files import read_json


@dataclass(frozen=True)
class MethodComparison:
    """The requested arms, seeds and budget, and the directory of the results."""

    start: Config
    arms: Sequence[TrainingArm]
    seeds: int
    budget_cpu_s: float
    trials: int
    out: Path
    split: str = "final"
    """Prompts that runs are measured on: ``final``, or ``validation`` to choose among arms."""

    @property
    def plan_file(self) -> Path:
        """File that describes the comparison."""
        return self.out / PLAN

    def result_file(self, piece: str) -> Path:
        """File of a piece's result."""
        return self.out / "pieces" / f"{piece}.json"

    def result(self, piece: str) -> dict[str, Any]:
        """The result of a finished piece. Raises ValueError if it was damaged."""
        path, way_out = self.result_file(piece), "remove it, and the same command makes it again"
        try:
            found = read_json(path)
        except ValueError as error:
            raise ValueError(f"{error}; {way_out}") from error
        if not isinstance(found, dict) or not {"results", "gain", "failed"} & found.keys():
            raise ValueError(f"{path} is not the result of a piece of a comparison; {way_out}")
        return found

    def commits(self) -> list[str]:
        """The commits at which results were made, starting with the comparison's first."""
        begun, files = read_json(self.plan_file)["commit"], sorted((self.out / "pieces").glob("*.json"))
        return list(dict.fromkeys([begun, *(self.result(path.stem).get("commit", begun) for path in files)]))

    def trials_of(self, method: str) -> list[dict[str, Any]]:
        """Settings of the trials of a method; empty if the plain method is not among the arms."""
        own = [arm for arm in self.arms if arm.tuned and arm.method == method]
        return trials(self.start, own[0], self.trials) if own and self.trials else []

    def tuned(self, method: str) -> dict[str, Any]:
        """The settings of the method's best trial; empty, for its defaults, if there is none."""
        gains = [
            (self.result(f"trial-{method}-{n}")["gain"], settings)
            for n, settings in enumerate(self.trials_of(method))
        ]
        found = [(gain, settings) for gain, settings in gains if gain is not None]
        return max(found, key=lambda trial: trial[0])[1] if found else {}

    def base_of(self, config: Config) -> str:
        """Name of the base under a configuration's stream settings; an arm is compared with its own base."""
        here, asked = vars(self.start.stream), vars(config.stream)
        changes = [f"{name}-{value}" for name, value in asked.items() if here[name] != value]
        return "-".join(["base", *("".join(c for c in text if c.isalnum() or c in "-.") for text in changes)])


def changed_settings(start: Config, config: Config) -> dict[str, Any]:
    """Settings by dotted path in which a run differs from the comparison's, except seed and length."""
    before, after = (flat(asdict(one)) for one in (start, config))
    own = {"seed", "threads", "optim.updates", "evaluation.every"}
    return {path: value for path, value in after.items() if before[path] != value and path not in own}
