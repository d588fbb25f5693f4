"""The rewards that a configuration names: built together, weighted, and used by a run."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "rewards"))
from test_hpsv3 import release, tiny  # noqa: F401
from tiny_rewards import gliding

from kvpo.app.build import build_setup
from kvpo.app.configuration import preset
from kvpo.app.judges import build_scorer
from kvpo.app.rank_rewards import with_served_rewards
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError
from kvpo.engine.scoring import Clip, score_clips
from kvpo.prompts import ClipPrompt
from kvpo.rewards.catalogue import load_rewards
from kvpo.rewards.consistency import FlickerScorer
from kvpo.rewards.reward import CombinedScorer, Reward
from kvpo.training.ranks import Ranks
from kvpo.training.trainer import Trainer
from kvpo.world.reward import DEFAULT_WEIGHTS, WorldScorer
from tests.tiny_wan import tiny_wan

ME = "tests.app.test_rewards_of_a_run"


def brightness(video_BTCHW: Tensor, prompts: Any) -> Tensor:
    """Anyone's own reward."""
    return video_BTCHW.mean((1, 2, 3, 4))


def spoiling(video_BTCHW: Tensor, prompts: Any) -> Tensor:
    """Brightness again, from somebody who works in place."""
    means = video_BTCHW.mean((1, 2, 3, 4))
    video_BTCHW.zero_()
    return means


def in_doubles(video_BTCHW: Tensor, prompts: Any) -> Tensor:
    """From somebody who changes what all of torch makes of numbers."""
    torch.set_default_dtype(torch.float64)
    return video_BTCHW.mean((1, 2, 3, 4)).double()


def on_one_thread_more(video_BTCHW: Tensor, prompts: Any) -> Tensor:
    """Changes how fast, and in which order, everything else is added up."""
    torch.set_num_threads(torch.get_num_threads() + 1)
    return video_BTCHW.mean((1, 2, 3, 4))


def elsewhere(video_BTCHW: Tensor, prompts: Any) -> Tensor:
    """Leaves the process in another directory than the one that --out is relative to."""
    os.chdir("/")
    return video_BTCHW.mean((1, 2, 3, 4))


def complex_numbers(video_BTCHW: Tensor, prompts: Any) -> Tensor:
    """Half of each would be lost."""
    return video_BTCHW.mean((1, 2, 3, 4)) * 1j


def hollow(video_BTCHW: Tensor, prompts: Any) -> Tensor:
    """A tensor that was never filled."""
    return torch.empty(len(video_BTCHW), device="meta")


def sparse(video_BTCHW: Tensor, prompts: Any) -> Tensor:
    """Scores as a sparse tensor."""
    return video_BTCHW.mean((1, 2, 3, 4)).to_sparse()


def forgetful(video_BTCHW: Tensor, prompts: Any) -> None:
    """Lacks a return."""
    video_BTCHW.mean((1, 2, 3, 4))


def leaving(video_BTCHW: Tensor, prompts: Any) -> Tensor:
    """From a script."""
    raise SystemExit(0)


def enormous(video_BTCHW: Tensor, prompts: Any) -> Tensor:
    """Finite, but its square is not."""
    return torch.full((len(video_BTCHW),), 3e38)


def of_one_word(video_BTCHW: Tensor, prompts: Any) -> Tensor:
    """Its components are letters."""
    return video_BTCHW.mean((1, 2, 3, 4))


of_one_word.components = "word"  # type: ignore[attr-defined]


def of_one_name(video_BTCHW: Tensor, prompts: Any) -> dict[str, Tensor]:
    """Two components, of which only one can be told."""
    return {"calm": video_BTCHW.mean((1, 2, 3, 4))}


of_one_name.components = ["calm", "calm"]  # type: ignore[attr-defined]


def nameless(video_BTCHW: Tensor, prompts: Any) -> dict[str, Tensor]:
    """A component that no setting can name."""
    return {"": video_BTCHW.mean((1, 2, 3, 4))}


nameless.components = [""]  # type: ignore[attr-defined]


def undeclared(video_BTCHW: Tensor, prompts: Any) -> dict[str, Tensor]:
    """Two numbers of which nobody knows."""
    return {"one": torch.zeros(len(video_BTCHW)), "two": torch.zeros(len(video_BTCHW))}


def flicker(video_BTCHW: Tensor, prompts: Any) -> Tensor:
    """Its name is taken already."""
    return torch.zeros(len(video_BTCHW))


def run_with(scorers: str, **settings: Any) -> Config:
    changes = {f"rewards.{name}": value for name, value in settings.items()}
    return preset("demo", {"rewards.scorers": scorers.split(), **changes})


def test_the_worlds_reward_alone_is_as_it_was() -> None:
    scorer, weights = build_scorer(Config(), 8.0)
    assert isinstance(scorer, Reward) and scorer.scorer == WorldScorer()
    assert torch.equal(weights, torch.tensor(list(DEFAULT_WEIGHTS.values())))


def test_several_rewards_are_one_scorer_with_a_weight_per_component() -> None:
    config = run_with(f"flicker world {ME}:brightness", weights={"brightness": 0.5, "colour": 0.0})
    scorer, weights = build_scorer(config, 8.0)
    assert scorer.components == ("flicker", *DEFAULT_WEIGHTS, "brightness")
    expected = {"flicker": 1.0, **DEFAULT_WEIGHTS, "colour": 0.0, "brightness": 0.5}
    assert torch.equal(weights, torch.tensor(list(expected.values())))
    clip = gliding(48, 48, 6, 1, 0)[None]
    prompt = preset_prompt()
    scores = scorer(clip, [prompt])
    assert list(scores) == list(scorer.components)
    assert torch.equal(scores["flicker"], FlickerScorer()(clip, [prompt])["flicker"])
    assert torch.equal(scores["brightness"], clip.mean()[None])
    assert torch.equal(scores["shape"], WorldScorer()(clip, [prompt])["shape"])


def test_a_function_that_changes_its_clips_is_refused() -> None:
    """Local and global clips show the same frames: their scores would be those of what it left."""
    scorer, _ = build_scorer(run_with(f"{ME}:spoiling {ME}:brightness"), 8.0)
    clips = [(member, Clip(0, frames, ClipPrompt(""))) for frames in (5, 9) for member in range(2)]
    with pytest.raises(ValueError, match=f"{ME}:spoiling' changed the clips .* video.clone"):
        score_clips(scorer, torch.rand(2, 9, 3, 16, 16), clips, frames_per_latent=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("in_doubles", "changed torch's default dtype from torch.float32 to torch.float64"),
        ("on_one_thread_more", "changed torch's number of threads from"),
        ("elsewhere", "changed the working directory from .* to /, for everything"),
        ("complex_numbers", "failed: ValueError: its scores are complex"),
        ("hollow", "failed: ValueError: its scores are without content"),
        ("forgetful", "failed: ValueError: it returned None instead of scores"),
        ("leaving", "failed: SystemExit: 0"),
        ("enormous", "'enormous' is 3e.38 for clip 0 of 2, which sums and squares of float32 cannot hold"),
    ],
)
def test_what_a_function_must_not_do_is_named(name: str, message: str) -> None:
    before = torch.get_default_dtype(), torch.get_num_threads(), os.getcwd()
    scorer, _ = build_scorer(run_with(f"{ME}:{name}"), 8.0)
    clips = [(member, Clip(0, 5, ClipPrompt(""))) for member in range(2)]
    with pytest.raises(ValueError, match=message):
        score_clips(scorer, torch.rand(2, 5, 3, 16, 16), clips, frames_per_latent=1)
    assert before == (torch.get_default_dtype(), torch.get_num_threads(), os.getcwd())


def test_sparse_scores_are_scores() -> None:
    scorer, _ = build_scorer(run_with(f"{ME}:sparse"), 8.0)
    clip = torch.rand(2, 5, 3, 16, 16)
    assert torch.equal(scorer(clip, ["", ""])["sparse"], clip.mean((1, 2, 3, 4)))  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("torch.set_default_dtype(torch.float64)", "importing 'onesown' changed torch's default dtype"),
        ("raise SystemExit(3)", "cannot import 'onesown': SystemExit: 3"),
    ],
)
def test_what_an_import_must_not_do_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "onesown", raising=False)
    (tmp_path / "onesown.py").write_text(f"import torch\n{line}\n")
    with pytest.raises(ConfigurationError, match=message):
        build_scorer(run_with("onesown:f"), 8.0)
    assert torch.get_default_dtype() == torch.float32


def test_gradients_switched_off_by_an_import_stay_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "onesown", raising=False)
    lines = ("import torch", "torch.set_grad_enabled(False)", "def f(video, prompts):", "    return [0.0]")
    (tmp_path / "onesown.py").write_text("\n".join(lines))
    build_scorer(run_with("onesown:f"), 8.0)
    assert torch.is_grad_enabled()


def preset_prompt() -> Any:
    from kvpo.app.sources.world import world_prompts

    return ClipPrompt(world_prompts("test", 1, 0, 0)["short"][0].segments[0])


@pytest.mark.parametrize(
    ("scorers", "settings", "message"),
    [
        ("hpsv4", {}, "rewards.scorers: unknown reward 'hpsv4'; there are hpsv3"),
        (f"{ME}:of_one_word", {}, "components must be a list of names, got 'word'"),
        (f"{ME}:of_one_name", {}, "components must differ, got \\['calm', 'calm'\\]"),
        (f"{ME}:nameless", {}, "components must be a list of names, got \\[''\\]"),
        ("nowhere:f", {}, "rewards.scorers: cannot import 'nowhere'"),
        (f"{ME}:nothing", {}, "rewards.scorers: module .* has no 'nothing'"),
        (f"{ME}:ME", {}, "rewards.scorers: .* is not callable"),
        ("flicker", {"weights": {"flickr": 1.0}}, "rewards.weights: 'flickr' .* there are flicker"),
        ("flicker", {"weights": {"flicker": 0.0}}, "rewards.weights: must add up to more than 0"),
    ],
)
def test_mistakes_name_the_setting(scorers: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_scorer(run_with(scorers, **settings), 8.0)


def test_numbers_that_were_not_declared_are_said_to_be_missing() -> None:
    scorer, _ = build_scorer(run_with(f"{ME}:undeclared"), 8.0)
    with pytest.raises(ValueError, match="returned one, two where undeclared was declared.*`components`"):
        scorer(gliding(48, 48, 6, 1, 0)[None], [preset_prompt()])


def test_two_components_of_one_name_and_a_source_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="two rewards have a component called 'flicker'"):
        build_scorer(run_with(f"flicker {ME}:flicker"), 8.0)
    with pytest.raises(ValueError, match="'hpsv3.base' belongs to no reward"):
        build_scorer(run_with("flicker", sources={"hpsv3.base": "x"}), 8.0)
    with pytest.raises(ValueError, match="components are flicker, flicker"):
        CombinedScorer((FlickerScorer(), FlickerScorer()))


class FirstOfTwo(Ranks):
    """Rank 0 of two that hold the same values."""

    def gather(self, value: Any, doing: str) -> list[Any]:
        return [value, value]

    def _exchange(self, failure: str, value: Any, doing: str) -> list[Any]:
        return [value, value]


def test_parts_of_served_rewards_go_to_their_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server gets those of what it loads, and the run keeps those of rewards that lie elsewhere."""
    seen: list[Any] = []

    def named(names: Any, sources: Any, **options: Any) -> Any:
        seen.append((list(names), sources))
        return load_rewards(["flicker"])

    monkeypatch.setattr("kvpo.app.rank_rewards.named_rewards", named)
    parts = {"aesthetic.weights": "head.pth", "plot.rubric": "plot.yaml"}
    config = run_with("aesthetic plot@openai:http://127.0.0.1:1/v1#eye", sources=parts, ranks=1)
    ranks = FirstOfTwo(0, 2)
    with ranks.leaving:
        served = with_served_rewards(config, 8.0, ranks)
    assert seen == [(["aesthetic"], {"aesthetic.weights": "head.pth"})]
    assert served.rewards.sources == {"plot.rubric": "plot.yaml"}


def test_the_rate_and_the_device_of_a_run_reach_its_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def watched(ids: Any, sources: Any, **options: Any) -> Any:
        asked.update(options)
        return load_rewards(ids, sources, **options)

    monkeypatch.setattr("kvpo.app.named_rewards.load_rewards", watched)
    build_scorer(run_with("flicker"), 12.5)
    assert asked["frame_rate"] == 12.5 and asked["device"] == "cpu"


def test_a_public_preset_trains_on_the_reward_it_names(release: Any, tmp_path: Path) -> None:  # noqa: F811
    weights, base = release
    assert preset("longlive-1.3b").rewards.scorers == ("hpsv3",)
    config = tiny_wan(
        "longlive-1.3b",
        tmp_path,
        rewards__scorers=("hpsv3",),
        rewards__sources={"hpsv3.weights": str(weights), "hpsv3.base": str(base)},
    )
    numbers = Trainer(build_setup(config)).step()
    assert numbers["reward_spread"] > 0 and numbers["gradient_norm"] > 0
