"""Each method's own settings, as frozen dataclasses. Importing this module imports nothing heavy.

Settings that several methods share (clip, temperature, which branches train, the velocity KL) are in
``kvpo.config``.
"""

from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeVar


class OwnSettings:
    """Settings of one method."""

    EXPLORERS: ClassVar[tuple[str, ...]]
    """The explorers that the method can learn from, its default first."""
    STARTS_FROM: ClassVar[dict[str, object]] = {}
    """Defaults of the method that replace the preset's values."""


Own = TypeVar("Own", bound=OwnSettings)


@dataclass(frozen=True)
class MethodSettings(Generic[Own]):
    """All settings that a method reads: its own section, and those it shares with others."""

    own: Own
    clip: tuple[float, float] = (0.1, 0.2)
    """(low, high): the ratio is clipped to [1 - low, 1 + high]."""
    temperature: float | None = None
    """Gibbs temperature; None calibrates it to the spread of each group's energies."""
    steps: int = 2
    """Number of leading solver steps to train on."""


@dataclass(frozen=True)
class KvpoSettings(OwnSettings):
    """KVPO: a Gibbs policy over Trajectory Velocity Energies."""

    EXPLORERS = ("routes",)

    anchor_share: float = 0.0
    """Probability of the anchor in the policy's pool, which sets the temperature; 0 leaves the anchor out."""
    simplex_kl: float = 0.0
    """Weight of the KL on the branch simplex to the starting policy (the public code uses 10)."""
    anchor_state_weight: float = 0.0
    """Share of the anchor-state energy (an extension beyond the paper); 0 is the paper's energy."""


@dataclass(frozen=True)
class LatentDistanceSettings(OwnSettings):
    """A Gibbs policy over distances between clean latents: the paper's geometric ablation, and AR-CoPO."""

    EXPLORERS = ("routes", "neighbour", "fresh")
    STARTS_FROM = {"objective.temperature": None}

    space: Literal["velocity", "latent"] = "latent"
    """Distance between velocities at the anchor's states, or between the clean latents they lead to."""


@dataclass(frozen=True)
class FlowGrpoSettings(OwnSettings):
    """Flow-GRPO: stochastic solver steps as Gaussian policies."""

    EXPLORERS = ("sde",)
    STARTS_FROM = {"exploration.noise": 0.7, "objective.clip": (0.2, 0.2)}


@dataclass(frozen=True)
class CmGrpoSettings(OwnSettings):
    """CM-GRPO: the re-noising step of a few-step sampler as a Gaussian policy."""

    EXPLORERS = ("renoise",)
    STARTS_FROM = {"stream.step_rule": "renoise", "objective.clip": (0.2, 0.2)}


MATCHING_KL = 0.1
"""Weight of the velocity KL for rewarded methods with a squared velocity distance as loss. Gibbs policies
divide energies by a temperature of about a hundredth of them; their KL weight would freeze these methods."""


@dataclass(frozen=True)
class NftSettings(OwnSettings):
    """DiffusionNFT: forward-process matching toward rewarded and away from unrewarded clips."""

    EXPLORERS = ("fresh", "neighbour", "routes")
    STARTS_FROM = {"objective.velocity_kl": MATCHING_KL}

    beta: float = 1.0
    """Mixing weight of the policy in its implicit positive and negative velocities; small: large steps."""
    old: Literal["rollout", "average"] = "rollout"
    """Old policy: the one that generated the rollout, or the moving average of the trained parameters."""
    selective_kl: float = 0.0
    """Share of the branches overrated by the first reward that the velocity KL is limited to (Astrolabe); 0
    applies it to the anchor, as in every other method."""


@dataclass(frozen=True)
class RvmSettings(OwnSettings):
    """Advantage-weighted matching with one advantage scale for the whole collection (RVM)."""

    EXPLORERS = ("fresh", "neighbour", "routes")
    STARTS_FROM = {"objective.velocity_kl": MATCHING_KL, "objective.scale": "collection"}


@dataclass(frozen=True)
class SelfDistillSettings(OwnSettings):
    """Self-distillation: the anchor's velocities toward those under the branches' routes, no reward."""

    EXPLORERS = ("routes",)
    STARTS_FROM = {"exploration.donor": 0}
