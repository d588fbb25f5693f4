"""Benchmark suites: the videos that each asks for, with their exact names, and their generation.

Follows the conventions of VBench (Huang et al. 2023), VBench-Long and VBench-2.0; the prompts come from the
user's copy.
"""

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvpo import __version__
from kvpo.app.build import checkpoint_of, load_backbone, opened_arms, source_of
from kvpo.app.generate import VIDEOS_TOGETHER
from kvpo.app.origin import identity_of, settings_of
from kvpo.app.taken import claimed
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError, check
from kvpo.engine.generator import as_bytes, frame_size, pixel_frame, pixels_of
from kvpo.engine.stream import lockstep_batches
from kvpo.files import (
    TEMPORARY_PREFIX,
    StorageError,
    local_path,
    make_directory,
    named_list,
    read_json,
    remove_leftovers,
    storage_error,
    temporary_name,
    write_json,
)
from kvpo.models.geometry import GEOMETRY_SETTING
from kvpo.progress import progress_bars
from kvpo.prompt_files import examine, extended
from kvpo.prompts import VideoPrompt
from kvpo.report.video import enlargement, write_video
from kvpo.training.backbone import Backbone
from kvpo.training.device import computing
from kvpo.training.ranks import Ranks, joined_ranks

logger = logging.getLogger(__name__)

LONGEST_NAME = 255
"""Longest file name, in bytes, that common file systems accept."""


@dataclass(frozen=True)
class Suite:
    """The rules by which a suite finds its videos."""

    package: str
    """Python package that holds the list of prompts, in ``info``."""
    info: str
    copies: int
    """Videos per prompt."""
    more: Mapping[str, int] = field(default_factory=dict)
    """Videos per prompt in dimensions that take more of them."""
    folders: bool = False
    """True if every dimension has a folder of its own."""
    letters: int | None = None
    """Characters of the prompt in a file name; None: all."""
    command: str = ""
    """Command that scores dimension D of a folder DIR."""
    caution: str = ""
    flickering: str = ""
    """Caution if the dimension temporal_flickering is requested."""


_VBENCH = Suite(
    "vbench",
    "VBench_full_info.json",
    5,
    {"temporal_flickering": 25},
    command="vbench evaluate --videos_path DIR --dimension D",
    flickering="temporal_flickering looks at what `vbench static_filter --videos_path DIR` leaves of its "
    "videos",
)
SUITES = {
    "vbench": _VBENCH,
    "vbench-long": replace(
        _VBENCH,
        command="python vbench2_beta_long/eval_long.py --videos_path DIR --dimension D "
        "--mode long_vbench_standard",
        caution="VBench-Long writes split_clip/ into the folder, and scores what it finds there again: give "
        "it a copy; it loses prompts with an underscore",
        flickering="temporal_flickering needs --static_filter_flag",
    ),
    "vbench2": Suite(
        "vbench2",
        "VBench2_full_info.json",
        3,
        {"Diversity": 20},
        folders=True,
        letters=180,
        command="vbench2 evaluate --videos_path DIR/D --dimension D",
    ),
}


@dataclass(frozen=True)
class SuiteVideo:
    """A video that a suite asks for."""

    name: str
    """Path below the folder."""
    prompt: str
    """The suite's own text, which the file is named after."""
    text: str
    """The text to generate: the prompt, or its extended text."""

    @property
    def noise(self) -> int:
        """Key of its noise, from the name alone: equal for base and aligned, whatever else is generated."""
        return int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=6).digest(), "little")


def suite_of(given: str) -> tuple[str, Path]:
    """Find a suite and its prompt list by NAME (an installed package) or NAME=PATH (a checkout, or the list).

    Raises ConfigurationError if there is none.
    """
    name, equals, where = given.partition("=")
    if name not in SUITES:
        raise ConfigurationError(f"--suite: unknown suite {name!r}; there are {', '.join(SUITES)}")
    suite = SUITES[name]
    if equals:
        path = local_path(where, "--suite")
        folders = [path, path / suite.package, path / "VBench-2.0" / suite.package]
        places = [path, *(folder / suite.info for folder in folders)]
    else:
        spec = find_spec(suite.package)
        places = [Path(root) / suite.info for root in (spec and spec.submodule_search_locations) or ()]
    for place in places:
        if place.is_file():
            return name, place
    raise ConfigurationError(
        f"--suite: {where or f'the package {suite.package}'} has no {suite.info}; pip install --no-deps "
        f"{suite.package}, or name a checkout of it: --suite {name}=PATH"
    )


def dimensions_of(info: Path) -> list[str]:
    """The dimensions of a suite's list of prompts. Raises ValueError for another file."""
    records = read_json(info)
    if not (
        isinstance(records, list)
        and all(isinstance(r, dict) and isinstance(r.get("dimension"), list) for r in records)
    ):
        raise ValueError(f"{info}: not a suite's list of prompts, each with its dimensions")
    return list(dict.fromkeys(own for record in records for own in record["dimension"]))


def suite_videos(
    name: str, info: Path, dimensions: Sequence[str] = (), extended_texts: Path | None = None
) -> list[SuiteVideo]:
    """Every video that a suite asks for, prompt by prompt in the order of its list.

    Args:
        dimensions: names of those to include; empty: all.
        extended_texts: file with extended texts of all prompts of the list (`kvpo.prompt_files.extended`).

    Raises:
        ValueError: a list of another form, unknown dimensions, texts that do not match, or file names that
            are invalid or shared by two prompts.
    """
    suite = SUITES[name]
    short = examine(info, num_frames=1)
    if short.problems:
        raise ValueError(short.problems[0])
    known = dimensions_of(info)
    if unknown := [own for own in dimensions if own not in known]:
        raise ConfigurationError(
            f"--dimensions: {name} has no {named_list(unknown)}; there are {', '.join(known)}"
        )
    records = read_json(info)
    long = short if extended_texts is None else extended(short, extended_texts, num_frames=1)
    wanted: dict[tuple[str, str], set[str]] = {}
    texts: dict[tuple[str, str], tuple[str, str]] = {}
    for record, one, other in zip(records, short.prompts, long.prompts, strict=True):
        prompt, text = record.get("prompt_en", one.segments[0]), other.segments[0]
        for own in [own for own in record["dimension"] if own in (dimensions or known)]:
            key = (own if suite.folders else "", prompt[: suite.letters])
            wanted.setdefault(key, set()).add(own)
            if texts.setdefault(key, (prompt, text))[0] != prompt:
                raise ValueError(f"{info}: {texts[key][0]!r} and {prompt!r} have one file name")
    found = []
    for (folder, stem), own in wanted.items():
        prompt, text = texts[folder, stem]
        for n in range(max(suite.more.get(dimension, suite.copies) for dimension in own)):
            file = f"{stem}-{n}.mp4"
            if "/" in file or "\0" in file or len(file.encode()) > LONGEST_NAME:
                raise ValueError(f"{info}: no file can be called {file[:60]!r}")
            found.append(SuiteVideo(f"{folder}/{file}" if folder else file, prompt, text))
    return found


def demand_case(out: Path, videos: Sequence[SuiteVideo]) -> None:
    """Raise StorageError if names differ only in case and the file system does not distinguish them."""
    twins: dict[str, str] = {}
    for video in videos:
        if (other := twins.setdefault(video.name.casefold(), video.name)) != video.name:
            probe = out / f"{TEMPORARY_PREFIX}case"
            probe.touch()
            one = (out / probe.name.upper()).exists()
            probe.unlink()
            if one:
                raise StorageError(
                    f"{out}: this disk keeps {other!r} and {video.name!r} in one file; use one that tells "
                    "upper from lower case"
                )
            return


def generate_suite(
    config: Config,
    out: Path | str,
    given: str,
    *,
    dimensions: Sequence[str] = (),
    extended_texts: Path | None = None,
    run: Path | None = None,
    checkpoint: str | int | Path | None = None,
    weights: str = "average",
) -> list[Path]:
    """Generate a suite's videos into ``out``/base and, with a run, ``out``/aligned; returns these folders.

    Continues where it was stopped. The folders hold nothing but videos; ``base.json`` and ``aligned.json``
    next to them describe each file. Base and aligned use the same noise.

    Raises:
        ConfigurationError: no such suite or dimension.
        ValueError: see `suite_videos`.
        StorageError: ``out`` cannot be written, or was begun with other settings.
    """
    check(config)
    name, info = suite_of(given)
    videos = suite_videos(name, info, dimensions, extended_texts)
    frames = source_of(config).reading(config)["num_frames"]
    out = local_path(out, "out")
    record: dict[str, Any] = {
        "suite": name,
        "list": hashlib.sha256(info.read_bytes()).hexdigest(),
        "dimensions": list(dimensions) or dimensions_of(info),
        "seed": config.seed,
        "kvpo": __version__,
        "videos": {v.name: {"prompt": v.prompt, "text": v.text, "noise": v.noise} for v in videos},
    }
    flickering = SUITES[name].flickering if "temporal_flickering" in record["dimensions"] else ""
    for caution in filter(None, (SUITES[name].caution, flickering)):
        logger.warning("%s: %s", name, caution)
    with joined_ranks(config.device) as ranks, computing(config), ExitStack() as stack:
        with ranks.together("loading the generator"):
            path = checkpoint_of(run, checkpoint, ranks)
            asked = [VideoPrompt(v.noise, (v.text,), (), frames) for v in videos]
            backbone = load_backbone(config, asked)
            record |= {"base": backbone.weights.base_sha256, **_shape(backbone, frames)}
            late = (GEOMETRY_SETTING, "stream.size")  # folders begun before these were recorded lack them
            record["settings"] = {k: v for k, v in settings_of(config).items() if k not in late}
            arms = opened_arms(backbone, path, weights)
        held = stack.enter_context
        ranks.once("preparing the folder", lambda: (make_directory(out), held(claimed(out))))
        for arm, side in arms.items():
            own = record | ({"checkpoint": identity_of(path, weights)} if path and arm == "aligned" else {})
            ranks.once("preparing the folder", lambda own=own, arm=arm: _prepare(out, arm, own, videos))
            with ranks.together(f"generating {arm}"), side():
                _fill(ranks, backbone, out, arm, list(zip(videos, asked, strict=True)))
    return [out / arm for arm in arms]


def _shape(backbone: Backbone, latent_frames: int) -> dict[str, Any]:
    """Frames, frames per second, height and width of the files."""
    size = frame_size(backbone.generator, backbone.codec)
    scale = enlargement(size)
    return {
        "frames": pixel_frame(latent_frames, backbone.codec.frames_per_latent),
        "rate": backbone.codec.frames_per_second,
        "size": [side * scale + side * scale % 2 for side in size],
    }


def _prepare(out: Path, arm: str, record: Mapping[str, Any], videos: Sequence[SuiteVideo]) -> None:
    """Make the folders of an arm, or demand that they were begun with the same settings."""
    for folder in {out, *((out / arm / video.name).parent for video in videos)}:
        make_directory(folder)
    remove_leftovers(out)
    demand_case(out, videos)
    manifest = out / f"{arm}.json"
    if manifest.exists():
        before = read_json(manifest)
        if changed := [key for key in record if before.get(key) != record[key]]:
            raise StorageError(
                f"{manifest}: {out / arm} was begun with other {named_list(changed)}; choose another --out"
            )
    elif any(path.is_file() for path in (out / arm).rglob("*")):
        raise StorageError(
            f"{out / arm} holds files, and no {manifest.name} is beside it; choose another --out"
        )
    else:
        write_json(manifest, record, ensure_ascii=False)


def _fill(
    ranks: Ranks,
    backbone: Backbone,
    out: Path,
    arm: str,
    videos: Sequence[tuple[SuiteVideo, VideoPrompt]],
) -> None:
    """Make the videos that an arm lacks; ranks share the prompts."""
    # Videos of one prompt share a batch, so that batches do not depend on the other prompts.
    prompts = [(Path(video.name).parent, video.prompt) for video, _ in videos]
    share = ranks.share(list(lockstep_batches(prompts, VIDEOS_TOGETHER)))
    with progress_bars(shown=ranks.main) as show:
        for done, batch in enumerate([videos[n] for n in index] for index in share):
            show(f"generating {arm}", done, len(share))
            if all((out / arm / video.name).exists() for video, _ in batch):
                continue
            latents = backbone.latents([asked for _, asked in batch], backbone.tape("generation"))
            for (video, _), own in zip(batch, latents, strict=True):
                frames = as_bytes(pixels_of(backbone.codec, own[None])[0])
                _write(out, out / arm / video.name, frames, backbone.codec.frames_per_second)
        show(f"generating {arm}", len(share), len(share))


def _write(out: Path, path: Path, frames: Any, rate: float) -> None:
    """Write a video atomically: next to the folder first, then moved into place."""
    temporary = out / f"{temporary_name()}.mp4"
    try:
        write_video(temporary, frames, rate, scale=enlargement(frames.shape[1:3]))
        os.replace(temporary, path)
    except OSError as error:
        raise storage_error(path, error) from error
