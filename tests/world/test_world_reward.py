"""The rewards rise with what a caption asks for, fall with every fault, and are not cheaply fooled."""

import pytest
import torch
from torch.nn.functional import avg_pool2d, pad

from kvpo.prompts import ClipPrompt
from kvpo.world.calibration import draw_stories, switch_clips
from kvpo.world.imperfect import CLEAN, Faults, observe
from kvpo.world.render import backgrounds, render
from kvpo.world.reward import DEFAULT_WEIGHTS, WorldScorer, weighted_total
from kvpo.world.vocabulary import FRAME_SIZE, Act, Actor, Story

RING = Actor("red", "ring", "large", "right")
PROMPT = ClipPrompt("A large red ring drifts right by the sea.")


def acts(*shown: tuple[str, tuple[Actor, ...]], frames: int = 12) -> torch.Tensor:
    """One clip [1, T, 3, H, W] that shows each (scene, actors) for ``frames`` frames."""
    told = tuple(Act(scene, actors, "", k * frames, "show") for k, (scene, actors) in enumerate(shown))
    story = Story(told, frames * len(told))
    return render(story)[None]


def score(video: torch.Tensor, prompt: ClipPrompt = PROMPT) -> dict[str, float]:
    return {name: float(value) for name, value in WorldScorer()(video, [prompt]).items()}


@pytest.fixture(scope="module")
def stories():
    return draw_stories("test", 48, 2, 30, seed=5)


@pytest.fixture(scope="module")
def exact(stories):
    return switch_clips(observe(stories, torch.Generator().manual_seed(6), CLEAN), stories)


def totals(video: torch.Tensor, prompts: list[ClipPrompt]) -> torch.Tensor:
    return weighted_total(WorldScorer()(video, prompts), DEFAULT_WEIGHTS)


def test_weights_sum_to_one_and_prompt_following_has_the_larger_part():
    assert sum(DEFAULT_WEIGHTS.values()) == pytest.approx(1)
    following = sum(DEFAULT_WEIGHTS[k] for k in ("colour", "shape", "scene", "count", "motion"))
    assert following == pytest.approx(0.81)
    assert WorldScorer().components == tuple(DEFAULT_WEIGHTS)


def test_components_lie_in_the_unit_interval_exact_beats_faulty_and_faulty_is_unsaturated(stories, exact):
    video, prompts = exact
    faulty, _ = switch_clips(observe(stories, torch.Generator().manual_seed(7), Faults()), stories)
    clean_scores, faulty_scores = WorldScorer()(video, prompts), WorldScorer()(faulty, prompts)
    for name in DEFAULT_WEIGHTS:
        for value in (clean_scores[name], faulty_scores[name]):
            assert value.shape == (48,) and value.isfinite().all()
            assert value.min() >= 0 and value.max() <= 1
        assert clean_scores[name].mean() > faulty_scores[name].mean() + 0.05, name
        assert clean_scores[name].mean() > 0.8, name
        assert faulty_scores[name].mean() < 0.9, name


@pytest.mark.parametrize(
    ("component", "scene", "actor"),
    [
        ("colour", "sea", Actor("blue", "ring", "large", "right")),
        ("shape", "sea", Actor("red", "square", "large", "right")),
        ("shape", "sea", Actor("red", "ring", "small", "right")),
        ("motion", "sea", Actor("red", "ring", "large", "left")),
        ("motion", "sea", Actor("red", "ring", "large", "bob")),
        ("scene", "cave", RING),
    ],
)
def test_a_wrong_attribute_lowers_its_component_most(component, scene, actor):
    right, wrong = score(acts(("sea", (RING,)))), score(acts((scene, (actor,))))
    loss = {name: right[name] - wrong[name] for name in right}
    assert loss[component] > 0.3
    assert max(loss, key=loss.__getitem__) == component


def test_a_second_actor_lowers_the_count_and_a_missing_one_halves_the_rest():
    other = Actor("blue", "cross", "small", "still")
    alone, both = acts(("sea", (RING,))), acts(("sea", (RING, other)))
    assert score(both)["count"] < 0.1 < 0.9 < score(alone)["count"]
    assert score(both)["colour"] > 0.8
    asked = ClipPrompt("A large red ring drifts right while a small blue cross rests by the sea.")
    assert score(both, asked)["count"] > 0.9
    assert score(alone, asked)["colour"] == pytest.approx(0.5 * score(both, asked)["colour"], abs=0.1)


def test_captions_may_name_the_actors_in_either_order():
    actors = (Actor("blue", "cross", "small", "still"), RING)
    swapped = ClipPrompt("A small blue cross rests while a large red ring drifts right by the sea.")
    named = ClipPrompt("A large red ring drifts right while a small blue cross rests by the sea.")
    video = acts(("sea", actors))
    assert score(video, named) == pytest.approx(score(video, swapped), abs=1e-5)


def test_open_attributes_are_not_judged():
    video = acts(("sea", (RING,)))
    vague = score(video, ClipPrompt("A ring drifts right."))
    judged = ("shape", "count", "motion", "persistence", "clarity", "smoothness", "no_flicker")
    others = [vague[k] for k in judged]
    # Components with nothing to judge take the mean of the others.
    assert vague["colour"] == pytest.approx(sum(others) / len(others), abs=1e-5)
    assert vague["scene"] == pytest.approx(vague["colour"], abs=1e-6)


def test_the_later_a_colour_comes_the_lower_the_score():
    blue = Actor("blue", "ring", "large", "right")
    early, late = acts(("sea", (RING,)), frames=15), acts(("sea", (blue,)), frames=15)
    results = [score(torch.cat([late[:, :k], early[:, k:]], 1)) for k in (0, 3, 6, 9, 12)]
    for name in ("colour", "persistence"):
        values = [result[name] for result in results][: 3 if name == "persistence" else 5]
        assert all(a > b + 0.03 for a, b in zip(values, values[1:], strict=False)), (name, values)


def test_frames_before_the_switch_are_not_judged_by_the_new_caption():
    before = Actor("blue", "cross", "small", "left")
    video = acts(("cave", (before,)), ("sea", (RING,)))
    told = ClipPrompt(str(PROMPT), "A small blue cross drifts left in a cave.", 12)
    alone = score(video[:, 12:])
    for name in ("colour", "shape", "scene", "count", "motion"):
        assert score(video, told)[name] == pytest.approx(alone[name], abs=0.02), name
    assert score(video)["colour"] < 0.6


def test_what_the_new_caption_leaves_open_should_stay():
    still, moving = Actor("red", "ring", "large", "still"), RING
    told = ClipPrompt(
        "Then the ring changes course and drifts right.", "A large red ring rests by the sea.", 12
    )
    kept = score(acts(("sea", (still,)), ("sea", (moving,))), told)
    other_scene = score(acts(("sea", (still,)), ("desert", (moving,))), told)
    blue = Actor("blue", "ring", "large", "right")
    other_colour = score(acts(("sea", (still,)), ("sea", (blue,))), told)
    assert kept["persistence"] > other_scene["persistence"] + 0.05
    assert kept["persistence"] > other_colour["persistence"] + 0.05
    free = ClipPrompt("Then the ring changes colour by the sea.", told.before, 12)
    recoloured = score(acts(("sea", (still,)), ("sea", (Actor("blue", "ring", "large", "still"),))), free)
    assert recoloured["persistence"] > 0.85


def test_jitter_lowers_smoothness_and_flicker_lowers_calm():
    calm = acts(("sea", (RING,)))
    shaky = torch.cat([calm[:, k].roll(k % 2 * 3, 3)[:, None] for k in range(12)], 1)
    factor = 1 + 0.2 * torch.tensor([1.0, -1.0] * 6)
    flickering = calm * factor[:, None, None, None]
    assert score(shaky)["smoothness"] < score(calm)["smoothness"] - 0.4
    assert score(flickering)["no_flicker"] < score(calm)["no_flicker"] - 0.4


def test_bobbing_and_a_glide_to_a_new_lane_are_smooth():
    bobbing = Actor("red", "ring", "large", "bob")
    prompt = ClipPrompt("A large red ring bobs up and down by the sea.")
    assert score(acts(("sea", (bobbing,))), prompt)["smoothness"] > 0.9
    before = Actor("red", "ring", "large", "still")
    pair = (before, Actor("blue", "cross", "small", "left"))
    joined = ClipPrompt(
        "Then a large red ring rests and a small blue cross drifts left by the sea.",
        "A large red ring rests by the sea.",
        12,
    )
    assert score(acts(("sea", (before,)), ("sea", pair)), joined)["smoothness"] > 0.85


@pytest.mark.parametrize("frames", [1, 2, 3, 6])
def test_short_clips_have_finite_scores(frames):
    result = score(acts(("sea", (RING,)))[:, :frames])
    assert all(0 <= value <= 1 for value in result.values()), result
    last = ClipPrompt(str(PROMPT), "A small blue cross drifts left in a cave.", frames - 1)
    assert all(0 <= v <= 1 for v in score(acts(("sea", (RING,)))[:, :frames], last).values())


def test_cheap_tricks_score_far_below_honest_videos(exact):
    video, prompts = exact
    honest = totals(video, prompts)
    checkers = ((torch.arange(FRAME_SIZE)[:, None] // 2 + torch.arange(FRAME_SIZE) // 2) % 2).float()
    scene = backgrounds()[torch.arange(len(video)) % 5][:, None]
    palette = torch.tensor([0.93, 0.16, 0.18])[:, None, None]
    # A demand that nothing is seen of scores as a guess would, or any picture would pay under any caption.
    guess = {"colour": 1 / 7, "shape": 1 / 5, "scene": 1 / 5, "count": 1 / 2, "motion": 1 / 4}
    chance = sum(DEFAULT_WEIGHTS[name] * value for name, value in guess.items())
    for trick in (scene, palette, checkers, torch.zeros(1), torch.ones(1)):
        assert totals(trick.expand_as(video), prompts).mean() < chance + 0.05
    asked = torch.tensor([any(w in p for w in ("left", "right", "bob", "bounc")) for p in prompts])
    first = video[torch.arange(len(video)), torch.tensor([p.switch for p in prompts])]
    frozen = totals(first[:, None].expand_as(video), prompts)
    assert (honest - frozen)[asked].mean() > 0.35
    # Too bright or grey: who moves where can still be made out, and is paid for.
    for spoiled in ((1.5 * video).clamp(0, 1), video.mean(2, keepdim=True).expand_as(video)):
        assert (honest - totals(spoiled, prompts)).mean() > 0.25
    other = [
        ClipPrompt(str(q), q.before, p.switch)
        for p, q in zip(prompts, prompts[1:] + prompts[:1], strict=True)
    ]
    assert (honest - totals(video, other)).mean() > 0.3
    assert totals(scene.expand_as(video), prompts).mean() < totals(video, other).mean()


def test_a_sharper_picture_of_the_wrong_thing_does_not_pay(exact):
    """A slight blur costs clarity most, and what it costs of following is not paid under other captions."""
    video, prompts = exact
    blurred = avg_pool2d(pad(video.flatten(0, 1), (1, 1, 1, 1), mode="replicate"), 3, 1).view_as(video)
    other = [
        ClipPrompt(str(q), q.before, p.switch)
        for p, q in zip(prompts, prompts[1:] + prompts[:1], strict=True)
    ]
    following = {name: DEFAULT_WEIGHTS[name] for name in ("colour", "shape", "scene", "count", "motion")}

    def change(captions: list[ClipPrompt]) -> dict[str, torch.Tensor]:
        sharp, soft = WorldScorer()(video, captions), WorldScorer()(blurred, captions)
        return {name: (sharp[name] - soft[name]).mean() for name in sharp}

    right, wrong = change(prompts), change(other)
    assert max(right, key=lambda name: float(right[name])) == "clarity"
    assert weighted_total(wrong, following) < 0.25 * weighted_total(right, following)


def test_harmless_noise_hardly_moves_the_total(exact):
    video, prompts = exact
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(0)) / 255
    change = totals((video + noise).clamp(0, 1), prompts) - totals(video, prompts)
    assert change.abs().max() < 0.02


def test_a_batch_scores_as_its_clips_do_alone(exact):
    video, prompts = exact
    together = WorldScorer()(video[:6], prompts[:6])
    for clip in range(6):
        alone = WorldScorer()(video[clip : clip + 1], prompts[clip : clip + 1])
        for name, value in alone.items():
            assert float(value) == pytest.approx(float(together[name][clip]), abs=1e-4), name


def test_bad_input_is_named():
    video = acts(("sea", (RING,)))
    with pytest.raises(ValueError, match="1 entries for 2 clips|2 entries for 1 clips"):
        WorldScorer()(video, [PROMPT, PROMPT])
    with pytest.raises(ValueError, match=f"switches at frame 12 of a clip of {video.shape[1]} frames"):
        WorldScorer()(video, [ClipPrompt(str(PROMPT), "", 12)])
    with pytest.raises(ValueError, match="zebra"):
        WorldScorer()(video, [ClipPrompt("A zebra sings.")])
