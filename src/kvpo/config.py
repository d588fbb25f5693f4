"""Every setting of a run, as frozen dataclasses. Importing this module imports nothing heavy."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from kvpo.method.settings import (
    CmGrpoSettings,
    FlowGrpoSettings,
    KvpoSettings,
    LatentDistanceSettings,
    MethodSettings,
    NftSettings,
    OwnSettings,
    RvmSettings,
    SelfDistillSettings,
)
from kvpo.models.geometry import geometry
from kvpo.models.settings import Deployment, WanShape

WORLD_NOISE_FLOOR = 0.002
"""Noise floor of the embedded world's rewards. `kvpo calibrate world` finds more, because it also re-encodes
and shifts clips, which never happens to the world's own pixels."""
BANK_FRAMES = 3
"""Frames of MemFlow's memory bank in every released configuration."""
TOTAL = "total"
"""Key of the weighted sum of all components among ``noise_floors``."""


@dataclass(frozen=True)
class BackboneConfig:
    """The generator, and the files of a public one: local paths, or hub ids owner/name/file."""

    kind: Literal["world", "wan"] = "world"
    """The embedded generator that ships with the package, or a public Wan generator."""
    geometry: str = "world"
    """Sizes of the transformer: world, 1.3b, 1.3b-relative, 14b, or a JSON file or model folder of your own
    with the fields of diffusers' transformer/config.json."""
    checkpoint: str = ""
    """Transformer weights, FILE or FILE#ENTRY: a .pt (ENTRY such as generator_ema; without: the first of
    generator, generator_ema, model), .safetensors or diffusers directory. For the embedded generator, a file
    that `kvpo pretrain` wrote; empty: the one that ships with the package. `kvpo pretrain` starts from it."""
    lora: str = ""
    """Adapter that belongs to the checkpoint (LongLive's and MemFlow's lora.pt), FILE or FILE#ENTRY (without:
    generator_lora; #ema is the moving average of a KVPO checkpoint); empty: none."""
    lora_start: Literal["continue", "merge"] = "continue"
    """Continue training the given adapter, or merge it into the weights and train a fresh one."""
    encoders: str = ""
    """Text encoder with its tokenizer, and VAE: the folder or hub id of a Wan 2.1 model, in Wan's or
    diffusers' layout."""
    offload: bool = False
    """Keep VAE and reward models in host memory and move them to the device only to decode and to score."""
    vae_precision: Literal["float32", "bfloat16"] = "float32"
    """Precision that videos are decoded in; bfloat16 halves the memory and changes pixels slightly."""

    @property
    def from_files(self) -> bool:
        """True if weights and prompts come from files; the embedded world has its own."""
        return self.kind != "world"


@dataclass(frozen=True)
class PromptsConfig:
    """Prompts from a file; without one, the embedded world writes its own."""

    file: str = ""
    """Prompts of any form: .txt, .jsonl, .json, .csv or .tsv (docs/evaluation.md); a path or a hub id."""
    frames: tuple[int, ...] = (147,)
    """Latent frames at which the prompts of a line end, unless the line sets its own: 39,75,147 for three
    prompts. The last is the video's length; the embedded world makes 30 frames if this is left at 147."""

    @property
    def switches(self) -> tuple[int, ...]:
        """Latent frames at which the prompts of a line switch."""
        return self.frames[:-1]

    @property
    def num_frames(self) -> int:
        """Latent frames of a video."""
        return self.frames[-1]


@dataclass(frozen=True)
class StreamConfig:
    """Streaming: block size, what a block sees, the solver's noise levels."""

    block: int = 3
    """Latent frames generated together."""
    window: int = 12
    """Frames a block attends to, counting the sink and itself; -1 means all earlier frames."""
    sink: int = 3
    """First frames that are always attended to."""
    keep_sink_at_switch: bool = True
    """At a prompt switch, keep the sink's old keys (True) or replace the sink by re-encoded recent frames."""
    bank: tuple[Literal["memflow", "every-block", "sparse"], ...] = ()
    """MemFlow's memory bank of three frames: memflow records every third block, or with every-block all of
    them (its single-prompt pipeline); sparse attends to the top three frames of sink and bank per head."""
    transition_blocks: int = 0
    """Blocks after a prompt switch over which the text embedding moves linearly to the new prompt's: block k
    of n has k / (n + 1) of it; 0 switches at once."""
    size: tuple[int, int] = (8, 8)
    """Rows and columns of the latents; a Wan VAE decodes each to eight pixels."""
    schedule: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    """Solver positions u in (0, 1]; noise level sigma = shift u / (1 + (shift - 1) u)."""
    schedule_first: tuple[float, ...] = ()
    """Solver positions of the first block, where few-step models may take more steps; empty: schedule."""
    shift: float = 3.0
    """Timestep shift of the schedule."""
    step_rule: Literal["ode", "renoise"] = "ode"
    """Euler on the velocity field, or re-noising from the tape (Self-Forcing, LongLive, MemFlow)."""

    @property
    def deployment(self) -> Deployment:
        """The context that a stream is deployed with."""
        return Deployment(
            block=self.block,
            window=self.window,
            sink=self.sink,
            keep_sink_at_switch=self.keep_sink_at_switch,
            bank_size=BANK_FRAMES if self.bank else 0,
            sparse_activation="sparse" in self.bank,
            bank_every_block="every-block" in self.bank,
            transition_blocks=self.transition_blocks,
        )


@dataclass(frozen=True)
class ExplorationConfig:
    """Branches of a fork; counts of history are counts of past frames."""

    explorer: Literal["routes", "fresh", "neighbour", "sde", "renoise"] = "routes"
    """Kind of branches: routed history, fresh or neighbouring noise, stochastic steps, re-noising."""
    noise: float = 0.5
    """Share of a neighbour's own noise in (0, 1], or strength of the stochastic solver steps."""
    branches: int = 8
    """Routed branches per group (G)."""
    blocks: int = 2
    """Consecutive blocks generated with routed history (P)."""
    recent: int = 3
    """Most recent past frames every branch keeps."""
    routed: int = 6
    """Local slots filled from older history."""
    distinct: int = 2
    """Distinct routed frames per branch; fewer than `routed` repeats them (concentrated routes)."""
    donor: int = 0
    """Number of distinct routed frames that come from another prompt's history (0 is the paper's method)."""
    resident_frames: int = 33
    """History frames that may be routed, counting the sink; 0: all."""
    tail_blocks: int = 2
    """Deployment blocks after the window for the global signal; late forks get less."""
    rows: int = 36
    """Streams batched in one forward pass. If a whole group fits, passes hold whole groups, which then go to
    one rank together. 0 means all branches of all prompts of a rank; the number of ranks then changes the
    rounding."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Settings that methods share: solver steps, advantages, branches that train, ratio, temperature, KL."""

    grad_steps: int = 2
    """Number of leading solver steps to train on."""
    velocity_kl: float = 10.0
    """Weight of the mean squared velocity difference to the starting policy on anchor states."""
    advantages: Literal["anchor", "group", "random", "flipped"] = "group"
    """Relative to the anchor, centred on the group, or controls: the group's, permuted or negated."""
    scale: Literal["group", "collection"] = "group"
    """Reward spread that advantages are divided by: each group's own, or that of all groups collected
    together, which gives little weight to groups with nearly equal branches."""
    keep: tuple[int, int] = (2, 2)
    """Train on this many best and this many worst branches; 0,0: on all of them."""
    clip: tuple[float, float] = (0.1, 0.2)
    """LOW,HIGH: ratios are clipped to [1 - LOW, 1 + HIGH] (every method but nft, rvm and self-distill). They
    are exactly 1 in the first step after a rollout, hence always where inner_epochs and rollouts_per_refresh
    are 1."""
    temperature: float | None = None
    """Gibbs temperature of kvpo and latent-distance; none calibrates it to each group's energies."""


@dataclass(frozen=True)
class OptimConfig:
    """Trained parameters and their optimiser."""

    lora_rank: int = 16
    """Rank of the LoRA adapter that is trained, on every linear layer of a block; 0 trains all parameters."""
    lr: float = 1e-3
    """Peak learning rate of AdamW, reached in the fifth update."""
    ema_decay: float = 0.9
    """Decay of the moving average of the trained parameters, which is evaluated and exported. After n updates
    it is at most (1 + n) / (10 + n); 0 keeps no average."""
    updates: int = 40
    """Optimiser updates."""
    prompts_per_update: int = 8
    """Groups (prompts) per update."""
    inner_epochs: int = 1
    """Passes over each rollout."""
    rollouts_per_refresh: int = 1
    """Rollouts collected with one rollout policy before it is refreshed."""
    replay_rows: int = 0
    """Rows batched in one replay forward pass, at least one block's; 0 means all of a group's."""
    checkpointing: bool = False
    """Activation checkpointing in the replay."""
    compile: bool = False
    """Compile the transformer's layers (torch.compile); results change only by rounding."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Autocast of the forward passes; master weights stay float32."""
    rollout_precision: Literal["same", "int8", "fp8"] = "same"
    """Precision of the transformer blocks' matrix products in training rollouts: same as everywhere else, or
    8 bits (fp8: on Ada, Hopper and newer GPUs; slow on CPUs). Nothing else in a run is quantised."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation: fixed prompts, fixed tapes, base against aligned."""

    every: int = 10
    """Updates between validations; 0 validates only at the end."""
    validation_prompts: int = 24
    """Short and long prompts each, for choosing the best checkpoint."""
    test_prompts: int = 128
    """Short and long prompts each, used once, for summary.json."""
    watchers: tuple[str, ...] = ()
    """Rewards that watch for hacking and are never trained on; named like training rewards."""
    stop_on_hacking: bool = True
    """Stop once a watcher keeps falling while the trained reward rises, and keep the best from before."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints kept on disk."""

    every: int = 10
    """Updates between checkpoints; the last two are kept, in addition to the best one."""


@dataclass(frozen=True)
class DistributedConfig:
    """Distribution of a run over torchrun's ranks. On one kind of CPU, results are the same bit for bit for
    any number of ranks, while exploration.rows is not 0 and branch_ranks is 1; on GPUs up to rounding."""

    branch_ranks: int = 1
    """Ranks that divide the branches of each group among them, rounded down to a divisor of the number of
    ranks. On a CPU, the run is the same bit for bit if exploration.rows and optim.replay_rows leave one
    trajectory per pass."""
    shard: bool = False
    """Shard weights, gradients and optimiser over the branch_ranks of a group (FSDP2)."""


@dataclass(frozen=True)
class RewardConfig:
    """Rewards that score the clips of a run, and the weights of their components."""

    scorers: tuple[str, ...] = ("world",)
    """Rewards used together: ids of the catalogue, "world", `package.module:function` of your own, one
    learned from votes as `preference:FILE`, any of these on a server as `NAME@http://HOST:PORT`, or on
    several as `NAME@http://A:PORT,http://B:PORT`, or a judge with a rubric as `NAME@openai:URL#MODEL`."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weights of components; by default 1 each, and the embedded world's own."""
    sources: dict[str, str] = field(default_factory=dict)
    """Paths or hub ids for parts of catalogue rewards, including watchers: hpsv3.base=/models/Qwen2-VL-7B."""
    top_share: float = 1.0
    """Share of a clip's frames, the best ones, that rewards of single frames average (Astrolabe: 0.3)."""
    transition_blocks: int = 0
    """Blocks on either side of a prompt switch that form an extra clip of the global signal; 0: no clips."""
    fusion: Literal["advantages", "rewards", "selective", "reversing"] = "advantages"
    """advantages: normalise components one by one, then add; rewards: add, then normalise; selective: as
    advantages, but withhold what only the first component praises; reversing: count it against the branch."""
    noise_floors: dict[str, float] = field(default_factory=dict)
    """Noise floors of components: a number, or a file of `kvpo calibrate` that is read once. total is the
    floor of the weighted sum, and of components without a floor of their own (0.002)."""
    ranks: int = 0
    """Number of ranks, from the first, that load the rewards; the others send them their clips. 0: all."""
    cache: str = ""
    """Directory that caches scores by clip content; several runs may share it."""


@dataclass(frozen=True)
class Config:
    """A whole run. The resolved values are saved as config.yaml in the run directory."""

    preset: str = "demo"
    """Name of the preset these values started from."""
    method: Literal["kvpo", "latent-distance", "flow-grpo", "cm-grpo", "nft", "rvm", "self-distill"] = "kvpo"
    """Method by which the policy learns from the branches of a fork; each method has a section of its own."""
    seed: int = 0
    """Seed of every random draw of the run."""
    device: str = "cpu"
    """Torch device."""
    threads: int = 0
    """Torch threads on the CPU; 0: one if the device is the CPU, else torch's default."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    exploration: ExplorationConfig = field(default_factory=ExplorationConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    kvpo: KvpoSettings = field(default_factory=KvpoSettings)
    latent_distance: LatentDistanceSettings = field(default_factory=LatentDistanceSettings)
    flow_grpo: FlowGrpoSettings = field(default_factory=FlowGrpoSettings)
    cm_grpo: CmGrpoSettings = field(default_factory=CmGrpoSettings)
    nft: NftSettings = field(default_factory=NftSettings)
    rvm: RvmSettings = field(default_factory=RvmSettings)
    self_distill: SelfDistillSettings = field(default_factory=SelfDistillSettings)
    optim: OptimConfig = field(default_factory=OptimConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def on_cpu(self) -> bool:
        """True if the device is the CPU, as "cpu" or "cpu:0"."""
        return self.device.partition(":")[0] == "cpu"

    @cached_property
    def model(self) -> WanShape:
        """Geometry of the transformer on latents of this size. Raises ValueError if there is none."""
        height, width = self.stream.size
        return replace(geometry(self.backbone.geometry), latent_height=height, latent_width=width)

    @property
    def own_settings(self) -> OwnSettings:
        """The section of the chosen method."""
        own: OwnSettings = vars(self)[self.method.replace("-", "_")]
        return own

    @property
    def method_settings(self) -> MethodSettings[Any]:
        """All settings that the chosen method reads."""
        objective = self.objective
        return MethodSettings(self.own_settings, objective.clip, objective.temperature, objective.grad_steps)
