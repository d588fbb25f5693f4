"""Data of a run's report."""

from kvpo.app.report_data import act_routes
from kvpo.config import ExplorationConfig
from kvpo.prompts import VideoPrompt


def frames_of(switches: tuple[int, ...], counts: tuple[int, ...] = (0, 3)) -> dict[str, list[int]]:
    prompt, exploration = VideoPrompt(0, ("a", "b", "c"), switches, 36), ExplorationConfig(routed=3, recent=3)
    routes = act_routes(prompt, switches[1], exploration, 3, counts)
    return {name: [one.frame for one in route] for name, route in routes.items()}


def test_routes_of_an_act_show_that_act_or_there_are_none() -> None:
    first, second = "routed: 3 of act 1", "routed: 3 of act 2"
    assert frames_of((12, 24)) == {first: [6, 7, 8], second: [15, 16, 17]}
    assert frames_of((12, 18)) == {first: [6, 7, 8], second: [12, 13, 14]}
    assert frames_of((12, 15)) == {}, "act 2 is among the recent frames"
    assert frames_of((3, 12)) == {}, "act 1 is in the sink"


def test_routes_may_show_both_acts() -> None:
    assert frames_of((12, 24), (1, 2)) == {
        "routed: 2 of act 1, 1 of act 2": [6, 7, 16],
        "routed: 1 of act 1, 2 of act 2": [7, 15, 16],
    }
