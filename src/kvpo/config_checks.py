"""Checks across the settings of a run; types are checked where settings are read."""

from math import comb, inf

from kvpo.config import (
    BackboneConfig,
    Config,
    ExplorationConfig,
    ObjectiveConfig,
    OptimConfig,
    PromptsConfig,
    RewardConfig,
    StreamConfig,
)
from kvpo.prompts import VideoPrompt, check_shown

MOST_THREADS = 1024
"""Upper limit of ``threads``: more than a machine has cores, well below where torch crashes."""


class ConfigurationError(ValueError):
    """A setting is invalid; the message is one line that names it."""


def check(config: Config) -> None:
    """Raise ConfigurationError for the first setting that is out of range or contradicts another."""
    _backbone(config.backbone, config.optim)
    try:
        config.model.check()
        config.stream.deployment.check()
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    _stream(config.stream)
    if config.backbone.from_files or config.prompts != PromptsConfig():
        _prompts(config.prompts, config.stream)
    _exploration(config.exploration, config.stream, config.optim)
    _objective(config.objective, config.exploration, config.stream)
    _method(config)
    _optim(config.optim)
    _rewards(config.rewards)
    _distributed(config)
    _require(0 <= config.threads <= MOST_THREADS, "threads", config.threads, f"0 to {MOST_THREADS}")
    evaluation, checkpoint = config.evaluation, config.checkpoint
    _require(evaluation.every >= 0, "evaluation.every", evaluation.every, "0 or more")
    for name in ("validation_prompts", "test_prompts"):
        count = vars(evaluation)[name]
        _require(count >= 2, f"evaluation.{name}", count, "at least 2: a standard error needs two")
    _hacking(config)
    _require(checkpoint.every >= 1, "checkpoint.every", checkpoint.every, "at least 1")


def _require(holds: bool, path: str, value: object, what: str) -> None:
    if not holds:
        raise ConfigurationError(f"{path}: must be {what}, got {value}")


def _hacking(config: Config) -> None:
    evaluation = config.evaluation
    # A reward is the same one whichever server it runs on.
    scorers = {name.partition("@")[0] for name in config.rewards.scorers}
    trained = [name for name in evaluation.watchers if name.partition("@")[0] in scorers]
    _require(not trained, "evaluation.watchers", ", ".join(trained), "rewards that are not trained on")
    names = ", ".join(evaluation.watchers)
    _require(
        len(set(evaluation.watchers)) == len(evaluation.watchers),
        "evaluation.watchers", names, "each named once",
    )  # fmt: skip


def _backbone(backbone: BackboneConfig, optim: OptimConfig) -> None:
    given = [name for name in ("lora", "encoders", "offload") if vars(backbone)[name]]
    _require(
        backbone.from_files or not given,
        "backbone.kind", backbone.kind,
        f"wan for backbone.{given[0] if given else ''} to be used; a preset such as longlive-1.3b sets it",
    )  # fmt: skip
    precision = backbone.vae_precision
    _require(
        backbone.from_files or precision == "float32",
        "backbone.vae_precision", precision, "float32 for the embedded world, which has no VAE",
    )  # fmt: skip
    _require(
        optim.lora_rank > 0 or not backbone.lora or backbone.lora_start == "merge",
        "backbone.lora_start", backbone.lora_start, "merge while optim.lora_rank is 0",
    )  # fmt: skip


def _prompts(prompts: PromptsConfig, stream: StreamConfig) -> None:
    block, frames = stream.block, prompts.frames
    rising = all(a < b for a, b in zip((0, *frames), frames, strict=False))
    _require(bool(frames) and rising, "prompts.frames", list(frames), "frames that rise from above 0")
    _require(
        frames[-1] % block == 0,
        "prompts.frames", list(frames), f"a video of a multiple of stream.block = {block} frames",
    )  # fmt: skip
    try:
        check_shown(VideoPrompt(0, ("",) * len(frames), prompts.switches, prompts.num_frames), block)
    except ValueError as error:
        raise ConfigurationError(f"prompts.frames: {error}") from error


def _stream(stream: StreamConfig) -> None:
    for name, steps in (("schedule", stream.schedule), ("schedule_first", stream.schedule_first)):
        falling = all(a > b for a, b in zip(steps, steps[1:], strict=False))
        _require(
            not steps and name == "schedule_first"
            or bool(steps) and steps[0] == 1.0 and steps[-1] > 0 and falling,
            f"stream.{name}", list(steps), "positions that fall from 1.0 and stay above 0",
        )  # fmt: skip
    _require(
        not stream.bank or "memflow" in stream.bank,
        "stream.bank", ",".join(stream.bank), "memflow, alone or with every-block and sparse",
    )  # fmt: skip
    _require(stream.shift > 0, "stream.shift", stream.shift, "positive")


def _exploration(exploration: ExplorationConfig, stream: StreamConfig, optim: OptimConfig) -> None:
    branches, distinct, donor = exploration.branches, exploration.distinct, exploration.donor
    _require(branches >= 2, "exploration.branches", branches, "at least 2")
    _require(exploration.blocks >= 1, "exploration.blocks", exploration.blocks, "at least 1")
    for name in ("recent", "tail_blocks", "resident_frames", "rows"):
        _require(vars(exploration)[name] >= 0, f"exploration.{name}", vars(exploration)[name], "0 or more")
    _require(exploration.routed >= 1, "exploration.routed", exploration.routed, "at least 1")
    _require(
        1 <= distinct <= exploration.routed,
        "exploration.distinct", distinct, f"between 1 and exploration.routed = {exploration.routed}",
    )  # fmt: skip
    _require(
        0 <= donor <= distinct, "exploration.donor", donor, f"between 0 and exploration.distinct = {distinct}"
    )
    _require(
        donor == 0 or optim.prompts_per_update >= 2,
        "exploration.donor", donor, "0 while optim.prompts_per_update is 1: donors are other prompts",
    )  # fmt: skip
    own = distinct - donor
    if exploration.resident_frames > 0 and own > 0:
        pool = max(0, exploration.resident_frames - stream.sink - exploration.recent)
        _require(
            comb(pool, own) >= branches,
            "exploration.resident_frames", exploration.resident_frames,
            f"larger: {branches} branches need as many sets of {own} routed frames, "
            f"and a pool of {pool} frames has {comb(pool, own)}",
        )  # fmt: skip


def _objective(objective: ObjectiveConfig, exploration: ExplorationConfig, stream: StreamConfig) -> None:
    steps = len(stream.schedule)
    _require(
        1 <= objective.grad_steps <= steps,
        "objective.grad_steps", objective.grad_steps, f"between 1 and the {steps} steps of stream.schedule",
    )  # fmt: skip
    kept, branches, low = list(objective.keep), exploration.branches, objective.clip[0]
    _require(objective.velocity_kl >= 0, "objective.velocity_kl", objective.velocity_kl, "0 or more")
    _require(
        min(kept) >= 0 and sum(kept) <= branches,
        "objective.keep", kept,
        f"two counts that add up to 0 (all) or 2 to exploration.branches = {branches}",
    )  # fmt: skip
    _require(
        0 <= low < 1 and objective.clip[1] >= 0,
        "objective.clip", list(objective.clip), "a number in [0, 1) and one of 0 or more",
    )  # fmt: skip
    temperature = objective.temperature
    _require(
        temperature is None or 0 < temperature < inf,
        "objective.temperature", temperature, "positive and finite, or none",
    )  # fmt: skip


def check_explorer(config: Config, user: str) -> None:
    """Raise ConfigurationError if the settings do not suit the explorer; messages name its ``user``."""
    explorer, noise = config.exploration.explorer, config.exploration.noise
    _require(
        noise > 0 and (explorer != "neighbour" or noise <= 1),
        "exploration.noise", noise, "positive, and at most 1 for neighbouring noise",
    )  # fmt: skip
    rule = {"sde": "ode", "renoise": "renoise"}.get(explorer, config.stream.step_rule)
    _require(
        config.stream.step_rule == rule, "stream.step_rule", config.stream.step_rule, f"{rule} for {user}"
    )
    _require(
        explorer not in ("sde", "renoise") or len(config.stream.schedule) > 1,
        "stream.schedule", list(config.stream.schedule),
        f"two steps or more for {user}: the last one is deterministic and has no policy",
    )  # fmt: skip


def _method(config: Config) -> None:
    explorer, allowed = config.exploration.explorer, config.own_settings.EXPLORERS
    why = (
        ""
        if "routes" != allowed[0] or len(allowed) > 1
        else ": branches of noise have no energy of their own"
    )
    _require(
        explorer in allowed,
        "exploration.explorer", explorer, f"{' or '.join(allowed)} for method {config.method}{why}",
    )  # fmt: skip
    check_explorer(config, f"method {config.method}")
    _require(
        config.method != "self-distill" or config.exploration.donor == 0,
        "exploration.donor", config.exploration.donor, "0 for self-distill, whose teacher sees its own past",
    )  # fmt: skip
    kept = config.objective.keep
    _require(
        sum(kept) != 1 or config.method == "rvm" and kept[0] == 1,
        "objective.keep", list(kept),
        "two branches or more, or 0,0 for all: only rvm can imitate the best one alone (1,0)",
    )  # fmt: skip
    _kvpo(config)
    nft = config.nft
    _require(nft.beta > 0, "nft.beta", nft.beta, "positive")
    _require(0 <= nft.selective_kl <= 1, "nft.selective_kl", nft.selective_kl, "between 0 and 1")


def _kvpo(config: Config) -> None:
    kvpo, objective = config.kvpo, config.objective
    _require(0 <= kvpo.anchor_state_weight <= 1, "kvpo.anchor_state_weight", kvpo.anchor_state_weight,
             "between 0 and 1")  # fmt: skip
    _require(kvpo.simplex_kl >= 0, "kvpo.simplex_kl", kvpo.simplex_kl, "0 or more")
    members = (sum(objective.keep) or config.exploration.branches) + 1
    calibrated = kvpo.anchor_share and objective.temperature is None
    _require(
        kvpo.anchor_share == 0 or 0 < kvpo.anchor_share < 1,
        "kvpo.anchor_share", kvpo.anchor_share, "0 (the anchor is not in the pool) or in (0, 1)",
    )  # fmt: skip
    _require(
        not calibrated or kvpo.anchor_share * members > 1,
        "kvpo.anchor_share", kvpo.anchor_share,
        f"above 1 / {members}, the anchor's share of a uniform policy over its {members} members: no "
        "temperature gives it less",
    )  # fmt: skip


def _optim(optim: OptimConfig) -> None:
    for name in ("prompts_per_update", "inner_epochs", "rollouts_per_refresh"):
        _require(vars(optim)[name] >= 1, f"optim.{name}", vars(optim)[name], "at least 1")
    for name in ("lora_rank", "updates", "replay_rows"):
        _require(vars(optim)[name] >= 0, f"optim.{name}", vars(optim)[name], "0 or more")
    _require(0 < optim.lr < 1e30, "optim.lr", optim.lr, "positive and below 1e30")
    _require(0 <= optim.ema_decay < 1, "optim.ema_decay", optim.ema_decay, "in [0, 1)")


def _distributed(config: Config) -> None:
    ranks, optim = config.distributed.branch_ranks, config.optim
    _require(ranks >= 1, "distributed.branch_ranks", ranks, "at least 1")
    _require(
        ranks > 1 or not config.distributed.shard,
        "distributed.branch_ranks", ranks, "above 1 for distributed.shard: weights are spread over these",
    )  # fmt: skip
    _require(
        not (config.distributed.shard and optim.compile),
        "optim.compile", optim.compile, "false while distributed.shard is true",
    )  # fmt: skip
    _require(
        not config.distributed.shard or optim.rollout_precision == "same",
        "optim.rollout_precision", optim.rollout_precision, "same while distributed.shard is true",
    )  # fmt: skip


def _rewards(rewards: RewardConfig) -> None:
    names = rewards.scorers
    _require(
        bool(names) and len(set(names)) == len(names),
        "rewards.scorers", ", ".join(names) or "none", "at least one reward, each named once",
    )  # fmt: skip
    for component, weight in rewards.weights.items():
        _require(weight >= 0, f"rewards.weights.{component}", weight, "0 or more: higher scores are better")
    for component, floor in rewards.noise_floors.items():
        _require(floor >= 0, f"rewards.noise_floors.{component}", floor, "0 or more")
    _require(0 < rewards.top_share <= 1, "rewards.top_share", rewards.top_share, "above 0, at most 1")
    _require(rewards.ranks >= 0, "rewards.ranks", rewards.ranks, "0 (all ranks) or more")
    blocks = rewards.transition_blocks
    _require(blocks >= 0, "rewards.transition_blocks", blocks, "0 or more")
