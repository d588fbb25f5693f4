"""`kvpo calibrate`: jitter under harmless changes, on files and on generated clips."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "rewards"))
from tiny_rewards import gliding
from video_makers import encode

from kvpo.app.calibrate import Sample, demo_samples, harmless_changes, measure, noisy, reencoded, shifted
from kvpo.app.cli import main
from kvpo.app.named_rewards import named_rewards
from kvpo.rewards.protocol import Declaration
from kvpo.rewards.reward import Reward


def reward_of(function, name: str = "probe") -> Reward:
    class Scorer:
        components = (name,)

        def __call__(self, video_BTCHW, prompts):
            return {name: function(video_BTCHW)}

    declaration = Declaration(name, 0.0, 1.0, False, 1, 10**6)
    return Reward(name, Scorer(), (declaration,))


SAMPLES = [Sample(f"clip {i}", gliding(64, 96, 5, 2, 1, seed=i), 16.0, "") for i in range(3)]


def test_the_changes_are_harmless_and_what_they_say():
    video = SAMPLES[0].video_TCHW
    moved = shifted(video, 1, 0)
    assert torch.equal(moved[..., 1:], video[..., :-1]) and torch.equal(moved[..., 0], video[..., 0])
    assert torch.equal(shifted(video, 0, -1)[..., :-1, :], video[..., 1:, :])
    steps = ((noisy(video, torch.Generator().manual_seed(0)) - video) * 255).round()
    assert steps.abs().max() == 1 and (steps != 0).float().mean() == pytest.approx(2 / 3, abs=0.02)
    again = reencoded(SAMPLES[0], 18)
    assert again.shape == video.shape and 0 < (again - video).abs().mean() < 0.02
    tiny = Sample("tiny", video[..., :31, :33], 8.0, "")
    assert reencoded(tiny, 23).shape == tiny.video_TCHW.shape
    assert (reencoded(tiny, 18) - tiny.video_TCHW).abs().mean() < 0.02
    kinds = harmless_changes(SAMPLES[0], seed=1)
    assert {kind: len(versions) for kind, versions in kinds.items()} == {
        "re-encoding": 2,
        "one pixel": 4,
        "one grey level": 3,
    }


def test_a_constant_has_no_noise_and_a_known_change_is_measured():
    always = measure(reward_of(lambda v: torch.full((len(v),), 0.7)), SAMPLES[:1] * 7, 0)["probe"]
    assert always.noise_floor == always.spread_between_clips == 0, "7 x 0.7 / 7 is not 0.7 in float32"

    def whether_changed(video_BTCHW):
        """0 for the first sample's exact pixels, 1 for any other: the jitter is known."""
        exact = [torch.equal(video, SAMPLES[0].video_TCHW) for video in video_BTCHW]
        return 1 - torch.tensor(exact).float()

    noise = measure(reward_of(whether_changed), SAMPLES[:1], 0)["probe"]
    assert noise.changes["one grey level"].rms == noise.changes["one grey level"].bias == 1
    assert noise.changes["order of the batch"].largest == 0
    # 1 original and 9 changed versions; the unmoved originals of the pairs are no versions of their own
    assert noise.noise_floor == pytest.approx(torch.tensor([0.0] + [1.0] * 9).std().item())


def test_a_reward_that_looks_at_its_neighbours_is_found_out():
    noise = measure(reward_of(lambda v: v.mean((1, 2, 3, 4)) - v.mean()), SAMPLES, 0)["probe"]
    assert noise.changes["order of the batch"].largest > 0
    lit = [replace(one, video_TCHW=one.video_TCHW * (1 - n / 4)) for n, one in enumerate(SAMPLES)]
    honest = measure(reward_of(lambda v: v.mean((1, 2, 3, 4))), lit, 0)["probe"]
    assert honest.changes["order of the batch"].largest < 1e-6
    assert honest.spread_between_clips > 10 * honest.noise_floor > 0


def same(video_BTCHW, prompts):
    return torch.full((len(video_BTCHW),), 0.25)


def drawn(video_BTCHW, prompts):
    return torch.rand(len(video_BTCHW))


def dropping_out(video_BTCHW, prompts):
    return torch.nn.functional.dropout(video_BTCHW.mean((2, 3, 4)), 0.5).mean(1)


def by_place(video_BTCHW, prompts):
    return video_BTCHW.mean((1, 2, 3, 4)) + torch.arange(len(video_BTCHW))


def by_prompt(video_BTCHW, prompts):
    return torch.tensor([float(len(prompt)) for prompt in prompts])


def counted(video_BTCHW, prompts):
    return (video_BTCHW.mean((1, 2, 3, 4)) * 20).round()


def by_checksum(video_BTCHW, prompts):
    sums = (video_BTCHW.double().sum((1, 2, 3, 4)) * 1e6).long()
    return (sums % 997) / 997


def mean_and_constant(video_BTCHW, prompts):
    return {"mean": video_BTCHW.mean((1, 2, 3, 4)), "one": torch.ones(len(video_BTCHW))}


mean_and_constant.components = ["mean", "one"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("same", "same is the same for all 3 clips: there is nothing to learn"),
        ("drawn", "drawn is random: equal clips differ by up to"),
        ("dropping_out", "dropping_out is random"),
        ("by_place", "by_place is random"),
        (
            "by_prompt",
            "by_prompt is the same for all 3 clips under one prompt: it does not look at the pixels",
        ),
    ],
)
def test_rewards_that_cannot_train_are_refused(tmp_path, capsys, monkeypatch, name, message):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    torch.manual_seed(0)
    out = tmp_path / "noise.json"
    assert main(["calibrate", f"test_calibrate:{name}", "--clips", "3", "--out", str(out)]) == 1
    assert message in capsys.readouterr().err and not out.exists()


def test_a_number_that_harmless_changes_move_as_much_as_other_clips_is_named(tmp_path, caplog, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    flags = ["--clips", "3", "--out", str(tmp_path / "noise.json")]
    assert main(["calibrate", "test_calibrate:by_checksum", *flags]) == 0
    assert "more than half as much as different clips differ" in caplog.text
    caplog.clear()
    assert main(["calibrate", "test_calibrate:counted", *flags]) == 0, "a count is not moved by a grey level"
    assert "clips differ" not in caplog.text


def test_a_constant_component_is_named(tmp_path, caplog, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    out = tmp_path / "noise.json"
    flags = ["--clips", "2", "--out", str(out)]
    assert main(["calibrate", "test_calibrate:mean_and_constant", *flags]) == 0
    assert "one is the same for all 2 clips" in caplog.text and "mean is" not in caplog.text
    assert json.loads(out.read_text())["components"]["mean"]["repetition"] == 0


def test_the_noise_is_a_function_of_the_seed():
    (reward,) = named_rewards(["flicker"], prompts=False)
    assert measure(reward, SAMPLES[:1], 3) == measure(reward, SAMPLES[:1], 3)
    assert measure(reward, SAMPLES[:1], 3) != measure(reward, SAMPLES[:1], 4)


def test_generated_clips_fit_the_reward():
    (motion,) = named_rewards(["motion_smoothness"], prompts=True)
    (world,) = named_rewards(["world"], prompts=True)
    large, small = demo_samples(motion, 0), demo_samples(world, 0)
    assert large[0].video_TCHW.shape == (15, 3, 240, 240) and small[0].video_TCHW.shape == (15, 3, 48, 48)
    assert len({sample.prompt for sample in small}) == 8
    assert torch.equal(demo_samples(world, 0)[3].video_TCHW, small[3].video_TCHW)


def test_on_files(tmp_path, capsys):
    for seed in range(2):
        video = gliding(64, 96, 30, 2, 1, seed=seed)
        encode(tmp_path / f"{seed}.mp4", (video * 255).byte().movedim(1, -1).numpy())
    out = tmp_path / "noise.json"
    assert main(["calibrate", "flicker", str(tmp_path), "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["clips"] == ["0.mp4", "1.mp4"] and record["reward"] == "flicker"
    noise = record["components"]["flicker"]
    assert 0 < record["noise_floor"] == noise["noise_floor"] < 0.02
    assert set(noise["changes"]) == {"re-encoding", "one pixel", "one grey level", "order of the batch"}
    printed = capsys.readouterr().out
    assert printed.endswith(f"--rewards.noise_floors flicker={out}\n")


def test_files_that_cannot_be_measured_on_are_left_out(tmp_path, capsys, caplog):
    frames = (gliding(64, 96, 30, 2, 1) * 255).byte().movedim(1, -1).numpy()
    for name, length in (("b.mp4", 30), ("c.mp4", 2), ("e.mp4", 30), ("f.mp4", 30)):
        encode(tmp_path / name, frames[:length])
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "d.mp4").write_bytes(b"no video" * 100)
    out = tmp_path / "noise.json"
    assert main(["calibrate", "flicker", str(tmp_path), "--clips", "2", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["clips"] == ["b.mp4", "e.mp4"]
    left_out = [record.message.split(": ") for record in caplog.records if "left out" in record.message]
    assert [name for _, name, *_ in left_out] == ["a.mp4", "c.mp4", "d.mp4"]
    for name in ("b.mp4", "e.mp4", "f.mp4"):
        (tmp_path / name).unlink()
    assert main(["calibrate", "flicker", str(tmp_path), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "a.mp4: the file is empty, and 2 more that cannot be measured on" in error


def test_several_components_have_a_total(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", "world", "--clips", "2"]) == 0
    record = json.loads((tmp_path / "world.noise.json").read_text())
    assert list(record["components"])[-1] == "total" and "colour" in record["components"]
    assert record["noise_floor"] == record["components"]["total"]["noise_floor"]
    assert 0 < record["noise_floor"] < 0.1
    assert main(["calibrate", "preference:runs/none.safetensors"]) in (1, 2)
    assert "--out" not in capsys.readouterr().err, "nobody gave it"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hpsv4"], "unknown reward 'hpsv4'"),
        (["flicker", "nowhere"], "no such folder"),
        (["flicker", "--clips", "0"], "--clips: must be at least 1, got 0"),
        (["flicker", "--clips", "9"], "--clips: 8 clips are generated, got 9; give a FOLDER"),
        (["flicker", "--prompts", "p.txt"], "--prompts: needs a FOLDER"),
        (["flicker", "--out", "x.txt"], "must be a .json file"),
        (["hpsv3", "."], "give --prompts"),
        (["motion_smoothness", "one.mp4"], "one.mp4: motion_smoothness needs at least 3 frames"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    encode(tmp_path / "one.mp4", (gliding(32, 32, 1, 0, 0) * 255).byte().movedim(1, -1).numpy())
    assert main(["calibrate", *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
