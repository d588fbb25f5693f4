"""Reward commands: their arguments, and the functions that run them."""

import math
import os
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path

from kvpo.app.arguments import address_arguments, names
from kvpo.app.configuration import path_argument
from kvpo.config import TOTAL
from kvpo.config_checks import ConfigurationError
from kvpo.progress import progress_bars
from kvpo.rewards.catalogue import FAMILIES, REWARD_IDS

_NAMES = (
    f"{', '.join(REWARD_IDS)}, world (the embedded world's), your own as package.module:function, one "
    "learned from votes as preference:FILE"
)
_PARTS = ", ".join(f"{family.ids[0]}.{part}" for family in FAMILIES for part in family.parts)


def score_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``kvpo score``."""
    parser.add_argument(
        "folder", type=path_argument, metavar="FOLDER", help="videos, also in folders below; or one file"
    )
    parser.add_argument(
        "--reward",
        action="append",
        required=True,
        metavar="NAME[,NAME]",
        help=f"{_NAMES}, any of these of a server as NAME@http://HOST:PORT, or a judge with a rubric as "
        "NAME@openai:URL#MODEL",
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        default=Path("scores.html"),
        metavar="FILE",
        help="page to write, with a .json next to it (default: scores.html)",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="print the frames, size, prompt and scale each reward would use for the first file, and exit",
    )
    _prompts_argument(parser)
    _model_arguments(parser)


def score(arguments: Namespace) -> None:
    """Run ``kvpo score``."""
    rewards = names(*arguments.reward)
    if arguments.explain:
        from kvpo.app.explain import explain

        sources = _sources(arguments.source)
        print("\n".join(explain(arguments.folder, rewards, prompts=arguments.prompts, sources=sources)))
        return
    _check_out(arguments.out, ".html")
    from kvpo.app.score import score_folder, score_table

    with progress_bars(lasting=False) as show:
        results = score_folder(
            arguments.folder,
            rewards,
            prompts=arguments.prompts,
            out=arguments.out,
            sources=_sources(arguments.source),
            device=_device(arguments.device),
            progress=partial(show, "scoring"),
        )
    print(score_table(results))
    print(arguments.out)


def calibrate_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``kvpo calibrate``."""
    parser.add_argument("reward", metavar="REWARD", help="a reward, named as for `kvpo score`")
    parser.add_argument(
        "folder",
        type=path_argument,
        nargs="?",
        metavar="FOLDER",
        help="videos to measure on (default: generated ones)",
    )
    parser.add_argument(
        "--clips", type=int, default=8, metavar="INT", help="videos to measure on (default: 8)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="INT", help="seed of the noise and of the generated videos"
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="FILE", help="JSON to write (default: REWARD.noise.json)"
    )
    _prompts_argument(parser)
    _model_arguments(parser)


def run_calibrate(arguments: Namespace) -> None:
    """Run ``kvpo calibrate``."""
    from kvpo.app.named_rewards import split_location

    plain, _ = split_location(arguments.reward)
    out = arguments.out or Path(f"{plain.replace(':', '.').replace('/', '.')}.noise.json")
    _check_out(out, ".json")
    from kvpo.app.calibrate import calibrate as measure
    from kvpo.app.calibrate import noise_table

    with progress_bars(lasting=False) as show:
        found = measure(
            arguments.reward,
            arguments.folder,
            prompts=arguments.prompts,
            clips=arguments.clips,
            seed=arguments.seed,
            out=out,
            sources=_sources(arguments.source),
            device=_device(arguments.device),
            progress=partial(show, "calibrating"),
        )
    print(noise_table(found))
    parts = [name for name in found if name != TOTAL or len(found) == 1]
    print(f"--rewards.noise_floors {','.join(f'{name}={out}' for name in parts)}")


def reward_server_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``kvpo reward-server``."""
    parser.add_argument(
        "--reward", action="append", required=True, metavar="NAME[,NAME]", help=f"what to serve: {_NAMES}"
    )
    address_arguments(parser, 8787, "KVPO_REWARD_TOKEN")
    parser.add_argument(
        "--frame-rate",
        type=float,
        default=16.0,
        metavar="FLOAT",
        help="frames per second of the clips, for rewards that take frames by time (default: 16, the public "
        "generators'; `kvpo score` sends 2)",
    )
    parser.add_argument(
        "--check", action="store_true", help="score one generated clip, print its scores and exit"
    )
    parser.add_argument(
        "--batch", type=int, default=16, metavar="INT", help="most clips scored in one call (default: 16)"
    )
    parser.add_argument(
        "--request-mib", type=int, default=1024, metavar="INT", help="largest request (default: 1024)"
    )
    parser.add_argument(
        "--queue-mib",
        type=int,
        default=4096,
        metavar="INT",
        help="limit of all requests in flight; beyond it clients are told to try again (default: 4096)",
    )
    _model_arguments(parser)


def reward_server(arguments: Namespace) -> None:
    """Run ``kvpo reward-server``."""
    from kvpo.app.reward_server import check_rewards, serve_rewards
    from kvpo.rewards.service.messages import TOKEN_VARIABLE
    from kvpo.rewards.service.server import MIB, RequestLimits
    from kvpo.serving import read_token

    for name in ("batch", "request_mib", "queue_mib"):
        if vars(arguments)[name] < 1:
            flag = name.replace("_", "-")
            raise ConfigurationError(f"--{flag}: must be 1 or more, got {vars(arguments)[name]}")
    if arguments.request_mib > arguments.queue_mib:
        raise ConfigurationError(
            f"--request-mib: {arguments.request_mib} never fits into --queue-mib {arguments.queue_mib}"
        )
    if not 0 < arguments.frame_rate < math.inf:
        raise ConfigurationError(f"--frame-rate: must be positive, got {arguments.frame_rate}")
    if arguments.check:
        given = {"sources": _sources(arguments.source), "device": _device(arguments.device)}
        print(check_rewards(names(*arguments.reward), frame_rate=arguments.frame_rate, **given))
        return
    limits = RequestLimits(arguments.request_mib * MIB, arguments.queue_mib * MIB, arguments.batch)
    serve_rewards(
        names(*arguments.reward),
        host=arguments.host,
        port=arguments.port,
        token=read_token(arguments.token_file, os.environ, TOKEN_VARIABLE),
        frame_rate=arguments.frame_rate,
        limits=limits,
        sources=_sources(arguments.source),
        device=_device(arguments.device),
    )


def learn_reward_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``kvpo learn-reward``."""
    parser.add_argument(
        "votes", type=path_argument, nargs="+", metavar="VOTES", help="studies that `kvpo arena` made"
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="FILE", help="safetensors file to write"
    )
    parser.add_argument(
        "--features",
        default="",
        metavar="NAME[,NAME]",
        help="rewards whose embeddings or components it looks at (default: pixel features)",
    )
    parser.add_argument(
        "--question",
        default="overall",
        metavar="TEXT",
        help="the question whose answers are learned (default: overall)",
    )
    _model_arguments(parser)


def run_learn_reward(arguments: Namespace) -> None:
    """Run ``kvpo learn-reward``."""
    _check_out(arguments.out, ".safetensors")
    from kvpo.app.learn_reward import learn_reward as learn
    from kvpo.app.learn_reward import table

    worth = learn(
        arguments.votes,
        arguments.out,
        features=names(arguments.features),
        question=arguments.question,
        sources=_sources(arguments.source),
        device=_device(arguments.device),
    )
    print(table(worth))
    print(f"--rewards.scorers preference:{arguments.out}")
    print(f"--rewards.noise_floors {arguments.out.stem}={arguments.out.with_suffix('.noise.json')}")


def _prompts_argument(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        type=path_argument,
        metavar="FILE",
        help="JSON that maps file names to prompts, or prompts of any form (docs/evaluation.md), one per "
        "video in the order of their names, 2 before 10; not needed where `kvpo generate` wrote the videos",
    )


def _model_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="PART=PATH",
        help=f"path or hub id of a part of a reward: {_PARTS}",
    )
    parser.add_argument("--device", metavar="TEXT", help="torch device (default: cuda where there is one)")


def _sources(given: list[str]) -> dict[str, str]:
    sources = {}
    for text in given:
        part, equals, path = text.partition("=")
        if not (part and equals and path):
            raise ConfigurationError(f"--source: expected PART=PATH, got {text!r}; parts are {_PARTS}")
        sources[part] = path
    return sources


def _check_out(out: Path, suffix: str) -> None:
    if out.suffix != suffix or out.is_dir() or not out.parent.is_dir():
        raise ConfigurationError(f"--out: must be a {suffix} file in a folder that exists, got {out}")
    if not os.access(out.parent, os.W_OK):
        raise ConfigurationError(f"--out: not permitted to write to {out.parent}")


def _device(given: str | None) -> str:
    """The device of --device; by default a GPU where there is one. Raises ConfigurationError."""
    import torch

    from kvpo.app.build import check_device

    device = ("cuda" if torch.cuda.is_available() else "cpu") if given is None else given
    check_device(device, "--device")
    return device
