"""Text on the pages has the contrast that WCAG 2.1 asks of small text, in both colour schemes."""

import re
from importlib.resources import files

import pytest

ENOUGH = 4.5
TEXTS = {
    "report": [
        *[(ink, back) for ink in ("text", "soft", "up", "down") for back in ("page", "card", "quiet")],
        *[("up", "good-back"), ("down", "alarm-back"), ("text", "pending-back"), ("soft", "pending-back")],
        *[("card", role) for role in ("sink", "recent")],
    ],
    "arena": [
        *[(ink, back) for ink in ("text", "soft", "accent") for back in ("page", "card")],
        *[("accent", "accent-back"), ("warn", "page"), ("page", "accent"), ("text", "quiet")],
    ],
    "live": [
        *[(ink, back) for ink in ("text", "soft", "up", "down") for back in ("card", "quiet")],
        *[("soft", "page"), ("aligned", "page"), ("remark", "card"), ("page", "text")],
    ],
}
"""Page -> (colour of text, colour behind it), by their names in its style sheet."""


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = (int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4))
    red, green, blue = (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("page", TEXTS)
def test_text_can_be_read_in_both_schemes(page):
    style = files(f"kvpo.{page}").joinpath("assets", f"{page}.css").read_text()
    light, dark = (
        dict(re.findall(r"--([a-z-]+): (#[0-9a-fA-F]+)", part)) for part in style.split(":root {")[1:]
    )
    for scheme in (light, light | dark):
        for ink, back in TEXTS[page]:
            dim, bright = sorted((luminance(scheme[ink]), luminance(scheme[back])))
            assert (bright + 0.05) / (dim + 0.05) >= ENOUGH, (ink, back, scheme[ink], scheme[back])
