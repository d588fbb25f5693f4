"""Compare our stream, rollout, replay and update with those of the public KVPO trainer, on the CPU.

    python benchmarks/public.py --public PATH [--commit TEXT] [--sizes tiny small] [--rounds 5] [--json FILE]

PATH is a checkout of the public repository, which this script imports and calls (``public_checkout.py`` lists
what it replaces). Both sides use the same weights, noise, text and routes, and run in float32 on one thread
of this process. Their latents and scores must agree before anything is timed.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import measuring
import torch
from arithmetic import counted_flops, product_rate
from public_checkout import CHUNKS, PROMPT, Public, modules_of, shipped
from shapes import with_shape
from torch import Tensor, nn

from kvpo.app.presets import longlive_1_3b
from kvpo.app.sources.common import streaming_generator
from kvpo.config import Config
from kvpo.engine.explorers import RoutedFrame, chosen_routes
from kvpo.engine.forks import Fork
from kvpo.engine.noise import keyed_generator, keyed_normal
from kvpo.engine.pages import PlannedRollout, cache_pages
from kvpo.engine.replay import member_row, replay_context, replay_velocities
from kvpo.engine.rollout import Group, Rollout, roll_out
from kvpo.engine.stream import stream_latents
from kvpo.method.evidence import Credit, residual_table
from kvpo.method.methods import METHODS
from kvpo.models.adapters import adapter_state, add_adapter, base_state, trained_parameters
from kvpo.models.causal_wan import CausalWan
from kvpo.models.settings import WanShape
from kvpo.prompts import VideoPrompt
from kvpo.training.gradients import Learner, accumulate_gradients, lesson_of
from kvpo.training.policy import MovingAverage, policy_of
from kvpo.training.trainer import BETAS, GRADIENT_NORM, WEIGHT_DECAY

SHAPES = {
    "tiny": WanShape(
        dim=96, num_heads=3, num_layers=3, ffn_dim=384, text_len=16, text_dim=32, channels=16,
        patch_size=(1, 2, 2), latent_height=8, latent_width=8,
    ),
    "small": WanShape(
        dim=256, num_heads=4, num_layers=6, ffn_dim=1024, text_len=32, text_dim=64, channels=16,
        patch_size=(1, 2, 2), latent_height=16, latent_width=16,
    ),
}  # fmt: skip
RANKS = {"full parameters": 0, "LoRA": 32}
"""Column of the table -> rank of its adapter."""
BRANCHES, BLOCKS, FRAMES, FORK, STREAMED = 4, 2, 57, 33, 45
"""Branches (without the anchor), blocks of the window; latent frames of a video, its fork, a plain stream."""
ROUTED, RECENT = 5, 1
"""Past frames of a routed block, as shipped; the public recent count includes the block's own frames."""
LATE = 3
"""Frames by which the public cache, once it has shifted, routes later than planned."""
CLEAN_PASS = 5 * 0.001 / (1 + 4 * 0.001)
"""Noise level of the public clean pass."""
STEPS = 4
TOLERANCE = 1e-4
"""Tolerance of latents and scores, relative to their largest value."""
AIMS = {
    f"stream, {STREAMED} frames": 1.5,
    "rollout": 2.0,
    "replay, no gradient": 2.5,
    "replay + backward, 4 steps": 2.5,
    "replay + backward, as shipped": 3.0,
    "training step, as shipped": 4.0,
}
"""Phase -> ratio to reach."""
ONE_ROW = "one row"
"""Our rollout, one branch at a time: the third side of the rollout phase."""
Runs = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class RecordedTape:
    """Noise of one video, drawn before anything is measured."""

    blocks: Mapping[tuple[int, str], Tensor]

    def __call__(self, video: int, block: int, kind: str) -> Tensor:
        return self.blocks[block, kind]


def recorded_tape(shape: WanShape) -> RecordedTape:
    """Noise for every block of a video of ``FRAMES`` frames."""
    size = (3, shape.channels, shape.latent_height, shape.latent_width)
    kinds = ("initial", "renoise 1", "renoise 2", "renoise 3", "context")
    return RecordedTape(
        {(n, k): keyed_normal(size, "public", n, k) for n in range(FRAMES // 3) for k in kinds}
    )


def transformer(shape: WanShape, rank: int) -> CausalWan:
    """A random transformer with a random adapter, or with all parameters trainable if ``rank`` is 0."""
    draws = keyed_generator("public weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # module initialisers use only the global generator
        model = CausalWan(shape)
    if rank:
        add_adapter(model, rank, generator=draws)
        for parameter in trained_parameters(model).values():
            parameter.data.normal_(0, 0.05, generator=draws)
    return model


class Ours:
    """Our engine at the settings of the public trainer, with all rows of a group together."""

    def __init__(self, model: CausalWan, rank: int, tape: RecordedTape, text: Tensor) -> None:
        preset = with_shape(longlive_1_3b(), **vars(model.shape))
        explored = replace(
            preset.exploration, branches=BRANCHES, blocks=BLOCKS, recent=RECENT, routed=ROUTED,
            distinct=ROUTED, tail_blocks=(FRAMES - FORK) // 3 - BLOCKS, rows=0,
        )  # fmt: skip
        optim = replace(preset.optim, lora_rank=rank, replay_rows=0, checkpointing=False, autocast="none")
        self.config: Config = replace(preset, device="cpu", exploration=explored, optim=optim)
        self.model, self.tape, self.texts = model, tape, {PROMPT: text}
        self.generator = replace(streaming_generator(self.config, model), context_noise=CLEAN_PASS)
        self.policy = policy_of(model)
        self.average = MovingAverage(self.policy.parameters, optim.ema_decay)
        self.optimizer = torch.optim.AdamW(
            list(self.policy.parameters.values()), lr=optim.lr, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
        settings = self.config.method_settings
        self.learner = Learner(
            self.generator,
            self.policy,
            self.average.values,
            METHODS["kvpo"],
            settings,
            velocity_kl=0.0,
            rows=0,
        )
        self.routes: list[tuple[RoutedFrame, ...]] = []
        """The branches' routes, as drawn by the public trainer."""

    def stream(self, frames: int) -> Tensor:
        """Latents ``[T, C, H, W]`` of a video."""
        prompt = VideoPrompt(0, (PROMPT,), (), frames)
        return stream_latents(self.generator, [prompt], self.texts, self.tape)[0]

    def rollout(self, *, steps: int | None = None, rows: int = 0) -> tuple[Rollout, int]:
        """A rollout that still holds its root, and its peak bytes of pages in use."""
        exploration = replace(self.config.exploration, rows=rows)
        prompt = VideoPrompt(0, (PROMPT,), (), FRAMES)
        planned = PlannedRollout([prompt], [Fork(FORK, exploration)])
        cache = self.generator.new_cache(cache_pages(self.generator, [planned]))
        explorer = chosen_routes([self.routes])
        with measuring.peak_pages(cache) as peak:
            found = roll_out(
                self.generator, planned, self.texts, self.tape, ("public",), explorer=explorer, cache=cache,
                steps=steps,
            )  # fmt: skip
        return found, peak[0] * self.generator.page_bytes

    def energies(
        self,
        group: Group,
        *,
        steps: int,
        gradients: bool,
        blocks: int = BLOCKS,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Energies ``[K]`` of a group's branches over the first ``steps`` solver steps of its blocks."""
        rows = [member_row(group, branch, steps) for branch in range(group.branches)]
        own = group.trajectories.velocities_MPSFCHW[:-1, :blocks, :steps]
        weights = torch.ones(steps) if weights is None else weights
        if gradients:
            self.optimizer.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(gradients), replay_context(self.generator, rows) as context:
            velocities = replay_velocities(self.generator, rows, context, range(blocks))
            energies = residual_table(weights.expand(own.shape[:3]), own, velocities).sum((1, 2))
            if gradients:
                energies.sum().backward()
        return energies.detach()

    def step(self) -> None:
        """A rollout and its update: replay under two policies, an AdamW step and the moving average."""
        found, _ = self.rollout(steps=self.config.objective.grad_steps)
        advantages = torch.linspace(1, -1, BRANCHES)
        credit = Credit(tuple(range(BRANCHES)), advantages, advantages, torch.zeros(BRANCHES))
        lesson = lesson_of(self.learner, found.groups[0], credit, keyed_generator("public lesson"))
        self.optimizer.zero_grad(set_to_none=True)
        accumulate_gradients(self.learner, lesson, None, 1)
        nn.utils.clip_grad_norm_(list(self.policy.parameters.values()), GRADIENT_NORM)
        self.optimizer.step()
        self.average.update(self.policy.parameters)
        found.release()


def both(path: Path, shape: WanShape, rank: int, folder: str) -> tuple[Ours, Public]:
    """Both sides with the same transformer weights. Raises ValueError for a wrong checkout."""
    modules = modules_of(path)
    model, tape = transformer(shape, rank), recorded_tape(shape)
    text = torch.randn(shape.text_len, shape.text_dim, generator=keyed_generator("public text"))
    settings = shipped(path) | {
        "generator_ckpt": None, "adapter": None, "K": BRANCHES, "perturb_num_blocks": BLOCKS,
        "streaming_max_length": FRAMES, "same_step_across_blocks": False, "show_progress": False,
        "output_dir": folder,
    }  # fmt: skip
    if rank:
        settings["adapter"] = {"type": "lora", "rank": rank, "alpha": rank, "dropout": 0.0}
        settings["lora_ckpt"] = f"{folder}/lora.pt"
        torch.save({"generator_lora": dict(adapter_state(model).tensors)}, settings["lora_ckpt"])
    weights = {name: value.clone() for name, value in base_state(model).items()}
    place = (FORK - CHUNKS[1]) // 3
    public = Public(modules, settings, shape, tape, text, weights, local_block=place)
    return Ours(model, rank, tape, text), public


def apart(what: str, ours: Tensor, public: Tensor) -> float:
    """Largest difference relative to the largest value. Raises SystemExit if it exceeds the tolerance."""
    difference = float((ours - public).abs().max() / public.abs().max())
    if not difference <= TOLERANCE:
        raise SystemExit(f"the two sides disagree in {what}: {difference:.1e} > {TOLERANCE:.0e}")
    return difference


def agreement(ours: Ours, public: Public, found: Mapping[str, Any], group: Group) -> dict[str, float]:
    """Largest differences in a stream, in the branches' latents, and in scores.

    Scores are compared for the window's first block only: in later ones, the public replay continues from its
    policy's own prediction instead of the branch, so there is nothing to compare.
    """
    own = group.clean_MTCHW[:-1]
    trajectories = found["branch_trajectories"]
    first = [{name: blocks[:1] for name, blocks in one.items()} for one in trajectories]
    scores = public.scores(found, first, steps=STEPS, gradients=False, checkpointing=False)
    sigmas = torch.tensor(ours.generator.sigmas, dtype=torch.float32)
    energies = ours.energies(group, steps=STEPS, gradients=False, blocks=1, weights=sigmas.square())
    return {
        "stream": apart("the stream", ours.stream(STREAMED), public.stream(STREAMED)),
        "rollout": apart("the rollout", own, found["targets_global"]),
        "scores": apart("scores", -energies / 2, scores),
    }


def phases(ours: Ours, public: Public, found: Mapping[str, Any], group: Group) -> dict[str, Runs]:
    """The runs to measure, by phase and side."""
    stream, rollout, plain, backward, as_shipped, step = AIMS
    trajectories, shipped_steps = found["branch_trajectories"], ours.config.objective.grad_steps

    def theirs(**options: Any) -> Callable[[], object]:
        return lambda: public.scores(found, trajectories, **options)

    def replay(steps: int, gradients: bool) -> Callable[[], object]:
        return lambda: ours.energies(group, steps=steps, gradients=gradients)

    return {
        stream: dict(public=lambda: public.stream(STREAMED), ours=lambda: ours.stream(STREAMED)),
        rollout: {
            "public": public.rollout,
            "ours": lambda: ours.rollout()[0].release(),
            ONE_ROW: lambda: ours.rollout(rows=1)[0].release(),
        },
        plain: dict(
            public=theirs(steps=STEPS, gradients=False, checkpointing=False), ours=replay(STEPS, False)
        ),
        backward: dict(
            public=theirs(steps=STEPS, gradients=True, checkpointing=False), ours=replay(STEPS, True)
        ),
        as_shipped: dict(
            public=theirs(steps=shipped_steps, gradients=True, checkpointing=True),
            ours=replay(shipped_steps, True),
        ),
        step: dict(public=public.step, ours=ours.step),
    }


def alternated(runs: Mapping[str, Runs], rounds: int) -> dict[str, dict[str, list[float]]]:
    """CPU-seconds of every round by phase and side; the sides take turns, and which goes first alternates."""
    taken: dict[str, dict[str, list[float]]]
    taken = {phase: {side: [] for side in sides} for phase, sides in runs.items()}
    for round_ in range(rounds):
        for phase, sides in runs.items():
            for side in reversed(list(sides)) if round_ % 2 else sides:
                before = time.process_time()
                sides[side]()
                taken[phase][side].append(time.process_time() - before)
    return taken


def measured(path: Path, shape: WanShape, rank: int, rounds: int) -> dict[str, Any]:
    """All measurements at one size, with or without an adapter."""
    with tempfile.TemporaryDirectory(prefix="kvpo-public-") as folder:
        ours, public = both(path, shape, rank, folder)
        found = public.rollout()
        planned = [one["selected_older_frame_indices"] for one in found["plan"]["branch_plans"]]
        ours.routes = [tuple(RoutedFrame(0, frame + LATE) for frame in route) for route in planned]
        rollout, together = ours.rollout()
        (group,) = rollout.groups
        differences = agreement(ours, public, found, group)
        single, one_row = ours.rollout(rows=1)
        single.release()
        held = {"public": public.cache_bytes(found), "ours": together, ONE_ROW: one_row}
        runs = phases(ours, public, found, group)
        # Before any timing, so that kernels have been selected by then.
        peaks, flops = (
            {name: {side: measure(run) for side, run in sides.items()} for name, sides in runs.items()}
            for measure in (measuring.peak_memory, counted_flops)
        )
        rows = (BRANCHES + 1) * 3 * shape.tokens_per_frame
        return {
            "apart": differences, "cache_bytes": held, "peak_bytes": peaks, "flops": flops,
            "flops_per_second": product_rate(rows, shape.dim),
            "cpu_seconds": alternated(runs, rounds),
        }  # fmt: skip


def columns_of(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Measurements by column of the tables."""
    return {f"{size}, {kind}": found for size, kinds in sizes.items() for kind, found in kinds.items()}


def ratios(numbers: Mapping[str, Any]) -> str:
    """Ratios of median CPU-seconds, public over ours, with the aims and the largest relative difference.

    In brackets: public over the time of our FLOPs at the matrix-product rate; more takes fewer FLOPs.
    """
    columns = columns_of(numbers["sizes"])

    def faster(phase: str, side: str = "ours") -> list[str]:
        cells = []
        for found in columns.values():
            taken = {one: statistics.median(rounds) for one, rounds in found["cpu_seconds"][phase].items()}
            least = found["flops"][phase][side] / found["flops_per_second"]
            cells.append(f"{taken['public'] / taken[side]:.2f} ({taken['public'] / least:.2f})")
        return cells

    rows = [(phase, *faster(phase), f"≥ {aim:g}") for phase, aim in AIMS.items()]
    rows.append(("rollout, one row at a time", *faster("rollout", ONE_ROW), ""))
    differences = [f"{max(found['apart'].values()):.0e}" for found in columns.values()]
    rows.append(("largest relative difference", *differences, f"≤ {TOLERANCE:.0e}"))
    return measuring.table(("public ÷ ours, CPU-seconds", *columns, "aim"), rows)


def memory(numbers: Mapping[str, Any]) -> str:
    """MiB of a rollout's cached keys and values, and peak MiB of each phase, public and ours."""
    columns = columns_of(numbers["sizes"])

    def pair(held: Mapping[str, int], side: str = "ours") -> str:
        return f"{held['public'] / 2**20:.1f} / {held[side] / 2**20:.1f}"

    rows = [
        (
            f"keys and values of a rollout, {how}",
            *(pair(one["cache_bytes"], side) for one in columns.values()),
        )
        for side, how in (("ours", "all rows together"), (ONE_ROW, "one row at a time"))
    ]
    for phase in AIMS:
        rows.append((f"peak, {phase}", *(pair(one["peak_bytes"][phase]) for one in columns.values())))
    single = [pair(one["peak_bytes"]["rollout"], ONE_ROW) for one in columns.values()]
    rows.append(("peak, rollout, one row at a time", *single))
    return measuring.table(("MiB, public / ours", *columns), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--public", type=Path, help="a checkout of the public KVPO trainer")
    parser.add_argument("--commit", default="", help="its commit, where it is not a git repository")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write every number to this file too")
    options = parser.parse_args(arguments)
    if options.public is None:
        parser.error("--public: give the path of a checkout of the public KVPO trainer")
    torch.set_num_threads(1)
    path = options.public.resolve()
    sizes: dict[str, dict[str, Any]] = {size: {} for size in options.sizes}
    numbers = {
        "machine": measuring.machine(),
        "public_commit": options.commit or measuring.commit_of(path),
        "commit": measuring.commit_of(Path(__file__).resolve().parents[1], "src"),
        "rounds": options.rounds,
        "sizes": sizes,
    }
    try:
        for size in options.sizes:
            for kind, rank in RANKS.items():
                sizes[size][kind] = measured(path, SHAPES[size], rank, options.rounds)
                measuring.write_json(options.json, numbers)
    except ValueError as error:
        parser.error(str(error))
    measuring.section("Beside the public trainer", ratios(numbers), memory(numbers))


if __name__ == "__main__":
    main()
