"""The subcommands of ``kvpo``: their own arguments, and the library function each one calls.

Imports only light modules at the top, so that ``--help`` does not wait for torch. A new subcommand takes two
functions and an entry in COMMANDS.
"""

import os
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path

from kvpo.app import (
    arena_commands,
    compare_commands,
    generate_commands,
    live_commands,
    prompt_commands,
    reward_commands,
    run_commands,
    suite_commands,
)
from kvpo.app.arguments import (
    SETTING_PREFIX,
    checkpoint_argument,
    configuration,
    is_main,
    run_argument,
    settings_given,
    weights_argument,
)
from kvpo.app.configuration import parse_flags, path_argument
from kvpo.config_checks import ConfigurationError
from kvpo.files import output_file, write_json
from kvpo.training.trackers import TRACKERS

READ_BY_PRETRAINING = ("seed", "device", "threads", "backbone.kind", "backbone.geometry",
                       "backbone.checkpoint", "optim.autocast")  # fmt: skip
"""Settings that `kvpo pretrain` reads besides those of the stream."""


@dataclass(frozen=True)
class Command:
    """One subcommand.

    ``configured`` commands also take --preset, --config and a flag per setting. Commands with ``places`` take
    flags for the current location of a run's files.
    """

    name: str
    summary: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int | None]
    """Returns the exit status; None is 0."""
    configured: bool = False
    places: bool = False


def _align_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="output directory of the run"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out from its last checkpoint; its saved settings hold",
    )
    parser.add_argument(
        "--track",
        action="append",
        default=[],
        choices=TRACKERS,
        help="also send the metrics there, in addition to TensorBoard (extra: trackers)",
    )
    prompt_commands.extended_argument(parser)
    parser.add_argument(
        "--anyway", action="store_true", help="begin even if the plan says that the device is too small"
    )
    run_commands.null_argument(parser)
    for short, setting, metavar in (
        ("advantages", "objective.advantages", "KIND"),
        ("checkpoint", "backbone.checkpoint", "FILE"),
        ("lora", "backbone.lora", "FILE"),
        ("prompts", "prompts.file", "FILE"),
    ):
        parser.add_argument(
            f"--{short}",
            dest=f"{SETTING_PREFIX}{setting}",
            default=SUPPRESS,
            metavar=metavar,
            help=f"short for --{setting}",
        )


def _align(arguments: Namespace) -> None:
    from kvpo.training.run_directory import belongs_to_run, resume_hint

    resume = arguments.resume or os.environ.get("TORCHELASTIC_RESTART_COUNT", "") not in ("", "0")
    continued = resume and belongs_to_run(arguments.out)
    given = arguments.preset is not None or arguments.config or settings_given(arguments)
    if resume and not (continued or given):
        raise ConfigurationError(
            f"--resume: {arguments.out} holds no run; name its directory, or give --preset to start one there"
        )
    config = configuration(arguments, saved=arguments.out / "config.yaml" if continued else None)
    if arguments.extended is not None:
        config = prompt_commands.with_extended_prompts(config, arguments.extended, arguments.out)
    try:
        from kvpo.app.align import align

        given = {"track": arguments.track, "anyway": arguments.anyway, "null": arguments.null}
        stopped = align(config, arguments.out, resume=resume, **given) is None
    except KeyboardInterrupt:  # outside the updates, or a second Ctrl-C
        stopped = True
    if stopped:
        raise KeyboardInterrupt(*[resume_hint(arguments.out)] if is_main() else [])


def _export_arguments(parser: ArgumentParser) -> None:
    run_argument(parser)
    checkpoint_argument(parser)
    weights_argument(parser)
    parser.add_argument(
        "--layout",
        choices=("peft", "diffusers-lora", "comfy", "diffusers", "pt"),
        default="peft",
        help="the adapter for PEFT, diffusers or ComfyUI, or all weights as a diffusers directory or public "
        ".pt file (default: peft)",
    )
    parser.add_argument(
        "--difference",
        type=int,
        nargs="?",
        const=0,
        metavar="RANK",
        help="write what a continued adapter adds to the given one, for programs that load that first: "
        "exactly, or at a rank",
    )
    parser.add_argument(
        "--push", default="", metavar="OWNER/NAME", help="upload the directory to this repository of the hub"
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="PATH", help="new directory, or .pt file"
    )


def _export(arguments: Namespace) -> None:
    from kvpo.app.export import export

    places = parse_flags(settings_given(arguments))
    given = {"checkpoint": arguments.checkpoint, "weights": arguments.weights, "places": places}
    given |= {"difference": arguments.difference, "push": arguments.push}
    print(export(arguments.run, arguments.out, layout=arguments.layout, **given))


def _pretrain_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="FILE", help="safetensors file to write"
    )
    parser.add_argument("--steps", type=int, metavar="INT", help="optimiser steps (default: as shipped)")
    parser.add_argument("--resume", action="store_true", help="continue an unfinished training of FILE")


def _pretrain(arguments: Namespace) -> None:
    config = configuration(arguments)
    if arguments.steps is not None and arguments.steps < 0:
        raise ConfigurationError(f"--steps: must be 0 or more, got {arguments.steps}")
    for path in settings_given(arguments):
        if path not in READ_BY_PRETRAINING and not path.startswith("stream."):
            raise ConfigurationError(
                f"{path}: kvpo pretrain does not read it; leave it out (it reads stream.* and "
                f"{', '.join(READ_BY_PRETRAINING)})"
            )
    from kvpo.app.sources.world import check_pretraining, checked_base
    from kvpo.progress import progress_bars
    from kvpo.training.device import computing
    from kvpo.training.interrupt import stop_on_signal
    from kvpo.world.pretrain import PretrainSettings, pretrain

    check_pretraining(config)
    out = output_file(arguments.out, "--out")
    settings = PretrainSettings(seed=config.seed, autocast=config.optim.autocast)
    if arguments.steps is not None:
        settings = replace(settings, steps=arguments.steps)
    with computing(config), progress_bars() as show, stop_on_signal() as interrupted:
        finished = pretrain(
            config.model,
            config.stream,
            settings,
            out,
            lambda done, loss: show("pretraining", done, settings.steps, {"loss": loss}),
            device=config.device,
            resume=arguments.resume,
            start=checked_base(config) if config.backbone.checkpoint else None,
            interrupted=interrupted,
        )
    print(out if finished else f"{out}: stopped; --resume continues")


def _plan_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GB",
        help="memory of the device; says whether the run fits, or what to add",
    )
    for name, what in (("gpus", "GPUs of a node that share the run"), ("nodes", "nodes of that many GPUs")):
        parser.add_argument(f"--{name}", type=int, default=1, metavar="INT", help=f"{what} (default: 1)")
    parser.add_argument(
        "--tflops",
        type=float,
        metavar="RATE",
        help="operations the device does, in 1e12 per second (default: 150; 0.1 on a CPU)",
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        metavar="RATE",
        help="memory traffic of the device, in 1e9 bytes per second (default: 1000; 10 on a CPU)",
    )
    parser.add_argument(
        "--json", type=path_argument, metavar="FILE", help="also write every number to this file"
    )


def _plan(arguments: Namespace) -> None:
    config = configuration(arguments)
    out = None if arguments.json is None else output_file(arguments.json, "--json")
    for name in ("tflops", "bandwidth"):
        if (rate := vars(arguments)[name]) is not None and not 0 < rate < inf:
            raise ConfigurationError(f"--{name}: must be positive and finite, got {rate:g}")
    from kvpo.app.plan import DEFAULT_RATES, plan_command
    from kvpo.training.device import GB

    rates = DEFAULT_RATES[not config.on_cpu]
    if arguments.tflops:
        rates = replace(rates, flops=arguments.tflops * 1e12)
    if arguments.bandwidth:
        rates = replace(rates, bandwidth=arguments.bandwidth * 1e9)
    plan_command(
        config,
        memory=None if arguments.gpu_memory is None else arguments.gpu_memory * GB,
        rates=rates,
        out=out,
        gpus=arguments.gpus,
        nodes=arguments.nodes,
    )


def _doctor_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=path_argument,
        default=Path("."),
        metavar="DIR",
        help="where runs will write (default: here)",
    )
    parser.add_argument(
        "--json", type=path_argument, metavar="FILE", help="also write every rank's findings to this file"
    )


def _doctor(arguments: Namespace) -> int:
    config = configuration(arguments)
    file = None if arguments.json is None else output_file(arguments.json, "--json")
    from kvpo.app.doctor import doctor, worst

    findings = doctor(config, arguments.out)
    if is_main():
        for rank, own in enumerate(findings):
            shown = [finding for finding in own if rank == 0 or finding.level != "ok"]
            where = f"rank {rank}: " if len(findings) > 1 else ""
            print("\n".join(where + finding.line() for finding in shown))
        if file is not None:
            record = [[asdict(finding) for finding in own] for own in findings]
            write_json(file, record)
    return worst(findings)


COMMANDS = (
    Command("align", "align a generator with a reward", _align_arguments, _align, configured=True),
    Command(
        "generate",
        "generate videos from prompts",
        generate_commands.generate_arguments,
        generate_commands.run_generate,
        configured=True,
    ),
    Command(
        "suite",
        "check folders for a benchmark suite, and compare its results",
        suite_commands.suite_arguments,
        suite_commands.suite,
    ),
    Command(
        "prompts",
        "read, check, convert and split prompt files",
        prompt_commands.prompts_arguments,
        prompt_commands.prompts,
        configured=True,
    ),
    Command(
        "live",
        "direct a stream while it runs, on a page",
        live_commands.live_arguments,
        live_commands.live,
        configured=True,
    ),
    Command(
        "evaluate",
        "compare base and aligned model on held-out prompts",
        run_commands.evaluate_arguments,
        run_commands.evaluate_run,
        places=True,
    ),
    Command(
        "compare",
        "train methods on one base under one budget and compare them",
        compare_commands.compare_arguments,
        compare_commands.compare_command,
        configured=True,
    ),
    Command(
        "export", "export what a run trained for other programs", _export_arguments, _export, places=True
    ),
    Command("pretrain", "rebuild the embedded base model", _pretrain_arguments, _pretrain, configured=True),
    Command(
        "plan", "what a run needs, and which settings fit a device", _plan_arguments, _plan, configured=True
    ),
    Command(
        "doctor",
        "examine this machine for a run; exit status 0: ok, 1: warnings, 2: something fails",
        _doctor_arguments,
        _doctor,
        configured=True,
    ),
    Command(
        "report", "write the HTML report of a run", run_commands.report_arguments, run_commands.report_run
    ),
    Command(
        "arena",
        "compare videos blind, on a page for raters",
        arena_commands.arena_arguments,
        arena_commands.arena,
    ),
    Command("score", "score a folder of videos", reward_commands.score_arguments, reward_commands.score),
    Command(
        "calibrate",
        "measure a reward's noise floor",
        reward_commands.calibrate_arguments,
        reward_commands.run_calibrate,
    ),
    Command(
        "learn-reward",
        "learn a reward from the votes of studies",
        reward_commands.learn_reward_arguments,
        reward_commands.run_learn_reward,
    ),
    Command(
        "reward-server",
        "serve rewards to runs in other processes",
        reward_commands.reward_server_arguments,
        reward_commands.reward_server,
    ),
)
