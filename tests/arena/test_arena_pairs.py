"""Ballots are a function of key, rater and scenes; repeats swap sides, attention pairs are one video."""

from collections import Counter

from kvpo.arena.pairs import ballots
from kvpo.arena.study import Design, Question, Scene
from tests.arena.raters import KEY, scenes_of


def test_every_pair_comes_once_with_repeats_swapped_and_attention_pairs_between():
    scenes = scenes_of(40)
    shown = ballots(KEY, "ann", scenes, most=100)
    kinds = Counter(one.kind for one in shown)
    assert kinds == {"pair": 40, "repeat": 4, "attention": 2}
    place = {one.videos: n for n, one in enumerate(shown) if one.kind == "pair"}
    assert len({frozenset(videos) for videos in place}) == 40
    for n, one in enumerate(shown):
        if one.kind == "repeat":
            assert n > place[one.videos[::-1]] + 3
        if one.kind == "attention":
            assert one.videos[0] == one.videos[1] and n > 0
        assert set(one.videos) <= set(scenes[one.scene].videos.values())


def test_order_and_sides_are_the_raters_own_and_can_be_drawn_again():
    scenes = scenes_of(60)
    ann, ben = (ballots(KEY, name, scenes, most=60) for name in ("ann", "ben"))
    assert ann == ballots(KEY, "ann", scenes, most=60)
    assert ann != ballots(b"another key", "ann", scenes, most=60)
    assert [one.scene for one in ann] != [one.scene for one in ben]
    left = [one.videos[0] == scenes[one.scene].videos["base"] for one in ann if one.kind == "pair"]
    assert 15 < sum(left) < 45
    differ = {frozenset(one.videos): one.videos for one in ann if one.kind == "pair"}
    other = {frozenset(one.videos): one.videos for one in ben if one.kind == "pair"}
    assert 15 < sum(differ[pair] != other[pair] for pair in differ) < 45


def test_sides_of_many_raters_are_balanced_for_every_pair():
    scenes = scenes_of(2)
    left = Counter()
    for n in range(2000):
        for one in ballots(KEY, f"rater {n}", scenes, most=2):
            left[one.scene] += one.videos[0] == scenes[one.scene].videos["base"]
    assert all(abs(count / 2000 - 0.5) < 0.04 for count in left.values())


def test_three_arms_make_three_pairs_a_scene_of_which_so_many_are_shown():
    scenes = scenes_of(10, ("a", "b", "c"))
    assert sum(one.kind == "pair" for one in ballots(KEY, "ann", scenes, most=100)) == 30
    assert sum(one.kind == "pair" for one in ballots(KEY, "ann", scenes, most=12)) == 12


def test_small_studies_have_no_repeats_and_equal_videos_are_no_pair():
    scenes = scenes_of(4)
    assert {one.kind for one in ballots(KEY, "ann", scenes, most=20)} == {"pair"}
    same = [type(scenes[0])(("p",), dict.fromkeys(("a", "b"), "one digest"))]
    assert ballots(KEY, "ann", same, most=20) == []


def test_rankings_show_every_video_of_a_scene_in_a_drawn_order():
    scenes = scenes_of(30, ("a", "b", "c", "d"))
    shown = ballots(KEY, "ann", scenes, most=20, ranked=True)
    assert len(shown) == 20 and {one.kind for one in shown} == {"ranking"}
    assert all(sorted(one.videos) == sorted(scenes[one.scene].videos.values()) for one in shown)
    first = Counter(list(scenes[one.scene].videos.values()).index(one.videos[0]) for one in shown)
    assert len(first) > 2


def test_a_ranking_asks_the_first_question_of_any_scene_and_pairs_those_on_stories_of_stories_alone():
    questions = (
        Question("switch", "Which one follows?", stories=True),
        Question("overall", "Which one is better?"),
    )
    asked = {
        (ranked, len(segments)): Design("Study", ranked=ranked, questions=questions).asked_about(
            Scene(segments, {})
        )
        for ranked in (True, False)
        for segments in (("a",), ("a", "b"))
    }
    assert asked[True, 1] == asked[True, 2] == ["switch"]
    assert asked[False, 1] == ["overall"] and asked[False, 2] == ["switch", "overall"]
