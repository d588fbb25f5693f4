"""`kvpo generate`: writes videos of the base or an aligned model, as mp4 files and latents."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor

from kvpo import __version__
from kvpo.app.build import checkpoint_of, load_backbone, opened_arms, source_of
from kvpo.app.configuration import flat
from kvpo.app.given_frames import with_given_frames
from kvpo.app.judges import build_scorer
from kvpo.app.origin import identity_of, settings_of
from kvpo.app.prompt_sets import prompt_file
from kvpo.app.provenance import demand_same_prompts
from kvpo.app.taken import claimed
from kvpo.app.video_folder import MANIFEST, SIDE_BY_SIDE, VIDEO_SUFFIXES
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError, check, check_explorer
from kvpo.engine.explorers import EXPLORERS
from kvpo.engine.generator import as_bytes, pixels_of
from kvpo.engine.selection import Selection
from kvpo.engine.stream import lockstep_batches
from kvpo.files import (
    StorageError,
    counted,
    demand_utf8,
    local_path,
    make_directory,
    named_list,
    new_file,
    read_json,
    remove_leftovers,
    write_atomic,
    write_json,
)
from kvpo.models.tensor_files import read_safetensors
from kvpo.progress import progress_bars
from kvpo.prompt_files import examine, extended, written
from kvpo.prompts import VideoPrompt, check_shown
from kvpo.report.video import enlargement, side_by_side, write_video
from kvpo.training.backbone import Backbone
from kvpo.training.device import computing
from kvpo.training.ranks import Ranks, joined_ranks

logger = logging.getLogger(__name__)

VIDEOS_TOGETHER = 8
"""Videos generated in one batch."""
PARTS = "latents.parts"
"""Folder of what an unfinished call needs to continue: the latents, one file per video, and its request."""
REQUEST = "request.json"
"""File in it that identifies the call."""
UNASKED = 4
"""Number of test prompts of each kind that are used if none are given."""


@dataclass(frozen=True)
class Best:
    """Test-time selection (``kvpo.engine.selection``)."""

    count: int
    """Candidates per choice, including the plain continuation."""
    rewards: tuple[str, ...] = ()
    """Rewards to choose by; empty: those of the configuration."""
    span: int = 1
    """Blocks between two choices; 0: one choice per video."""
    explorer: str = "routes"
    """Name of the explorer that makes candidates differ."""

    def selection(self, config: Config, backbone: Backbone) -> Selection:
        """The selection for a generator. Raises ConfigurationError."""
        if self.explorer not in EXPLORERS:
            raise ConfigurationError(
                f"--branches: unknown explorer {self.explorer!r}; there are {', '.join(EXPLORERS)}"
            )
        exploration = replace(config.exploration, explorer=self.explorer)
        check_explorer(replace(config, exploration=exploration), f"--branches {self.explorer}")
        if self.count < 2:
            raise ConfigurationError(f"--best-of: needs two candidates at least, got {self.count}")
        if self.rewards:
            config = replace(config, rewards=replace(config.rewards, scorers=self.rewards, weights={}))
        scorer, weights_K = build_scorer(config, backbone.codec.frames_per_second)
        parts = (backbone.generator, backbone.codec, scorer, weights_K, config.exploration)
        return Selection(*parts, EXPLORERS[self.explorer], self.count, self.span, (config.seed,))


def generate(
    config: Config,
    out: Path | str,
    *,
    prompts: Path | str | Sequence[VideoPrompt] | None = None,
    extended_texts: Path | None = None,
    run: Path | str | None = None,
    checkpoint: str | int | Path | None = None,
    weights: str = "average",
    best: Best | None = None,
    frames: Path | None = None,
) -> list[Path]:
    """Generate one video per prompt and return the paths of the mp4 files.

    ``out`` first receives ``prompts.jsonl`` and ``videos.json``, which lists the prompts of every file for
    `kvpo score`, so that the videos of a call that fails can be scored too. Their latents ([T, C, H, W] by
    file name) are joined in ``latents.safetensors`` at the end, and in ``latents.parts`` before that. The
    noise of the n-th video depends on ``config.seed`` and n alone. A call that was stopped continues if it is
    repeated, and then writes the same files as if it had not been.

    Args:
        prompts: a prompt file (see ``kvpo.prompt_files``), prompts, or None: some of the test prompts.
        extended_texts: file with extended texts of these prompts.
        run: directory of a run whose aligned model generates too; None: the base alone.
        checkpoint: checkpoint of the run: best, latest, an update number or a directory; None: the best.
        weights: the moving ``average`` of the trained weights, or the ``raw`` ones of the last update.
        best: choose among candidates by a reward; the scores go to ``best-of.json``.
        frames: an image or video that all videos begin with, or a JSON file that maps prompts to such files.

    Raises:
        ValueError: prompts, a checkpoint or base that cannot be used; a length the stream cannot have; test
            prompts that are not those of the run; weights, latents or pixels that are not finite; an ``out``
            whose name is not UTF-8.
        StorageError: ``out`` cannot be written, or holds the videos of another call or of a finished one.
    """
    check(config)
    out = local_path(out, "out")
    demand_utf8(out)
    run = None if run is None else local_path(run, "run")
    if not (out / PARTS / REQUEST).is_file():
        _demand_no_videos(out)
    if run is not None and prompts is None:
        demand_same_prompts(run, config)
    with joined_ranks(config.device) as ranks, computing(config):
        wanted = _prompts(config, prompts, extended_texts)
        return _generate(ranks, config, out, wanted, run, checkpoint, weights, best, frames)


def _generate(
    ranks: Ranks,
    config: Config,
    out: Path,
    wanted: list[VideoPrompt],
    run: Path | None,
    checkpoint: str | int | Path | None,
    weights: str,
    best: Best | None,
    frames: Path | None,
) -> list[Path]:
    """Load the generator, and write the videos of the prompts batch by batch; ranks share the batches."""
    with ranks.together("loading the generator"):
        path = checkpoint_of(run, checkpoint, ranks)
        backbone = with_given_frames(load_backbone(config, wanted), frames, wanted)
        arms = opened_arms(backbone, path, weights)
        selection = None if best is None else best.selection(config, backbone)

    names = _names(len(wanted), list(arms))
    shows = {f"{name}.mp4": wanted[n].segments for n, own in enumerate(names) for name in own}
    request = {
        "kvpo": __version__,
        "base": backbone.weights.base_sha256,
        "checkpoint": None if path is None else identity_of(path, weights),
        "prompts": [asdict(prompt) for prompt in wanted],
        "frames": backbone.given_digest,
        "seed": config.seed,
        "backbone.vae_precision": config.backbone.vae_precision,
        **settings_of(config),
    }
    if best is not None:
        chosen_by = {"exploration": config.exploration, "rewards": config.rewards}
        request |= {"best-of": asdict(best), **flat({name: asdict(own) for name, own in chosen_by.items()})}
    with ExitStack() as held:
        ranks.once("preparing the folder", lambda: _prepare(held, out, request, wanted, shows))
        _fill(ranks, backbone, arms, selection, out, wanted, names)
        made = [name for own in names for name in own[: len(arms)]]
        scored = range(len(wanted) if selection is not None else 0)
        ranks.once("joining latents", lambda: _join_parts(out, made, scored))
    return [out / name for name in sorted(shows)]


def _fill(
    ranks: Ranks,
    backbone: Backbone,
    arms: Mapping[str, Callable[[], AbstractContextManager[None]]],
    selection: Selection | None,
    out: Path,
    wanted: Sequence[VideoPrompt],
    names: Sequence[Sequence[str]],
) -> None:
    """Make the videos that the folder lacks, in the batches in which all would be made; ranks share them."""
    batches = list(lockstep_batches([prompt.num_frames for prompt in wanted], VIDEOS_TOGETHER))
    share, tape = ranks.share(batches), backbone.tape("generation")
    with ranks.together("generating"), progress_bars(shown=ranks.main) as show:
        done, total = 0, sum(map(len, share))
        for batch in ([wanted[n] for n in index] for index in share):
            show("generating", done, total)
            done += len(batch)
            if all(_is_made(out, names[prompt.id], len(arms)) for prompt in batch):
                continue
            latents = []
            scores: dict[int, dict[str, Any]] = {prompt.id: {} for prompt in batch}
            for arm, side in arms.items():
                with side():
                    if selection is None:
                        latents.append(backbone.latents(batch, tape))
                        continue
                    texts, given = backbone.texts(batch), backbone.given
                    found = [selection.best(one, texts, tape, given.get(one.id)) for one in batch]
                latents.append(torch.stack([one.latents_TCHW for one in found]))
                for prompt, one in zip(batch, found, strict=True):
                    scores[prompt.id][arm] = one.scores
            for row, prompt in enumerate(batch):
                if selection is not None:
                    write_atomic(_scores_file(out, prompt.id), json.dumps(scores[prompt.id]))
                _write_videos(backbone, out, names[prompt.id], [of_side[row] for of_side in latents])
        show("generating", done, total)


def _names(prompts: int, arms: Sequence[str]) -> list[list[str]]:
    """Names of every prompt's videos: one per arm, then that of both side by side if there are two."""
    digits = max(3, len(str(prompts - 1)))
    ends = [""] if len(arms) == 1 else [*(f"-{arm}" for arm in arms), SIDE_BY_SIDE]
    return [[f"{n:0{digits}d}{end}" for end in ends] for n in range(prompts)]


def _prepare(
    held: ExitStack,
    out: Path,
    request: dict[str, Any],
    wanted: Sequence[VideoPrompt],
    shows: dict[str, tuple[str, ...]],
) -> None:
    """Begin a folder with the files that say what its videos show, or continue one of the same request.

    The folder stays claimed until ``held`` is closed.
    """
    asked = json.loads(json.dumps(request, default=str))
    if not (out / PARTS / REQUEST).is_file():
        _demand_no_videos(out)
    make_directory(out)
    make_directory(out / PARTS)
    held.enter_context(claimed(out))
    if (out / PARTS / REQUEST).is_file():
        before = read_json(out / PARTS / REQUEST)
        if changed := [key for key in asked | before if before.get(key) != asked.get(key)]:
            raise StorageError(
                f"{out} holds unfinished videos of a call with other {named_list(changed)}; repeat that call "
                "to finish them, or choose another --out"
            )
        logger.info("%s: continuing with the videos that it lacks", out)
        remove_leftovers(out)
        return
    listed = out / "prompts.jsonl"
    write_atomic(listed, written(wanted, listed))
    write_json(out / MANIFEST, dict(sorted(shows.items())), ensure_ascii=False)
    write_json(out / PARTS / REQUEST, asked, ensure_ascii=False)


def _is_made(out: Path, names: Sequence[str], arms: int) -> bool:
    """True if a prompt's videos exist, with the latents of each arm's."""
    latents = [out / PARTS / f"{name}.safetensors" for name in names[:arms]]
    return all(path.is_file() for path in [*latents, *(out / f"{name}.mp4" for name in names)])


def _scores_file(out: Path, prompt: int) -> Path:
    """File of the scores of a prompt's candidates, until all videos are made."""
    return out / PARTS / f"{prompt}.json"


def _join_parts(out: Path, names: Sequence[str], scored: Sequence[int]) -> None:
    """Join the latents of these videos in one file, and the scores of these prompts, and remove the parts."""
    if scored:
        scores = {str(prompt): read_json(_scores_file(out, prompt)) for prompt in scored}
        write_json(out / "best-of.json", scores)
    joined: dict[str, Tensor] = {}
    for name in names:
        joined |= read_safetensors(out / PARTS / f"{name}.safetensors")
    with new_file(out / "latents.safetensors", failures=(SafetensorError,)) as file:
        save_file(joined, file)
    joined.clear()  # a network file system cannot remove files that are mapped into memory
    shutil.rmtree(out / PARTS)


def _demand_no_videos(out: Path) -> None:
    """Refuse a folder with videos: its lists and its videos must come from one call."""
    if out.exists() and not out.is_dir():
        raise StorageError(f"cannot save videos in {out}: it is a file; choose another --out")
    if there := sorted(path for path in out.glob("*") if path.suffix.lower() in VIDEO_SUFFIXES):
        raise StorageError(
            f"{out} already holds {counted(len(there), 'video')}, such as {there[0].name}; remove them, or "
            "choose another --out"
        )


def _prompts(
    config: Config, given: Path | str | Sequence[VideoPrompt] | None, extended_texts: Path | None
) -> list[VideoPrompt]:
    """Prompts to generate, numbered from 0."""
    if given is None:
        chosen = [prompt for some in source_of(config).split(config)[2].values() for prompt in some[:UNASKED]]
    elif isinstance(given, str | Path):
        how = source_of(config).reading(config)
        found = examine(prompt_file(given), **how).sound()
        if extended_texts is not None:
            found = extended(found, extended_texts, **how)
        chosen = list(found.prompts)
    else:
        chosen = list(given)
        for item in chosen:
            if not isinstance(item, VideoPrompt):
                raise ValueError(
                    f"prompts: {str(item)[:60]!r} is a {type(item).__name__}; give a file of texts, or "
                    "kvpo.prompts.VideoPrompt(0, (text,), (), frames)"
                )
        if not chosen:
            raise ValueError("prompts: empty; give one at least, or None for some of the test prompts")
    numbered = [replace(prompt, id=n) for n, prompt in enumerate(chosen)]
    block = config.stream.block
    for prompt in numbered:
        if prompt.num_frames % block:
            raise ValueError(
                f"prompt {prompt.id}: num_frames = {prompt.num_frames} is not a multiple of the block of "
                f"{block} frames"
            )
        try:
            check_shown(prompt, block)
        except ValueError as error:
            raise ValueError(f"prompt {prompt.id}: {error}") from error
    return numbered


def _write_videos(backbone: Backbone, out: Path, names: Sequence[str], pair: Sequence[Tensor]) -> None:
    """Write one prompt's latents and decoded videos: the base alone, or base, aligned and both in one."""
    for name, latents in zip(names, pair, strict=False):
        write_atomic(out / PARTS / f"{name}.safetensors", save({name: latents.contiguous()}))
    frames = [as_bytes(pixels_of(backbone.codec, latents[None])[0]) for latents in pair]
    if len(pair) == 2:
        frames.append(torch.from_numpy(side_by_side(frames)))
    scale = enlargement(frames[0].shape[1:3])
    for name, content in zip(names, frames, strict=True):
        with new_file(out / f"{name}.mp4") as file:
            write_video(file, content, backbone.codec.frames_per_second, scale=scale)
