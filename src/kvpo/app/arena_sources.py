"""The arms of a study: videos of runs, of checkpoints, of folders, and of the branches of a fork."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import av

from kvpo.app.build import source_of
from kvpo.app.configuration import resolve_run
from kvpo.app.generate import generate
from kvpo.app.video_folder import file_segments, find_videos
from kvpo.arena.study import Scene
from kvpo.config import Config
from kvpo.files import json_lines, local_path, read_json
from kvpo.prompts import VideoPrompt
from kvpo.report.record import read_videos
from kvpo.report.video import enlargement, read_video, write_video
from kvpo.training.checkpoint import find_checkpoint, no_improvement

logger = logging.getLogger(__name__)

BASE, ALIGNED, BRANCHES = "base", "aligned", "branches"
SIDES = (BASE, ALIGNED)
BRANCH_RATE = 8.0
"""Frames per second at which branches of the report play."""


@dataclass(frozen=True)
class Given:
    """A source as given on the command line: ``[NAME=]PATH[:base|:aligned|:branches]``."""

    path: Path
    name: str
    part: str = ""

    @property
    def run(self) -> Path | None:
        """The directory of the run, if the source is a run or one of its checkpoints; else None."""
        folder = self.path.absolute().parent
        of_run = folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file()
        whole = folder.parent if of_run else self.path
        return whole if (whole / "config.yaml").is_file() and self.path.is_dir() else None


def parse_source(text: str) -> Given:
    """Parse a source. Raises ValueError if there is no such directory, run or part."""
    name, equals, rest = text.partition("=")
    if not equals or "/" in name:
        name, rest = "", text
    where, colon, part = rest.rpartition(":")
    if not colon or part not in (*SIDES, BRANCHES):
        where, part = rest, ""
    path = local_path(where, "SOURCE")
    if not path.is_dir():
        raise ValueError(
            f"{where}: no such directory; an arm is a run, one of its checkpoints or a folder of videos, "
            "followed by :base, :aligned or :branches where it holds several"
        )
    given = Given(path, name or path.resolve().name, part)
    if part == BRANCHES and not (path / BRANCHES).is_dir():
        raise ValueError(f"{where}: holds no {BRANCHES}; a run writes them at its end")
    return given


@dataclass(frozen=True)
class Shot:
    """One video of an arm."""

    path: Path
    segments: tuple[str, ...]
    starts: tuple[float, ...] = ()


Arms = Mapping[str, Sequence[Shot]]


def arms_of(sources: Sequence[Given], prompts: Path | None, count: int, folder: Path) -> Arms:
    """Arm -> its videos. Videos that have to be generated, for ``count`` prompts, go into ``folder``.

    A source with a base and an aligned side contributes both if it is the only source, else its aligned side.

    Raises:
        ValueError: two arms share a name; a run, folder or prompt file cannot be used; the best checkpoint of
            a run is its base.
    """
    _demand_trained(sources)
    first = next((given.run for given in sources if given.run and given.part != BRANCHES), None)
    config = None if first is None else resolve_run(first)
    wanted: Path | list[VideoPrompt] | None = prompts
    if config is not None and prompts is None:
        wanted = _test_prompts(config, count)
    arms: dict[str, Sequence[Shot]] = {}
    for number, given in enumerate(sources):
        if given.part == BRANCHES:
            found: Arms = _branches(given.path, folder / f"{number}")
        elif given.run is not None:
            assert config is not None and wanted is not None
            found = _generated(given, config, wanted, folder / f"{number}")
        else:
            found = _of_folder(given.path, prompts)
        for name, shots in _named(given, found, alone=len(sources) == 1).items():
            if name in arms:
                raise ValueError(f"two arms are called {name!r}; name them: ONE={given.path} OTHER=…")
            arms[name] = shots
    return arms


def _named(given: Given, found: Arms, alone: bool) -> Arms:
    """The arms that a source stands for."""
    if given.part == BRANCHES or set(found) == {""}:
        return {name or given.name: shots for name, shots in found.items()}
    if given.part:
        return {f"{given.name} {given.part}": found[given.part]}
    return found if alone else {given.name: found[ALIGNED]}


def _test_prompts(config: Config, count: int) -> list[VideoPrompt]:
    """The first test prompts of a run, alternating between kinds."""
    kinds = list(source_of(config).split(config)[2].values())
    mixed = [kind[n] for n in range(max(map(len, kinds))) for kind in kinds if n < len(kind)]
    return mixed[:count]


def _demand_trained(sources: Sequence[Given]) -> None:
    """Raise ValueError if a run stands for its aligned model, but its best checkpoint is its base."""
    for given in sources:
        if given.run == given.path and given.part not in (BASE, BRANCHES):
            directory = given.path / "checkpoints"
            if (refusal := no_improvement(find_checkpoint(directory, None), None)) is not None:
                latest = find_checkpoint(directory, "latest")
                raise ValueError(f"{refusal}; give {latest} {given.path}:base to compare it")


def _generated(given: Given, common: Config, prompts: Path | list[VideoPrompt], out: Path) -> Arms:
    """Generate the videos of a run, or of its base alone, on the noise tape that all arms share."""
    run = given.run
    assert run is not None
    config = replace(resolve_run(run), seed=common.seed)
    checkpoint = None if run == given.path else given.path.name
    logger.info("generating the videos of %s", given.path)
    if given.part == BASE:
        generate(config, out, prompts=prompts)
        return {BASE: _of_folder(out, None)[""]}
    generate(config, out, prompts=prompts, run=run, checkpoint=checkpoint)
    return _of_folder(out, None)


def _of_folder(folder: Path, prompts: Path | None) -> Arms:
    """The videos of a folder: both sides, as `kvpo generate` writes them, or those of one unnamed arm."""
    files = find_videos(folder)
    told = file_segments(prompts, folder, files)
    if told is None:
        raise ValueError(
            f"{folder}: nothing says which prompts these videos show; give --prompts, a .json file that maps "
            "file names to prompts"
        )
    starts = _starts(folder)
    shots = [
        Shot(file, tuple(segments), starts.get((file.stem.partition("-")[0], tuple(segments)), ()))
        for file, segments in zip(files, told, strict=True)
    ]
    sides = {side: [shot for shot in shots if shot.path.stem.endswith(f"-{side}")] for side in SIDES}
    if sum(map(len, sides.values())) == len(shots) and all(sides[side] for side in SIDES):
        return sides
    return {"": shots}


def _starts(folder: Path) -> dict[tuple[str, tuple[str, ...]], tuple[float, ...]]:
    """(number in the file's name, segments) -> starts of the segments, from ``prompts.jsonl``."""
    path = folder / "prompts.jsonl"
    found = {}
    records = [record for _, record in json_lines(path)] if path.is_file() else []
    for number, record in enumerate(records):
        if record and {"segments", "switches", "num_frames"} <= set(record):
            shares = tuple(frame / record["num_frames"] for frame in (0, *record["switches"]))
            digits = max(3, len(str(len(records) - 1)))
            found[f"{number:0{digits}d}", tuple(record["segments"])] = shares
    return found


def _branches(run: Path, folder: Path) -> Arms:
    """The branches of a run's forks as arms, by name."""
    listing = read_json(run / BRANCHES / f"{BRANCHES}.json")
    entries = [entry for kind in listing.values() for entry in kind]
    keys = [member["video"] for entry in entries for member in entry["members"]]
    problems: list[str] = []
    folder.mkdir()
    for key, frames in read_videos(run / BRANCHES / f"{BRANCHES}.safetensors", keys, problems):
        scale = enlargement(frames.shape[1:3])
        write_video(folder / f"{key}.mp4", frames, BRANCH_RATE, scale=scale)
    if problems:
        raise ValueError(problems[0])
    arms: dict[str, list[Shot]] = {}
    for entry in entries:
        starts = tuple(frame / entry["num_frames"] for frame in (0, *entry["switches"]))
        for member in entry["members"]:
            shot = Shot(folder / f"{member['video']}.mp4", tuple(entry["prompt_segments"]), starts)
            arms.setdefault(member["name"], []).append(shot)
    return arms


def scenes_of(arms: Arms, folder: Path) -> tuple[list[Scene], dict[str, Path]]:
    """The scenes that at least two arms share, and their videos by digest.

    Videos are matched by prompt, the n-th of one arm with the n-th of the others. Those that browsers cannot
    play are re-encoded into ``folder``.

    Raises:
        ValueError: fewer than two arms, no common prompt, or all videos are equal.
    """
    if len(arms) < 2:
        raise ValueError(
            f"one arm alone, {next(iter(arms), 'of none')}, has nothing to be compared with; name another "
            "run, checkpoint or folder"
        )
    met: dict[tuple[tuple[str, ...], int], dict[str, Shot]] = {}
    for arm, shots in arms.items():
        seen: dict[tuple[str, ...], int] = {}
        for shot in shots:
            number = seen[shot.segments] = seen.get(shot.segments, -1) + 1
            met.setdefault((shot.segments, number), {})[arm] = shot
    shared = {key: shots for key, shots in met.items() if len(shots) > 1}
    if not shared:
        raise ValueError(
            f"{', '.join(arms)}: no prompt is shown by two of them; make their videos of one file"
        )
    if lonely := len(met) - len(shared):
        logger.warning("%d of %d prompts are shown by one arm alone and left out", lonely, len(met))
    scenes, videos = [], {}
    for (segments, _), shots in shared.items():
        digests, rates = {}, []
        for arm, shot in shots.items():
            path, rate = playable(shot.path, folder)
            with path.open("rb") as file:
                digests[arm] = hashlib.file_digest(file, "sha256").hexdigest()
            videos[digests[arm]] = path
            rates.append(rate)
        starts = next((shot.starts for shot in shots.values() if shot.starts), ())
        scenes.append(Scene(segments, digests, starts, max(rates)))
    if all(len(set(scene.videos.values())) == 1 for scene in scenes):
        raise ValueError(f"{', '.join(arms)} show the same videos: there is nothing to compare")
    return scenes, videos


def playable(path: Path, folder: Path) -> tuple[Path, float]:
    """A video in a form that browsers play (H.264 in mp4), re-encoded if needed, and its frames per second.

    Raises:
        ValueError: the file cannot be read as a video.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0] if container.streams.video else None
            if stream is not None and stream.average_rate and "mp4" in container.format.name:
                codec = stream.codec_context
                if codec.name == "h264" and codec.pix_fmt == "yuv420p":
                    return path, float(stream.average_rate)
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from error
    frames, rate = read_video(path)
    again = folder / f"{hashlib.sha256(str(path).encode()).hexdigest()[:24]}.mp4"
    write_video(again, frames, rate)
    return again, rate


def described(sources: Sequence[Given], prompts: Path | None, ranked: bool) -> str:
    """Describe the sources of a study in one line that tells it from others."""
    words = [f"{one.name}={one.path.resolve()}{':' * bool(one.part)}{one.part}" for one in sources]
    where = None if prompts is None else str(prompts.resolve())
    return json.dumps([words, where, ranked], ensure_ascii=False)
