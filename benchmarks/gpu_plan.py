"""Compare the memory and time of a run at the real 1.3B geometry with the estimates of `kvpo plan`.

    python benchmarks/gpu_plan.py [--work DIR] [--json PATH] [any setting]
    python benchmarks/gpu_plan.py --tiny     the same code with tiny sizes on the CPU: a check

Writes random checkpoints of the real sizes in the public layouts (with a two-layer text encoder), builds the
run from them as `kvpo align` does, and runs the phases of one update one after another.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from gpu import Clock, measured_rates, precision, random_transformer
from measuring import given_settings, machine, section, table, write_json
from shapes import geometry_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from kvpo.app.configuration import preset
from kvpo.app.plan import Planner
from kvpo.app.sources.wan import build_wan
from kvpo.config import Config
from kvpo.engine.pages import cache_pages
from kvpo.engine.scoring import decode_members, score_group
from kvpo.engine.stream import stream_latents
from kvpo.models.geometry import GEOMETRIES
from kvpo.plan.phases import Plan
from kvpo.prompts import ClipPrompt
from kvpo.training import collection
from kvpo.training.credit import collection_scale
from kvpo.training.gradients import accumulate_gradients
from kvpo.training.ranks import ALONE
from kvpo.training.reduction import OrderedSum
from kvpo.training.trainer import Trainer

GB = 1e9
SETTINGS: dict[str, Any] = {
    "rewards.scorers": ["gpu_plan:brightness"],
    "prompts.frames": [57],
    "exploration.branches": 4,
    "exploration.blocks": 2,
    "exploration.tail_blocks": 1,
    "rewards.noise_floors": {"total": 0.0},
    "optim.updates": 1,
    "optim.prompts_per_update": 1,
    "optim.rollouts_per_refresh": 1,
    "optim.ema_decay": 0.9,
    "evaluation.validation_prompts": 2,
    "evaluation.test_prompts": 2,
}
"""One prompt, and a shorter window and tail: only counts differ from the preset, not sizes."""
SMALL = replace(GEOMETRIES["1.3b"], dim=64, num_heads=2, num_layers=2, ffn_dim=96, text_len=8, text_dim=16)
TINY: dict[str, Any] = {
    "device": "cpu", "backbone.geometry": geometry_file(SMALL), "stream.size": (4, 4),
    "optim.lora_rank": 4, "optim.autocast": "none", "prompts.frames": [48],
}  # fmt: skip
PHASES = ("stream held-out videos", "explore", "decode", "replay and backward", "optimiser step")


def brightness(video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Tensor:
    """A reward that costs nothing."""
    return video_BTCHW.mean((1, 2, 3, 4))


def write_files(config: Config, directory: Path, *, tiny: bool) -> dict[str, Any]:
    """Write random weights of every part in a public layout; return the settings that name the files."""
    state = random_transformer(config).state_dict()
    weights = {f"model.{name}": value.cpu() for name, value in state.items()}
    torch.save({"generator": weights}, directory / "base.pt")
    torch.manual_seed(0)
    width = {"base_dim": 8} if tiny else {}
    AutoencoderKLWan(**width).save_pretrained(directory / "vae")  # type: ignore[attr-defined]
    size = config.model.text_dim
    widths: dict[str, Any] = {"d_kv": 64, "num_heads": 64, "d_ff": 10240}
    widths |= {"d_kv": 8, "num_heads": 2, "d_ff": 32} if tiny else {}
    encoder = UMT5Config(vocab_size=16, d_model=size, num_layers=2, feed_forward_proj="gated-gelu", **widths)
    text_encoder = UMT5EncoderModel(encoder).to(precision(config))  # type: ignore[arg-type]
    text_encoder.save_pretrained(directory / "text_encoder")
    words = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", "one", "two", "three"))}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(directory / "tokenizer")
    (directory / "prompts.txt").write_text("one\ntwo\nthree\none two\ntwo one\n", encoding="utf-8")
    return {
        "backbone.checkpoint": str(directory / "base.pt"),
        "backbone.encoders": str(directory),
        "prompts.file": str(directory / "prompts.txt"),
    }


class Phases:
    """Runs the phases of one update, and measures the seconds and peak tensor bytes of each."""

    def __init__(self, config: Config, plan: Plan) -> None:
        self.plan = plan
        self.setup = build_wan(config)
        self.trainer = Trainer(self.setup)
        self.clock = Clock(torch.device(config.device))
        self.measured: dict[str, tuple[float, float]] = {}

    def take(self, name: str, call: Callable[[], Any]) -> Any:
        """Run a phase once, including the first call of each kernel, as in a run's first update."""
        self.clock.forget_peak()
        self.clock.synchronise()
        started = time.perf_counter()
        found = call()
        self.clock.synchronise()
        seconds, peak = time.perf_counter() - started, self.clock.peak()
        self.measured[name] = (seconds, peak)
        sys.stderr.write(f"{name}: {seconds:.3g} s, {peak / GB:.4g} GB\n")  # survives if the rest is cut off
        return found

    def run(self) -> None:
        """Run every phase in turn."""
        setup, trainer, block = self.setup, self.trainer, self.setup.generator.block
        held_out = [prompt for prompts in setup.test.values() for prompt in prompts][:1]
        texts = setup.backbone.texts(held_out)
        tape = setup.evaluation_tape()
        self.take(PHASES[0], lambda: stream_latents(setup.generator, held_out, texts, tape))

        def unscored(call: Callable[[], Any]) -> Future[Any]:
            return Future()

        updates = ((n, collection.plan_rollout(setup, n)) for n in range(1000))
        update, planned = next(one for one in updates if one[1].forks[0].frame == self.plan.fork)
        cache = setup.generator.new_cache(cache_pages(setup.generator, [planned]))
        rollout, _ = self.take(
            PHASES[1], lambda: collection.generate_rollout(setup, update, planned, unscored, cache, ALONE)
        )
        group = rollout.groups[0]
        self.take(PHASES[2], lambda: decode_members(group, setup.backbone.codec, lead=0))
        codec, scorer = setup.backbone.codec, setup.judges.scorer
        shown = setup.config.rewards.transition_blocks
        scores = score_group(group, codec, scorer, block=block, transition_blocks=shown)
        scale = collection_scale([scores], setup.blend())
        credits = collection.credits_of(setup, update, {group.index: scores}, scale)
        lessons = collection.lessons_of(setup, trainer.learner, update, rollout, credits)
        lesson = lessons[group.index]
        total = OrderedSum(ALONE, list(trainer.policy.parameters.values()))  # a run holds it meanwhile
        self.take(PHASES[3], lambda: accumulate_gradients(trainer.learner, lesson, None, 1))
        del total
        self.take(PHASES[4], trainer.optimizer.step)


def compared(plan: Plan, measured: Mapping[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Plan and measurement of every phase, both without the CUDA context, which is not a tensor."""
    outside = plan.standing.get("context", 0.0)
    rows = []
    for phase in plan.phases:
        if phase.name in measured:
            seconds, peak = measured[phase.name]
            planned = plan.total(phase) - outside
            rows.append(
                {
                    "phase": phase.name,
                    "planned GB": planned / GB,
                    "measured GB": peak / GB,
                    "measured / planned": peak / planned,
                    "planned least s": "-" if phase.seconds is None else phase.seconds,
                    "measured s": seconds,
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files, measure the phases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU: checks this benchmark")
    parser.add_argument("--work", type=Path, help="where the random checkpoints go (a temporary directory)")
    parser.add_argument("--json", type=Path, help="write every number to this file too")
    options, rest = parser.parse_known_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        sys.stdout.write("no CUDA device here: nothing measured (--tiny runs the same code on the CPU)\n")
        return
    settings = SETTINGS | (TINY if options.tiny else {}) | given_settings(rest)
    with tempfile.TemporaryDirectory(dir=options.work) as directory:
        os.environ["KVPO_CACHE"] = directory
        files = write_files(preset("longlive-1.3b", settings), Path(directory), tiny=options.tiny)
        config = preset("longlive-1.3b", settings | files)
        sizes = {"size": 64, "copied": 2**16} if options.tiny else {"size": 8192, "copied": 2**32}
        rates = measured_rates(Clock(torch.device(config.device)), precision(config), repeats=10, **sizes)
        phases = Phases(config, Planner(config, rates).plan(config))
        phases.run()
    rows = compared(phases.plan, phases.measured)
    about = machine(config.device)
    text = f"{about['device']}, torch {about['torch']}, {rates.flops / 1e12:.3g} TFLOP/s, one update with"
    chosen = ", ".join(f"{name} {value}" for name, value in settings.items() if name not in TINY)
    section("Plan and run", f"{text} {chosen}.", table(list(rows[0]), [list(row.values()) for row in rows]))
    measured = {"flops": rates.flops, "bandwidth": rates.bandwidth}
    write_json(options.json, {"machine": about, "limits": measured, "phases": rows})


if __name__ == "__main__":
    main()
