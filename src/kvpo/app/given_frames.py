"""Given first frames: the image or video that a generated video begins with, encoded by the codec."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kvpo.engine.generator import frame_size, pixel_frame
from kvpo.files import local_path, read_json
from kvpo.models.finite import require_finite
from kvpo.prompts import VideoPrompt
from kvpo.rewards.images import fit_and_crop
from kvpo.training.backbone import Backbone

logger = logging.getLogger(__name__)


def with_given_frames(backbone: Backbone, frames: Path | None, prompts: Sequence[VideoPrompt]) -> Backbone:
    """A backbone that begins videos of these prompts with given frames: their own, or those of ``frames``.

    ``frames`` is an image (held for one block), a video (taken in whole blocks at the codec's rate), or a
    JSON file that maps the first texts of prompts to such files, relative to its folder. Frames are scaled to
    cover the generator's size and centre-cropped.

    Raises:
        ValueError: a file cannot be read or is shorter than a block; prompts have frames of their own and
            ``frames`` is given too; the JSON file lacks a prompt; or nothing is left to generate.
    """
    files, field = _files(frames, prompts), "frames" if frames is None else "--frames"
    encoded = {path: _encoded(backbone, path, field) for path in dict.fromkeys(files.values())}
    for prompt in prompts:
        path = files.get(prompt.id)
        if path is not None and (given := len(encoded[path])) >= prompt.num_frames:
            raise ValueError(
                f"{field}: {path} fills {given} latent frames and prompt {prompt.id} has "
                f"{prompt.num_frames}: nothing is left to generate; give fewer frames or a longer video"
            )
    return replace(backbone, given={id: encoded[path] for id, path in files.items()})


def _files(frames: Path | None, prompts: Sequence[VideoPrompt]) -> dict[int, Path]:
    """The file of every prompt that has one, by its id."""
    own = {prompt.id: prompt.frames for prompt in prompts if prompt.frames is not None}
    if frames is None:
        return own
    if own:
        raise ValueError(
            f"--frames: {len(own)} of {len(prompts)} prompts have frames of their own, such as "
            f"{next(iter(own.values()))}; leave --frames out, or those of the prompt file"
        )
    frames = local_path(frames, "--frames")
    if frames.suffix.lower() != ".json":
        return {prompt.id: frames for prompt in prompts}
    try:
        table = read_json(frames)
    except ValueError as error:
        raise ValueError(f"--frames: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise ValueError(f"--frames: {frames} is not a JSON object that maps prompts to images or videos")
    if absent := [prompt.segments[0] for prompt in prompts if prompt.segments[0] not in table]:
        raise ValueError(f"--frames: {frames} has no frames for {len(absent)} prompts, such as {absent[0]!r}")
    return {prompt.id: frames.parent / table[prompt.segments[0]] for prompt in prompts}


def _encoded(backbone: Backbone, path: Path, field: str) -> Tensor:
    """Latents ``[T, C, H, W]`` of a file, in whole blocks; error messages begin with ``field``."""
    generator, codec = backbone.generator, backbone.codec
    block, per_latent, rate = generator.block, codec.frames_per_latent, codec.frames_per_second
    from kvpo.rewards.video_files import probe, read_frames  # late import: needs OpenCV

    if not path.is_file():
        raise ValueError(f"{field}: {path} is not a file; give an image or a video")
    try:
        video = probe(path)
        if video.num_frames == 1:
            shown = [0] * pixel_frame(block, per_latent)
        else:
            count = max(1, round(video.num_frames * rate / video.frame_rate))
            blocks = (1 + (count - 1) // per_latent) // block
            shown = [
                min(int(n * video.frame_rate / rate + 0.5), video.num_frames - 1)
                for n in range(pixel_frame(blocks * block, per_latent))
            ]
            if not shown:
                needed = pixel_frame(block, per_latent)
                raise ValueError(
                    f"{count} frames at {rate:g} per second, and a block takes {needed}; give a longer "
                    "video, or an image"
                )
            if len(shown) < count:
                logger.warning(
                    "%s: the last %d of %d frames at %g per second fill no block and are left out",
                    path, count - len(shown), count, rate,
                )  # fmt: skip
        height, width = frame_size(generator, codec)
        distinct = sorted(set(shown))
        read = read_frames(video, distinct, 4 * height * width)
    except ValueError as error:
        raise ValueError(f"{field}: {path}: {error}") from error
    ready = torch.cat(
        [fit_and_crop(torch.from_numpy(image).movedim(-1, 0)[None] / 255, height, width) for image in read]
    )
    clip_TCHW = ready[[distinct.index(n) for n in shown]]
    with torch.no_grad():
        latents_TCHW = codec.encode(clip_TCHW[None].to(generator.device))[0]
    require_finite({str(path): latents_TCHW}, "encoded frames", "check the weights and precision of the VAE")
    return latents_TCHW
