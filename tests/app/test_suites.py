"""Benchmark suites: exact names and counts, folders that can be stopped at any file, results in pairs."""

import json
import math
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpo.app import suites
from kvpo.app.cli import main
from kvpo.app.suite_results import (
    GROUPS,
    check_folder,
    compared_results,
    gain_interval,
    read_results,
    total,
)
from kvpo.app.suites import generate_suite, suite_of, suite_videos
from kvpo.app.taken import claimed
from kvpo.config_checks import ConfigurationError
from kvpo.files import StorageError
from kvpo.report.video import read_video, write_video
from kvpo.training.ranks import Ranks
from tests.ranks import on_ranks
from tests.tiny_world import tiny_config

LIST = [
    {"prompt_en": "a small red circle drifts left at night", "dimension": ["temporal_flickering"]},
    {"prompt_en": "A red circle.", "dimension": ["color", "scene"], "auxiliary_info": {"color": {}}},
    {"prompt_en": "a red circle.", "dimension": ["color"]},
    {"prompt_en": "a red circle.", "dimension": ["overall_consistency"]},
]
NAMES = {"color": [f"{prompt}-{n}.mp4" for prompt in ("A red circle.", "a red circle.") for n in range(5)]}


@pytest.fixture
def info(tmp_path: Path) -> Path:
    path = tmp_path / "checkout" / "vbench" / "VBench_full_info.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(LIST))
    return path


def config_of(base: Path, **settings: Any) -> Any:
    return tiny_config(base, optim__lora_rank=2, **settings)


def test_names_and_counts(info: Path, tmp_path: Path) -> None:
    """Flat, five of a prompt, 25 for flickering; a prompt that is listed twice has one set of videos."""
    videos = suite_videos("vbench", info)
    assert Counter(video.prompt for video in videos) == {
        LIST[0]["prompt_en"]: 25, "A red circle.": 5, "a red circle.": 5
    }  # fmt: skip
    assert [video.name for video in suite_videos("vbench", info, ["color"])] == NAMES["color"]
    assert len({video.noise for video in videos}) == len(videos)
    assert suite_videos("vbench-long", info) == videos
    assert len(suite_videos("vbench", info, ["scene"])) == 5
    with pytest.raises(
        ConfigurationError, match="vbench has no colour; there are temporal_flickering, color"
    ):
        suite_videos("vbench", info, ["colour"])


def test_the_whole_suite_has_as_many_videos_as_it_asks_for(tmp_path: Path) -> None:
    """946 entries of 944 prompts, 75 of them for flickering: the make-up of VBench's list."""
    texts = [f"prompt {n}." for n in range(944)]
    entries = [(text, "temporal_flickering" if n < 75 else "color") for n, text in enumerate(texts)]
    entries += [(texts[80], "scene"), (texts[81], "scene")]
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps([{"prompt_en": text, "dimension": [name]} for text, name in entries]))
    names = [video.name for video in suite_videos("vbench", path)]
    assert len(entries) == 946 and len(names) == len(set(names)) == 6220
    assert {"prompt 80.-0.mp4", "prompt 0.-24.mp4"} <= set(names) and "prompt 80.-5.mp4" not in names


def test_cautions_are_those_of_what_is_asked_for(
    info: Path, tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for suite, dimension, expected in (
        ("vbench", "color", []),
        ("vbench", "temporal_flickering", ["static_filter --videos_path"]),
        ("vbench-long", "color", ["loses prompts with an underscore"]),
        ("vbench-long", "temporal_flickering", ["with an underscore", "needs --static_filter_flag"]),
    ):
        caplog.clear()
        (tmp_path / "taken").touch()
        with pytest.raises(StorageError):
            given = f"{suite}={info}"
            generate_suite(config_of(tiny_base), tmp_path / "taken", given, dimensions=[dimension])
        said = [record.message for record in caplog.records if record.message.startswith(suite)]
        assert len(said) == len(expected) and all(a in b for a, b in zip(expected, said, strict=True))


def test_names_of_the_second_suite(tmp_path: Path) -> None:
    """A folder per dimension, 180 letters of the prompt, three of each and twenty for diversity."""
    long = "a dog " * 40
    path = tmp_path / "VBench2_full_info.json"
    path.write_text(json.dumps([
        {"prompt_en": long, "dimension": ["Mechanics"]},
        {"prompt_en": "Garden, zoom in.", "dimension": ["Camera_Motion"]},
        {"prompt_en": "Garden, zoom in.", "dimension": ["Camera_Motion"]},
        {"prompt_en": "Garden, zoom in.", "dimension": ["Diversity"]},
    ]))  # fmt: skip
    names = [video.name for video in suite_videos("vbench2", path)]
    assert names[:3] == [f"Mechanics/{long[:180]}-{n}.mp4" for n in range(3)]
    assert names[3:6] == [f"Camera_Motion/Garden, zoom in.-{n}.mp4" for n in range(3)]
    assert names[6:] == [f"Diversity/Garden, zoom in.-{n}.mp4" for n in range(20)]
    path.write_text(json.dumps([{"prompt_en": long + end, "dimension": ["Mechanics"]} for end in "ab"]))
    with pytest.raises(ValueError, match="have one file name"):
        suite_videos("vbench2", path)
    path.write_text(json.dumps([{"prompt_en": "and/or", "dimension": ["Mechanics"]}]))
    with pytest.raises(ValueError, match="no file can be called 'and/or-0"):
        suite_videos("vbench2", path)


def test_the_list_comes_from_a_package_or_a_checkout(
    info: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert suite_of(f"vbench={info}") == suite_of(f"vbench={tmp_path / 'checkout'}") == ("vbench", info)
    with pytest.raises(
        ConfigurationError, match="the package vbench has no VBench_full_info.json; pip install"
    ):
        suite_of("vbench-long")
    (info.parent / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "checkout"))
    assert suite_of("vbench-long") == ("vbench-long", info)
    with pytest.raises(ConfigurationError, match="unknown suite 'vbnech'"):
        suite_of("vbnech")


def test_extended_texts_are_saved_under_short_names(info: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("".join(f"{record['prompt_en']} {'x' * 9}\n" for record in LIST))
    plain, long = (suite_videos("vbench", info, (), texts) for texts in (None, tmp_path / "long.txt"))
    assert [video.name for video in plain] == [video.name for video in long]
    assert [video.noise for video in plain] == [video.noise for video in long]
    assert all(video.text == f"{video.prompt} {'x' * 9}" for video in long)
    (tmp_path / "long.txt").write_text("one\n")
    with pytest.raises(ValueError, match="1 prompts, .* has 4: .*line 1 has no counterpart"):
        suite_videos("vbench", info, (), tmp_path / "long.txt")


def test_a_folder_is_filled_checked_and_filled_again(
    info: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after some files, it goes on with the same videos; nothing but videos lies in the folder."""
    config, out = config_of(tiny_base), tmp_path / "out"
    given = {"given": f"vbench={info}", "dimensions": ["color"]}
    wrote: list[Path] = []

    def stopping(*written: Any, **settings: Any) -> None:
        write_video(*written, **settings)
        wrote.append(written[0])
        if len(wrote) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(suites, "write_video", stopping)
    with pytest.raises(KeyboardInterrupt):
        generate_suite(config, out, **given)
    assert len(list((out / "base").iterdir())) == 6, "the seventh was not whole"
    assert len(set(wrote)) == 7, "processes of one number, on several machines, share no name"
    monkeypatch.undo()
    problems, _ = check_folder(out / "base")
    assert problems == [f"missing: {name}" for name in NAMES["color"][6:]]
    before = {path.name: path.read_bytes() for path in (out / "base").iterdir()}
    assert generate_suite(config, out, **given) == [out / "base"]
    assert sorted(path.name for path in (out / "base").iterdir()) == sorted(NAMES["color"])
    assert all((out / "base" / name).read_bytes() == content for name, content in before.items())
    assert {path.name for path in out.iterdir()} == {"base", "base.json"}
    problems, command = check_folder(out / "base")
    assert not problems
    assert command == f"for D in color; do vbench evaluate --videos_path {out}/base --dimension $D; done"
    shutil.copytree(out, tmp_path / "D of mine")
    _, quoted = check_folder(tmp_path / "D of mine/base")
    assert f"--videos_path '{tmp_path}/D of mine/base' --dimension $D;" in quoted
    with claimed(out), pytest.raises(StorageError, match=f"another process is writing to {out}; wait for it"):
        generate_suite(config, out, **given)
    with pytest.raises(StorageError, match="was begun with other seed"):
        generate_suite(config_of(tiny_base, seed=5), out, **given)
    with pytest.raises(StorageError, match="was begun with other settings"):
        generate_suite(config_of(tiny_base, stream__window=9), out, **given)
    with pytest.raises(StorageError, match="begun with other dimensions and videos|other dimensions, videos"):
        generate_suite(config, out, given["given"], dimensions=["scene"])
    frames, rate = read_video(out / "base" / NAMES["color"][0])
    write_video(out / "base" / NAMES["color"][0], frames[:-1], rate)
    write_video(out / "base" / NAMES["color"][1], frames[:, ::2, ::2], rate + 1)
    (out / "base" / NAMES["color"][2]).write_bytes(b"no video")
    (out / "base" / NAMES["color"][3]).unlink()
    (out / "other").mkdir()
    (out / "other.json").write_text('{"videos": {}}')
    with pytest.raises(ValueError, match=r"other\.json: not a manifest of kvpo generate --suite"):
        check_folder(out / "other")
    (out / "base" / ".DS_Store").touch()
    kinds = Counter(problem.partition(":")[0] for problem in check_folder(out / "base")[0])
    assert kinds == {"missing": 1, "extra": 1, "unreadable": 1, "length": 1, "rate": 1, "size": 1}


def test_the_noise_of_a_video_is_of_its_name(info: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Generated with others or with fewer, at another place of the list, a video is the same."""
    config = config_of(tiny_base)
    (one,) = generate_suite(config, tmp_path / "one", f"vbench={info}", dimensions=["scene"])
    (other,) = generate_suite(config, tmp_path / "other", f"vbench={info}", dimensions=["color"])
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()
    contents = {path.read_bytes() for path in one.iterdir()}
    assert len(contents) == 5, "the five of a prompt differ"


def suite_on_ranks(ranks: Ranks, base: Path, out: Path, info: Path) -> dict[str, bytes]:
    """The videos that all ranks made together, as each of them finds them at the end."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(suites, "joined_ranks", lambda device: nullcontext(ranks))
        (folder,) = generate_suite(config_of(base), out, f"vbench={info}", dimensions=["color"])
    ranks.gather(None, "finishing")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_ranks_share_the_prompts_of_a_suite(info: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Two ranks make the files that one process makes, byte for byte, each of them once."""
    (alone,) = on_ranks(1, tmp_path / "meet one", suite_on_ranks, tiny_base, tmp_path / "one", info)
    both = on_ranks(2, tmp_path / "meet two", suite_on_ranks, tiny_base, tmp_path / "two", info)
    assert sorted(alone) == sorted(NAMES["color"]) and both == [alone, alone]
    assert (tmp_path / "one/base.json").read_bytes() == (tmp_path / "two/base.json").read_bytes()
    assert check_folder(tmp_path / "two/base")[0] == []


def test_base_and_aligned_of_a_run_on_the_command_line(
    info: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = finished, tmp_path / "out"
    command = ["generate", "--run", str(run), "--checkpoint", "latest", "--out", str(out)]
    capsys.readouterr()
    assert main([*command, "--suite", f"vbench={info}", "--dimensions", "scene"]) == 0
    assert capsys.readouterr().out == f"kvpo suite check {out}/base\nkvpo suite check {out}/aligned\n"
    records = [json.loads((out / f"{arm}.json").read_text()) for arm in ("base", "aligned")]
    assert records[0]["videos"] == records[1]["videos"] and records[1]["checkpoint"].endswith(", average")
    assert main(["suite", "check", str(out / "base"), str(out / "aligned")]) == 0
    moved = shutil.copytree(run, tmp_path / "moved")
    there = ["generate", "--run", str(moved), "--checkpoint", "latest", "--out", str(out)]
    assert main([*there, "--suite", f"vbench={info}", "--dimensions", "scene"]) == 0, "by its content"
    (path,) = moved.glob("checkpoints/update-000002/state.json")
    path.write_text(path.read_text() + "\n")
    assert main([*there, "--suite", f"vbench={info}", "--dimensions", "scene"]) == 1
    assert "aligned was begun with other checkpoint" in capsys.readouterr().err
    (out / "base" / "scores.json").touch()
    assert main(["suite", "check", str(out / "base")]) == 1
    assert "extra: scores.json" in capsys.readouterr().out
    assert main([*command, "--suite", f"vbench={info}", "--prompts", "p.txt"]) == 2
    assert main(["suite", "check", str(tmp_path)]) == 1


def results(path: Path, numbers: dict[str, list[float]], scale: float = 1.0) -> Path:
    """A file of results: dimension -> results of the videos, two of a prompt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        name: [
            sum(values) / len(values),
            [
                {"video_path": f"/v/prompt {n // 2}.-{n % 2}.mp4", "video_results": scale * value}
                for n, value in enumerate(values)
            ],
        ]
        for name, values in numbers.items()
    }
    path.write_text(json.dumps(content))
    return path


def test_results_of_two_folders_are_paired_by_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [0.5 + 0.01 * n for n in range(40)]
    results(tmp_path / "base/a_eval_results.json", {"scene": base})
    results(tmp_path / "base/b_eval_results.json", {"imaging_quality": base}, 100)
    results(tmp_path / "aligned/a_eval_results.json", {"scene": [value + 0.1 for value in base]})
    noisy = [value + (0.1 if n % 4 < 2 else -0.1) for n, value in enumerate(base)]
    results(tmp_path / "aligned/c_eval_results.json", {"imaging_quality": noisy, "color": base}, 100)
    table = compared_results(tmp_path / "base", tmp_path / "aligned")
    assert list(table) == ["scene", "imaging_quality"] and {one.prompts for one in table.values()} == {20}
    scene, imaging = table.values()
    assert scene.low == pytest.approx(0.1) == pytest.approx(scene.high)
    assert imaging.low < 0 < imaging.high < 0.1, "half of the prompts gain, half lose"
    assert compared_results(tmp_path / "base", tmp_path / "aligned") == table, (
        "the interval is the same every time"
    )
    still = {"subject_consistency": [1.0000001, *base[1:]]}  # of a video that stands still, by rounding
    for name in ("base", "aligned"):
        results(tmp_path / f"rounded-{name}/a_eval_results.json", still)
    rounded = compared_results(tmp_path / "rounded-base", tmp_path / "rounded-aligned")
    assert rounded["subject_consistency"].base == pytest.approx(sum(still["subject_consistency"]) / 40)
    assert read_results(tmp_path / "rounded-base")["subject_consistency"][1]["prompt 5."] > 0.5
    out = tmp_path / "table.json"
    command = ["suite", "import", str(tmp_path / "base"), str(tmp_path / "aligned"), "--out", str(out)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "no total: 14 dimensions are missing: subject_consistency, background_consistency" in said
    assert json.loads(out.read_text())["scene"]["prompts"] == 20
    results(tmp_path / "base/c_eval_results.json", {"scene": base})
    with pytest.raises(ValueError, match="scene is in .*a_eval_results.json and in .*c_eval_results.json"):
        read_results(tmp_path / "base")


def test_the_interval_of_few_prompts_is_as_wide_as_it_must_be() -> None:
    """Plain percentiles of six prompts would cover the truth in 85 of 100 cases."""
    gains_NP = torch.randn(600, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    intervals = [gain_interval(gains_P, "scene") for gains_P in gains_NP]
    assert sum(low <= 0 <= high for low, high in intervals) / 600 >= 0.91
    assert all(math.isnan(end) for end in gain_interval(gains_NP[0, :5], "scene"))


def test_the_total_is_the_suites_own() -> None:
    """By hand: quality has four fifths, dynamic degree half a weight, ranges are stretched to 0 to 1."""
    names = [name for _, own in GROUPS["vbench"].values() for name in own]
    assert len(names) == 16
    assert total(dict.fromkeys(names, 1.0))[0] == pytest.approx(
        (4 * (5.5 + (1 - 0.706) / (0.9975 - 0.706)) / 6.5
         + (5 + 1 / 0.8222 + (1 - 0.0009) / (0.2855 - 0.0009) + 2 / 0.364) / 9) / 5
    )  # fmt: skip
    assert total({name: 1.0 for name in names if name != "color"}) == (None, ["color"])
    second = {name: 0.5 for _, own in GROUPS["vbench2"].values() for name in own}
    assert len(second) == 18 and total(second)[0] == pytest.approx(0.5)
    assert total(second | {"Diversity": 1.0})[0] == pytest.approx((0.75 + 4 * 0.5) / 5)


def test_names_that_differ_in_case_need_a_disk_that_tells_them_apart(
    info: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = suite_videos("vbench", info)
    suites.demand_case(tmp_path, videos)
    exists = Path.exists
    lower = {"kvpo": lambda path, **_: exists(path) or exists(path.parent / path.name.lower())}
    monkeypatch.setattr(Path, "exists", lower["kvpo"])
    with pytest.raises(
        StorageError, match="keeps 'A red circle.-0.mp4' and 'a red circle.-0.mp4' in one file"
    ):
        suites.demand_case(tmp_path, videos)
