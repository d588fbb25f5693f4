"""Videos that begin with a given image or video: world and Wan family, generated, selected and evaluated."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kvpo.app.build import build_setup, load_backbone
from kvpo.app.configuration import resolve_run
from kvpo.app.evaluate import evaluate
from kvpo.app.generate import Best, generate
from kvpo.app.given_frames import with_given_frames
from kvpo.config import Config
from kvpo.engine.generator import pixel_frame, pixels_of
from kvpo.files import read_json
from kvpo.prompt_files import examine
from kvpo.prompts import VideoPrompt
from kvpo.report.video import write_video
from tests.app.finished import command
from tests.tiny_wan import tiny_flags, tiny_wan
from tests.tiny_world import tiny_config

PROMPTS = [VideoPrompt(n, (text,), (), 12) for n, text in enumerate(("a red circle", "a blue square"))]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A picture, wider than high, whose left and right ends a square does not show."""
    pixels = np.zeros((64, 256, 3), np.uint8)
    pixels[:, 64:192] = [200, 40, 90]
    Image.fromarray(pixels).save(tmp_path / "still.png")
    return tmp_path / "still.png"


def clip_of(path: Path, frames: int, rate: float, size: int = 64) -> np.ndarray:
    """Frames of single colours that grow brighter, written as a video."""
    pixels = np.stack([np.full((size, size, 3), 20 + 200 * n // frames, np.uint8) for n in range(frames)])
    write_video(path, pixels, rate)
    return pixels


def latents(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "latents.safetensors")


def plain_and_begun(config: Config, frames: Path, out: Path, **given: object) -> list[torch.Tensor]:
    """Latents of the first prompt without given frames and with them."""
    made = []
    for name, own in (("plain", None), ("begun", frames)):
        generate(config, out / name, prompts=PROMPTS, frames=own, **given)
        made.append(latents(out / name)["000"])
    return made


def test_an_image_stands_still_for_a_block(tiny_base: Path, tmp_path: Path, image: Path) -> None:
    """Its middle, covering the frame; what follows depends on it, and what begins without it does not."""
    config = tiny_config(tiny_base)
    plain, begun = plain_and_begun(config, image, tmp_path)
    codec = load_backbone(config).codec
    colour = torch.tensor([200, 40, 90])[:, None, None] / 255
    expected = codec.encode(colour.expand(1, 3, 3, 48, 48))[0]
    assert torch.allclose(begun[:3], expected, atol=1e-4)
    assert not torch.allclose(begun[3:], plain[3:], atol=1e-3)
    table = tmp_path / "frames.json"
    table.write_text(json.dumps({PROMPTS[0].segments[0]: "still.png", PROMPTS[1].segments[0]: "still.png"}))
    generate(config, tmp_path / "table", prompts=PROMPTS, frames=table)
    assert torch.equal(latents(tmp_path / "table")["000"], begun)


def test_an_edit_of_a_few_pixels_is_told(tiny_base: Path, image: Path) -> None:
    """Unfinished work must not be continued with a picture that was edited since."""
    backbone, found = load_backbone(tiny_config(tiny_base)), []
    edited = np.asarray(Image.open(image)).copy()
    for value in (40, 41, 40):
        edited[40:44, 140:144, 1] = value
        Image.fromarray(edited).save(image)
        found.append(with_given_frames(backbone, image, PROMPTS).given_digest)
    assert found[0] == found[2] != found[1]
    assert backbone.given_digest not in found


@pytest.mark.parametrize("span", [0, 1])
def test_selection_begins_with_them_too(tiny_base: Path, tmp_path: Path, image: Path, span: int) -> None:
    config = tiny_config(tiny_base, rewards__scorers=("tests.tiny_world:toy",))
    best = Best(2, span=span, explorer="fresh")
    generate(config, tmp_path / "plain", prompts=PROMPTS, frames=image)
    generate(config, tmp_path / "best", prompts=PROMPTS, frames=image, best=best)
    ours, base = (latents(tmp_path / name)["000"] for name in ("best", "plain"))
    assert torch.equal(ours[:3], base[:3])
    (scores,) = read_json(tmp_path / "best" / "best-of.json")["0"].values()
    assert len(scores) == (3 if span else 1)
    unchanged = all(own[0] >= max(own) for own in scores)
    assert unchanged == (span == 0) and torch.allclose(ours, base, atol=1e-5) == unchanged


def test_a_video_is_taken_in_whole_blocks_at_the_codecs_rate(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """14 frames at 16 per second are 7 at 8, and two blocks of three."""
    pixels = clip_of(tmp_path / "clip.mp4", 14, 16.0)
    config = tiny_config(tiny_base)
    backbone = load_backbone(config)
    begun = with_given_frames(backbone, tmp_path / "clip.mp4", PROMPTS).given
    shown = pixels_of(backbone.codec, begun[0][None])[0].mean((1, 2, 3))
    expected = backbone.codec.encode(torch.from_numpy(pixels[[0, 2, 4, 6, 8, 10]]).movedim(-1, 1)[None] / 255)
    assert begun[0].shape[0] == 6 and begun.keys() == {0, 1}
    assert torch.allclose(shown, pixels_of(backbone.codec, expected)[0].mean((1, 2, 3)), atol=0.03)
    assert "the last 1 of 7 frames at 8 per second fill no block and are left out" in caplog.text


@pytest.mark.parametrize("preset", ["longlive-1.3b", "memflow-1.3b"])
def test_public_generators_extend_images_and_videos(tmp_path: Path, image: Path, preset: str) -> None:
    config = tiny_wan(preset, tmp_path)
    plain, begun = plain_and_begun(config, image, tmp_path)
    codec = load_backbone(config, PROMPTS).codec
    empty = torch.zeros(1, 1, *plain.shape[1:])
    height, width = codec.decode(empty).shape[-2:]
    colour = torch.tensor([200, 40, 90])[:, None, None] / 255
    still = colour.expand(1, pixel_frame(3, codec.frames_per_latent), 3, height, width)
    assert torch.allclose(begun[:3], codec.encode(still)[0], atol=1e-4)
    assert not torch.equal(begun[3:], plain[3:])
    count = pixel_frame(6, codec.frames_per_latent)
    clip_of(tmp_path / "clip.mp4", count, codec.frames_per_second)
    given = with_given_frames(load_backbone(config, PROMPTS), tmp_path / "clip.mp4", PROMPTS).given
    assert given[1].shape == (6, *plain.shape[1:])


def test_evaluation_scores_what_follows(run: Path, image: Path) -> None:
    numbers = evaluate(run, checkpoint="latest", frames=image)
    assert numbers["frames"] == str(image)
    setup = build_setup(resolve_run(run))
    prompts = setup.test["short"]
    backbone = with_given_frames(setup.backbone, image, prompts)
    made = backbone.latents(prompts, setup.evaluation_tape())
    video = pixels_of(backbone.codec, made)[:, 3:]
    scores = sum(setup.judges.scorer(video, [prompt.segments[0] for prompt in prompts]).values())
    assert float(scores.mean()) == pytest.approx(numbers["held_out"]["short"]["base_mean"], abs=1e-5)


def test_prompts_may_bring_frames_of_their_own(
    tiny_base: Path, tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Videos are those that --frames gives; prompts without begin with noise; the list can be used again."""
    config = tiny_config(tiny_base)
    records = [{"prompt": p.segments[0], "num_frames": 12} for p in PROMPTS]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "p.json").write_text(json.dumps([records[0] | {"frames": "../still.png"}, records[1]]))
    plain, begun = plain_and_begun(config, image, tmp_path)
    generate(config, tmp_path / "own", prompts=tmp_path / "in" / "p.json")
    own = latents(tmp_path / "own")
    assert torch.allclose(own["000"], begun, atol=1e-5) and not torch.allclose(own["000"], plain, atol=1e-3)
    assert torch.allclose(own["001"], latents(tmp_path / "plain")["001"], atol=1e-5)
    generate(config, tmp_path / "again", prompts=tmp_path / "own" / "prompts.jsonl")
    assert torch.equal(latents(tmp_path / "again")["000"], own["000"])
    with pytest.raises(
        ValueError, match="--frames: 1 of 2 prompts have frames of their own, such as .*still.png"
    ):
        generate(config, tmp_path / "both", prompts=tmp_path / "in" / "p.json", frames=image)
    clip_of(tmp_path / "in" / "long.mp4", 12, 8.0)
    (tmp_path / "in" / "q.csv").write_text("prompt,frames\na red circle,long.mp4\n")
    with pytest.raises(ValueError, match="^frames: .*in/long.mp4 fills 12 latent frames and prompt 0 has 12"):
        generate(config, tmp_path / "full", prompts=examine(tmp_path / "in" / "q.csv", num_frames=12).prompts)
    flags = tiny_flags("longlive-1.3b", tmp_path)
    (tmp_path / "prompts.txt").rename(tmp_path / "prompts.csv")
    table = (tmp_path / "prompts.csv").read_text().splitlines()
    (tmp_path / "prompts.csv").write_text("\n".join(["prompt,frames", *table[1:], "last,still.png"]))
    for word in ("align", "plan"):
        out = ["--out", tmp_path / "run"] if word == "align" else []
        assert command(word, *flags, "--prompts.file", tmp_path / "prompts.csv", *out) in (1, 2)
        said = capsys.readouterr().err
        assert (
            f"prompts.csv, line {len(table) + 1}: begins with {tmp_path}/still.png, and runs train on" in said
        )
    assert not (tmp_path / "run").exists()


def test_what_cannot_begin_a_video_is_refused_with_a_line(
    tiny_base: Path, tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = load_backbone(tiny_config(tiny_base))
    clip_of(tmp_path / "short.mp4", 2, 8.0)
    clip_of(tmp_path / "long.mp4", 12, 8.0)
    (tmp_path / "few.json").write_text(json.dumps({"a red circle": image.name}))
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{'a': 1}")
    (tmp_path / "text.png").write_text("no picture")
    for name, says in (
        ("short.mp4", "2 frames at 8 per second, and a block takes 3; give a longer video, or an image"),
        ("long.mp4", "fills 12 latent frames and prompt 0 has 12: nothing is left to generate"),
        ("few.json", "has no frames for 1 prompts, such as 'a blue square'"),
        ("list.json", "is not a JSON object"),
        ("broken.json", r"broken.json: not JSON"),
        ("text.png", "damaged video: Invalid data"),
        ("none.png", "is not a file; give an image or a video"),
    ):
        with pytest.raises(ValueError, match=f"^--frames: .*{says}"):
            with_given_frames(backbone, tmp_path / name, PROMPTS)
    out = ["--out", tmp_path / "no", "--frames", image]
    assert command("generate", *out, "--suite", "vbench") == 2
    assert "--frames: not with --suite, whose videos begin with noise" in capsys.readouterr().err
    assert command("evaluate", tmp_path, "--drift", "--frames", image) == 2
    assert "--frames: not with --drift" in capsys.readouterr().err
