"""Named starting points: each function returns a whole configuration.

The sizes and schedules of the public models are those of their released checkpoints; their training
settings are the ones reported for them (docs/method.md, "Settings reported for the 1.3B models").
"""

from collections.abc import Callable
from dataclasses import replace

from kvpo.config import (
    BackboneConfig,
    Config,
    EvaluationConfig,
    ExplorationConfig,
    ObjectiveConfig,
    OptimConfig,
    PromptsConfig,
    RewardConfig,
    StreamConfig,
)
from kvpo.method.settings import KvpoSettings

TEXT_AND_PIXELS = "Wan-AI/Wan2.1-T2V-1.3B"
"""Hub repository of Wan 2.1, whose text encoder and VAE all its descendants share."""


def demo() -> Config:
    """The embedded world on two CPU cores: the defaults of every field."""
    return Config()


def longlive_1_3b() -> Config:
    """LongLive 1.3B: three sink frames and a window of twelve."""
    return Config(
        preset="longlive-1.3b",
        device="cuda",
        backbone=BackboneConfig(kind="wan", geometry="1.3b", encoders=TEXT_AND_PIXELS),
        prompts=PromptsConfig(frames=(147,)),
        stream=StreamConfig(
            size=(60, 104),
            block=3,
            window=12,
            sink=3,
            keep_sink_at_switch=True,
            schedule=(1.0, 0.75, 0.5, 0.25),
            shift=5.0,
            step_rule="renoise",
        ),
        exploration=ExplorationConfig(
            branches=8, blocks=5, recent=3, routed=3, distinct=3, resident_frames=33, tail_blocks=6, rows=1
        ),
        # At a temperature of 1 the surrogate policy is nearly uniform, so the reported KL weight of 10 and
        # the clipping have little effect. With a calibrated temperature (none), lower the KL weight below 1.
        kvpo=KvpoSettings(simplex_kl=10.0),
        objective=ObjectiveConfig(
            grad_steps=2,
            velocity_kl=0.0,
            advantages="anchor",
            keep=(0, 0),
            temperature=1.0,
        ),
        optim=OptimConfig(
            lora_rank=256,
            lr=1e-5,
            ema_decay=0.999,
            updates=1500,
            prompts_per_update=4,  # the most that fits an 80 GB card together with HPSv3
            rollouts_per_refresh=2,
            replay_rows=1,
            checkpointing=True,
            autocast="bfloat16",
        ),
        # HPSv3's noise floor is unknown: runs warn until `kvpo calibrate` has measured it.
        rewards=RewardConfig(scorers=("hpsv3",)),
        # Held-out videos are long: as many as in the demo would take longer than the updates.
        evaluation=EvaluationConfig(every=100, validation_prompts=8, test_prompts=32),
    )


def memflow_1_3b() -> Config:
    """MemFlow 1.3B: as LongLive, with a memory bank of three frames in addition to sink and window."""
    base = longlive_1_3b()
    return replace(base, preset="memflow-1.3b", stream=replace(base.stream, bank=("memflow",)))


def self_forcing_1_3b() -> Config:
    """Self-Forcing 1.3B: no sink, every earlier frame visible, videos of 21 latent frames."""
    base = longlive_1_3b()
    return replace(
        base,
        preset="self-forcing-1.3b",
        prompts=replace(base.prompts, frames=(21,)),
        stream=replace(base.stream, window=-1, sink=0),
        exploration=replace(base.exploration, blocks=2, resident_frames=0, tail_blocks=1),
    )


def wan_14b() -> Config:
    """The 14B geometry of Wan 2.1, streamed as LongLive does."""
    base = longlive_1_3b()
    return replace(base, preset="wan-14b", backbone=replace(base.backbone, geometry="14b"))


PRESETS: dict[str, Callable[[], Config]] = {
    "demo": demo,
    "longlive-1.3b": longlive_1_3b,
    "memflow-1.3b": memflow_1_3b,
    "self-forcing-1.3b": self_forcing_1_3b,
    "wan-14b": wan_14b,
}
