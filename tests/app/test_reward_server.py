"""``kvpo reward-server`` as a user runs it: another process, real signals, whole runs."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from kvpo.app import reward_server
from kvpo.app.cli import main
from kvpo.app.named_rewards import named_rewards, split_location
from kvpo.app.reward_server import offers_of
from kvpo.config_checks import ConfigurationError
from kvpo.report.video import write_video
from kvpo.rewards.catalogue import DECLARATIONS
from kvpo.rewards.service import client as client_module
from kvpo.rewards.service.client import connect, reach
from kvpo.rewards.service.messages import TOKEN_VARIABLE
from kvpo.rewards.service.patience import StillLoading
from kvpo.serving import is_loopback, read_token
from kvpo.training.collection import explore
from kvpo.training.metrics_log import MetricsLog
from kvpo.training.run import Run
from kvpo.training.trainer import Trainer
from tests import processes
from tests.reward_servers import QUICK, Named, free_port, number_of, numbered, serving
from tests.tiny_world import SETTINGS, ToyScorer, tiny_config, toy_setup
from tests.training.test_resume import outcome

ME = "tests.app.test_reward_server"
TOKEN = "a-token-for-tests"


def slow_number(video_BTCHW: Tensor, prompts: Sequence[Any]) -> Tensor:
    """Which of ``numbered`` clips these are, after a while."""
    time.sleep(0.01 * len(prompts))
    return number_of(video_BTCHW, prompts)


def hanging(video_BTCHW: Tensor, prompts: Sequence[Any]) -> Tensor:
    """Never comes back, unless asked by the main thread."""
    if threading.current_thread() is not threading.main_thread():
        Path("hanging").touch()
        time.sleep(1000)
    return video_BTCHW.mean((1, 2, 3, 4))


def give_token() -> None:
    """In a child: the environment of a client."""
    os.environ[TOKEN_VARIABLE] = TOKEN


def in_directory(path: Path) -> None:
    """In a child: where it runs."""
    os.chdir(path)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of several rewards in a process of its own; a token is needed."""
    directory, port = tmp_path_factory.mktemp("server"), free_port()
    (directory / "token").write_text(TOKEN + "\n")
    rewards = ["--reward", "flicker,motion_smoothness,dynamic_degree", "--reward", "world"]
    command = ["reward-server", *rewards, "--port", str(port), "--token-file", directory / "token"]
    process = processes.start(command, directory / "log")
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.join(20)
    log = (directory / "log").read_text()
    assert process.exitcode == 0, log
    assert f"serving flicker, motion_smoothness, dynamic_degree, world at http://127.0.0.1:{port}" in log
    assert log.splitlines()[-1] == "kvpo: stopped" and TOKEN not in log


def test_a_run_with_its_reward_in_another_process_is_the_run_without(
    url: str, tiny_base: Path, tmp_path: Path
) -> None:
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in SETTINGS.items()}
    few = {"optim.updates": 2, "exploration.rows": 3,
           "stream.schedule": [1.0, 0.5]}  # fmt: skip
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({**lists, "backbone.checkpoint": str(tiny_base), **few})
    )
    for name, reward in (("here", "world"), ("there", f"world@{url}")):
        command = ["align", "--config", tmp_path / "run.yaml", "--rewards.scorers", reward]
        code, printed = processes.run([*command, "--out", tmp_path / name], tmp_path / "log", give_token)
        assert code == 0, printed
    assert outcome(tmp_path / "here") == outcome(tmp_path / "there")
    here, there = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("here", "there"))
    assert here["held_out"] == there["held_out"]
    assert TOKEN not in "".join(path.read_text() for path in (tmp_path / "there").glob("*.*l"))


def test_a_folder_and_a_noise_floor_measured_elsewhere(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    frames = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "noise.mp4", torch.from_numpy(frames), 2.0)
    names = ("motion_smoothness", "flicker", "dynamic_degree")
    found = []
    for place in ("", f"@{url}"):
        rewards = ",".join(name + place for name in names)
        assert main(["score", "noise.mp4", "--reward", rewards, "--out", "scores.html"]) == 0
        assert main(["calibrate", f"flicker{place}", "--clips", "1"]) == 0
        noise = json.loads(Path("flicker.noise.json").read_text())
        found.append((json.loads(Path("scores.json").read_text()), noise["components"]))
    assert found[0] == found[1]
    assert list(found[0][0][0]["scores"]) == ["motion_smoothness", "dynamic_degree", "flicker"]
    assert "unknown" not in capsys.readouterr().err


def test_rewards_that_share_a_model_are_asked_together(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    names = [f"dynamic_degree@{url}", "flicker", f"world@{url}", f"motion_smoothness@{url}"]
    rewards = named_rewards(names, prompts=True)
    assert [reward.name for reward in rewards] == ["dynamic_degree", "flicker", "world"]
    assert rewards[0].scorer.components == ("dynamic_degree", "motion_smoothness")
    assert rewards[0].declarations[0] == DECLARATIONS["dynamic_degree"]
    (local,) = named_rewards(["world"], prompts=True)
    assert (rewards[2].declarations, rewards[2].weights) == (local.declarations, dict(local.weights))
    with pytest.raises(ConfigurationError, match="world reads the prompt"):
        named_rewards([f"world@{url}"], prompts=False)
    with pytest.raises(ConfigurationError, match="every reward once"):
        named_rewards(["flicker", f"flicker@{url}"], prompts=True)
    with pytest.raises(ValueError, match=f"{url} refused: it does not have 'hpsv3'; it has flicker"):
        named_rewards([f"hpsv3@{url}"], prompts=True)


def test_a_server_for_other_frame_rates_is_refused() -> None:
    scorer = Named(number_of, "videoalign_vq")
    offers = {"videoalign_vq": (DECLARATIONS["videoalign_vq"],)}
    with serving(scorer, offers) as url:
        assert named_rewards([f"videoalign_vq@{url}"], prompts=True, frame_rate=16.0)
        with pytest.raises(ConfigurationError, match="16 frames per second; these have 2: .* --frame-rate 2"):
            named_rewards([f"videoalign_vq@{url}"], prompts=True)


def test_names_with_and_without_an_address() -> None:
    assert split_location("flicker") == ("flicker", None)
    assert split_location("a.b:c@https://host:1/path") == ("a.b:c", "https://host:1/path")


@pytest.fixture
def server_of(tmp_path: Path) -> Iterator[Any]:
    """Starts servers of this module's rewards; what is left of them is killed."""
    started = []

    def start(reward: str, port: int) -> Any:
        command = ["reward-server", "--reward", f"{ME}:{reward}", "--port", str(port)]
        started.append(processes.start(command, tmp_path / "server.log", partial(in_directory, tmp_path)))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def test_killed_in_the_middle_and_restarted_nothing_is_lost(
    server_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "REQUEST_BYTES", 5 * 96)
    port, (video, prompts) = free_port(), numbered(100)
    url = f"http://127.0.0.1:{port}"
    process = server_of("slow_number", port)
    remote = connect(url, [f"{ME}:slow_number"], patience=replace(QUICK, start=60, outage=60))
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(remote, video, prompts)
        time.sleep(0.3)
        processes.wait_for(lambda: httpx.get(f"{url}/health").json()["waiting_clips"] > 0, process)
        process.kill()
        process.join()
        assert not answer.done()
        server_of("slow_number", port)
        assert torch.equal(answer.result(60)["slow_number"], torch.arange(100.0))


def test_while_it_loads_it_says_so(tmp_path: Path) -> None:
    """A reward that takes its time to load: clients are told at once, and wait."""
    (tmp_path / "slow_to_load.py").write_text(
        "import pathlib, time\n"
        "while not pathlib.Path('go').exists(): time.sleep(0.01)\n"
        "def mean(video, prompts): return video.mean((1, 2, 3, 4))\n"
    )
    port, reward = free_port(), "slow_to_load:mean"
    command = ["reward-server", "--reward", reward, "--port", str(port)]
    url, process = f"http://127.0.0.1:{port}", None
    try:
        process = processes.start(command, tmp_path / "log", partial(in_directory, tmp_path))
        told = re.escape(f"503 Service Unavailable: loading {reward}")
        with pytest.raises(StillLoading, match=told):
            connect(url, [reward], patience=replace(QUICK, start=60, outage=0))
        reach(url, [reward])
        assert httpx.post(f"{url}/score", content=b"x").status_code == 503
        (tmp_path / "go").touch()
        remote = connect(url, [reward], patience=replace(QUICK, start=60, outage=60))
        assert remote(*numbered(2))["mean"].tolist() == [0, 1]
        process.terminate()
        process.join(20)
        assert process.exitcode == 0, (tmp_path / "log").read_text()
    finally:
        if process is not None:
            process.kill()
            process.join()


def test_it_stops_although_its_scorer_hangs(server_of: Any, tmp_path: Path) -> None:
    port = free_port()
    process = server_of("hanging", port)
    url = f"http://127.0.0.1:{port}"
    connect(url, [f"{ME}:hanging"], patience=replace(QUICK, start=60, outage=60))
    remote = connect(url, [f"{ME}:hanging"], patience=replace(QUICK, answer=0.2, attempts=1))
    with pytest.raises(ValueError, match="no answer within 0.2 s"):
        remote(*numbered(1))
    assert (tmp_path / "hanging").exists()
    process.terminate()
    process.join(15)
    assert process.exitcode == 0


def test_a_hanging_scorer_ends_the_run_with_what_was_trained(tiny_base: Path, tmp_path: Path) -> None:
    """It hangs while the third rollout is scored; the two updates before it are those of a healthy run."""
    toy, calls, hang = ToyScorer(), [0], threading.Event()
    explore(toy_setup(tiny_config(tiny_base), Counting(calls)), [0])
    per_rollout, calls[0] = calls[0], 0

    def moody(video: Tensor, prompts: Any) -> Tensor:
        calls[0] += 1
        if calls[0] > 2.5 * per_rollout:
            hang.wait(60)
        return toy(video, prompts)["calm"]

    def train(scorer: Any, directory: Path) -> None:
        settings = {"optim__updates": 2 if isinstance(scorer, Named) else 4, "checkpoint__every": 3}
        trainer = Trainer(toy_setup(tiny_config(tiny_base, evaluation__every=0, **settings), scorer))
        directory.mkdir()
        with MetricsLog(directory / "metrics.jsonl", directory / "tensorboard") as metrics:
            run = Run(trainer.setup, trainer, directory / "checkpoints", metrics, lambda *numbers: None, {})
            run.validate = lambda: 0.0  # type: ignore[method-assign]
            run.train(lambda: False)

    healthy = Named(lambda video, prompts: toy(video, prompts)["calm"])
    train(healthy, tmp_path / "healthy")
    with serving(Named(moody)) as url:
        remote = connect(url, ["own"], patience=replace(QUICK, answer=0.5))
        with pytest.raises(ValueError, match=f"reward server {url}: asked 2 times .* no answer within 0.5 s"):
            train(remote, tmp_path / "hung")
        hang.set()
    saved = sorted(path.name for path in (tmp_path / "hung" / "checkpoints").glob("update-*"))
    assert saved == ["update-000000", "update-000002"]  # the base is the best one so far
    found, expected = (
        load_file(tmp_path / name / "checkpoints" / "update-000002" / "state.safetensors")
        for name in ("hung", "healthy")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Counting(ToyScorer):
    """Counts its calls."""

    def __init__(self, calls: list[int]) -> None:
        super().__init__(("calm",))
        vars(self).update(calls=calls)

    def __call__(self, video_BTCHW: Tensor, prompts: Any) -> dict[str, Tensor]:
        self.calls[0] += 1
        return super().__call__(video_BTCHW, prompts)


def test_a_run_whose_scorer_hangs_can_be_stopped(tiny_base: Path, tmp_path: Path) -> None:
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in SETTINGS.items()}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**lists, "backbone.checkpoint": str(tiny_base)}))
    command = ["align", "--config", "run.yaml", "--rewards.scorers", f"{ME}:hanging", "--out", "run"]
    process = processes.start(command, tmp_path / "log", partial(in_directory, tmp_path))
    processes.wait_for((tmp_path / "hanging").exists, process)
    os.kill(process.pid, signal.SIGINT)
    processes.wait_for(lambda: "next safe point" in (tmp_path / "log").read_text(), process)
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 130, (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--reward flicker --host 0.0.0.0", f"--host: 0.0.0.0 .* set {TOKEN_VARIABLE} or give --token-file"),
        ("--reward flicker --host ::", "--host: :: is open"),
        ("--reward flicker --host example.org", "--host: example.org is open"),
        ("--reward flicker --token-file nowhere", "--token-file: cannot read nowhere"),
        ("--reward flicker --token-file empty", "--token-file: empty: a token is one word"),
        ("--reward flickr --port 0", "--reward: unknown reward 'flickr'"),
        ("--reward flicker,flicker --port 0", "--reward: name every reward once"),
        (
            f"--reward flicker,{ME}:flicker --port 0",
            "two rewards have a component called 'flicker'",
        ),
        ("--reward flicker --port 70000", "--port: must be 0 to 65535, got 70000"),
        ("--reward flicker --batch 0", "--batch: must be 1 or more, got 0"),
        ("--reward flicker --request-mib 9 --queue-mib 8", "--request-mib: 9 never fits into --queue-mib 8"),
        ("--reward flicker --frame-rate 0", "--frame-rate: must be positive"),
        ("", "--reward"),
    ],
)
def test_what_is_not_served(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.setattr(reward_server, "run_app", lambda *_, **__: pytest.fail("it ran"))
    (tmp_path / "empty").write_text("\n")
    assert main(["reward-server", *arguments.split()]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert re.search(message, printed), printed


def flicker(video_BTCHW: Tensor, prompts: Any) -> Tensor:
    """Its name is taken already."""
    return torch.zeros(len(prompts))


def test_an_address_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Named(number_of)) as url:
        assert main(["reward-server", "--reward", "flicker", "--port", url.rpartition(":")[2]]) == 2
    said = f"--port: cannot listen at {url.removeprefix('http://')} (address already in use); give another"
    assert said in capsys.readouterr().err


def test_where_a_token_comes_from(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-file\n")
    assert read_token(None, {}, TOKEN_VARIABLE) is None
    assert read_token(None, {TOKEN_VARIABLE: "from-environment"}, TOKEN_VARIABLE) == "from-environment"
    assert read_token(tmp_path / "token", {TOKEN_VARIABLE: "from-environment"}, TOKEN_VARIABLE) == "from-file"
    for bad in ("", "two words", "schlüssel", "line\nbreak"):
        with pytest.raises(ConfigurationError, match=f"{TOKEN_VARIABLE}: a token is one word"):
            read_token(None, {TOKEN_VARIABLE: bad}, TOKEN_VARIABLE)


def test_who_can_reach_an_address() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "gpu-box", "")] == [False] * 5


def test_catalogue_rewards_are_offered_one_by_one_and_others_whole() -> None:
    offers = offers_of(named_rewards(["motion_smoothness", "dynamic_degree", "world"], prompts=True))
    assert list(offers) == ["motion_smoothness", "dynamic_degree", "world"]
    assert len(offers["motion_smoothness"]) == 1 and len(offers["world"]) > 1


def motion_smoothness(video_BTCHW: Tensor, prompts: Sequence[Any]) -> Tensor:
    """A function that is called as a reward of the catalogue is."""
    return video_BTCHW.mean((1, 2, 3, 4))


def test_a_function_does_not_pass_for_the_reward_whose_name_it_has() -> None:
    own = f"{__name__}:motion_smoothness"
    assert list(offers_of(named_rewards([own], prompts=True))) == [own]


def test_check_scores_one_clip_and_exits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward-server", "--reward", "flicker,world", "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines][0] == "flicker" and len(lines) == 10
    assert all(float(line.split()[1]) >= 0 for line in lines)
    assert main(["reward-server", "--reward", "tests.app.test_reward_server:not_there", "--check"]) == 2
