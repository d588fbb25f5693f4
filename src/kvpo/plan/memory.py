"""The memory of a run in bytes, computed from its settings alone for `kvpo plan`.

Pages come from the functions that size the caches (`kvpo.engine.pages`) and parameters from the transformer
on the meta device, so neither can differ from what is allocated. Activations are modelled: what a layer keeps
for its backward pass is linear in tokens and widths, with coefficients fitted to what torch keeps.
"""

from dataclasses import dataclass

from kvpo.config import Config
from kvpo.engine.generator import StreamingGenerator
from kvpo.engine.pages import stream_pages
from kvpo.models.adapters import target_layers
from kvpo.models.causal_wan import CausalWan
from kvpo.plan.replays import Replays
from kvpo.training.evaluation import ROWS

BACKWARD = 0.65
"""Memory of a layer's backward pass as a share of what the layer kept for it."""
FORWARD = 2.1
"""Memory of a forward pass without gradient as a multiple of what its largest layer would keep."""


@dataclass(frozen=True)
class Kept:
    """Bytes that a layer keeps for its backward pass, per token and unit of each width."""

    width: float
    ffn: float
    rank: float
    keys: float
    """Per token that is attended to, including the context."""


KEPT = {
    ("lora", "none"): Kept(52.3, 8.0, 0.0, 8.0),
    ("lora", "bfloat16"): Kept(26.7, 4.0, 16.0, 4.0),
    ("full", "none"): Kept(68.4, 8.0, 0.0, 8.0),
    ("full", "bfloat16"): Kept(80.0, 5.5, 0.0, 8.0),
}


@dataclass(frozen=True)
class Parameters:
    """Parameter counts and bytes of a run's transformer."""

    all: int
    """Parameters of the transformer, without an adapter."""
    trained: int
    frozen_size: int
    """Bytes per frozen parameter; trained ones take 4."""
    adapted: bool
    second_copy: bool
    """True if a copy of the starting policy is kept: all parameters, or only a continued adapter."""
    summed: int = 0
    """Bytes of the weights plus adapter, held during a block; 0 if the adapter is computed beside them."""
    narrowed: int = 0
    """Bytes of the adapter in the weights' precision, held during a block; 0 if it is added to them."""
    quantised: int = 0
    """Bytes of a rollout's 8-bit weights; 0 if they take the place of ``summed``, which is larger."""

    @property
    def weights(self) -> int:
        """Bytes of the transformer's own parameters."""
        return self.all * (self.frozen_size if self.adapted else 4)

    @property
    def adapter(self) -> int:
        """Bytes of the adapter."""
        return 4 * self.trained if self.adapted else 0

    @property
    def reference(self) -> int:
        """Bytes of the starting policy's own copy."""
        return 4 * self.trained if self.second_copy else 0

    @property
    def moments(self) -> int:
        """Bytes of Adam's two moments."""
        return 8 * self.trained

    @property
    def average(self) -> int:
        """Bytes of the moving average."""
        return 4 * self.trained

    @property
    def checkpoint(self) -> int:
        """Bytes on disk: trained parameters, average, moments; the starting policy if all are trained."""
        starting = 0 if self.adapted else self.reference
        return 4 * self.trained + self.average + self.moments + starting


def parameters_of(config: Config, model: CausalWan, frozen_size: int) -> Parameters:
    """Parameters of a configuration; ``model`` has no adapter and may be on the meta device."""
    optim = config.optim
    count = sum(parameter.numel() for parameter in model.parameters())
    adapted = optim.lora_rank > 0
    layers = target_layers(model).values()
    trained = count
    if adapted:
        trained = optim.lora_rank * sum(layer.in_features + layer.out_features for layer in layers)
    summed = narrowed = 0
    if adapted and optim.autocast == "none":
        summed = 4 * sum(layer.weight.numel() for layer in layers)
    elif adapted:
        narrowed = frozen_size * trained
    quantised = 0
    if optim.rollout_precision != "same" and not summed:
        quantised = sum(layer.weight.numel() + 4 * layer.out_features for layer in layers)
    continued = bool(config.backbone.lora) and config.backbone.lora_start == "continue"
    copied = continued or not adapted
    return Parameters(count, trained, frozen_size, adapted, copied, summed, narrowed, quantised)


@dataclass(frozen=True)
class Activations:
    """Bytes of activations that a configuration's transformer holds in a pass."""

    config: Config
    context: int
    """Past frames that a block sees."""

    def layer(self, rows: int, frames: int, context: int) -> float:
        """Bytes that one layer keeps for its backward pass over ``rows`` calls of ``frames`` frames."""
        model, optim = self.config.model, self.config.optim
        kept = KEPT["lora" if optim.lora_rank else "full", optim.autocast]
        per_token = kept.width * model.dim + kept.ffn * model.ffn_dim + kept.rank * optim.lora_rank
        return (
            rows
            * self.config.model.tokens_per_frame
            * (frames * per_token + (frames + context) * kept.keys * model.dim)
        )

    def held(self, rows: int) -> float:
        """Bytes that the whole transformer keeps for the backward pass of ``rows`` states."""
        model, optim, block = self.config.model, self.config.optim, self.config.stream.block
        if not optim.checkpointing:
            return model.num_layers * self.layer(rows, block, self.context)
        size = 2 if optim.lora_rank and optim.autocast == "bfloat16" else 4
        return model.num_layers * rows * block * self.config.model.tokens_per_frame * model.dim * size

    def training(self, rows: int) -> float:
        """Peak bytes of a forward and backward pass over ``rows`` states, without parameter gradients."""
        one = self.layer(rows, self.config.stream.block, self.context)
        return self.held(rows) + (BACKWARD + self.config.optim.checkpointing) * one

    def inference(self, rows: int, frames: int, context: int) -> float:
        """Peak bytes of a forward pass over ``rows`` calls without gradients."""
        return FORWARD * self.layer(rows, frames, context)


def block_bytes(config: Config) -> int:
    """Bytes of a block's latents in float32."""
    model = config.model
    return 4 * config.stream.block * model.channels * model.latent_height * model.latent_width


def trajectory_bytes(config: Config, replays: Replays) -> float:
    """Bytes of the states and velocities that members of a rollout's groups visited in the window."""
    members = config.exploration.branches + 1
    visited = 2 * members * replays.blocks * replays.kept_steps
    return config.optim.prompts_per_update * visited * block_bytes(config)


def clean_bytes(config: Config, fork: int) -> float:
    """Bytes of the clean latents of a rollout's groups: the members' own blocks, and the roots'."""
    exploration = config.exploration
    own = (exploration.branches + 1) * (exploration.blocks + exploration.tail_blocks)
    return config.optim.prompts_per_update * (own + fork / config.stream.block) * block_bytes(config)


def evidence_bytes(config: Config, replays: Replays) -> float:
    """Bytes of a rollout's lessons: the states of every trajectory, the targets of every row of the table."""
    visited = (replays.trajectories + replays.rows) * replays.blocks * replays.steps
    return config.optim.prompts_per_update * visited * block_bytes(config)


def answer_bytes(config: Config, replays: Replays) -> float:
    """Bytes that replays add for groups replayed together: teachers' targets, two policies' velocities."""
    groups = -(-replays.together // replays.trajectories)
    visited = (2 * replays.trajectories + replays.rows) * replays.blocks * replays.steps
    return groups * visited * block_bytes(config)


def evaluation_pages(config: Config, generator: StreamingGenerator, frames: int, *, switches: bool) -> int:
    """Pages of held-out videos that are streamed together."""
    held_out = config.evaluation
    rows = config.exploration.rows or min(ROWS, max(held_out.validation_prompts, held_out.test_prompts))
    return rows * stream_pages(generator, frames, switches=switches)
