"""Data of a run's report."""

from kvpo.app.report_data import act_routes
from kvpo.prompts import VideoPrompt


def test_routes_of_an_act_show_that_act_or_there_are_none() -> None:
    def frames_of(switches: tuple[int, ...]) -> list[list[int]]:
        prompt = VideoPrompt(0, ("a", "b", "c"), switches, 36)
        return [[one.frame for one in route] for route in act_routes(prompt, switches[1], 3, 3, 3)]

    assert frames_of((12, 24)) == [[6, 7, 8], [15, 16, 17]]
    assert frames_of((12, 18)) == [[6, 7, 8], [12, 13, 14]]
    assert frames_of((12, 15)) == [], "act 2 is among the recent frames"
    assert frames_of((3, 12)) == [], "act 1 is in the sink"
