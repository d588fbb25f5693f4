"""Formats numbers and text for pages, and fills page templates. All that is shown goes through ``escape``."""

import base64
import hashlib
import html
import json
import math
from datetime import UTC, datetime
from importlib.resources import files
from string import Template
from typing import Any

from kvpo import __version__
from kvpo.files import finite

MISSING = "n/a"
MINUS = "\u2212"
SYMBOLS = {"good": "\u2713", "neutral": "\u2248", "bad": "\u2193", "pending": "\u2026"}
"""Tone of a statement -> the sign in front of it."""


def escape(value: Any) -> str:
    """Text safe in HTML content and in double-quoted attributes."""
    return html.escape(str(value), quote=True)


def embed_json(value: Any) -> str:
    """JSON safe inside a ``<script type="application/json">`` element; non-finite numbers become null."""
    return json.dumps(finite(value), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def attribute_json(value: Any) -> str:
    """JSON safe inside a double-quoted attribute; non-finite numbers become null."""
    return escape(json.dumps(finite(value), separators=(",", ":"), allow_nan=False))


def number(value: Any) -> float | None:
    """``value`` as a finite float, or None if it is anything else (a missing key, NaN, text, a bool)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def numbers(values: Any) -> dict[str, float]:
    """The entries of a mapping that are finite numbers; empty if ``values`` is not a mapping."""
    if not isinstance(values, dict):
        return {}
    return {str(key): found for key, value in values.items() if (found := number(value)) is not None}


def mapping(value: Any, key: str) -> dict[str, Any]:
    """The mapping at ``value[key]``; empty if there is none, or ``value`` is not a mapping."""
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def tone_of(change: float | None) -> str:
    """The CSS class of a change: "up", "down", or "" if there is none."""
    return "up" if change and change > 0 else "down" if change and change < 0 else ""


def fixed(value: float | None, digits: int = 3) -> str:
    """A number with ``digits`` decimals and a real minus sign."""
    if value is None:
        return MISSING
    text = f"{value:.{digits}f}"
    return text.replace("-", "") if float(text) == 0 else text.replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """A change with its sign, ``digits`` decimals."""
    if value is None:
        return MISSING
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", MINUS)


def compact(value: float | None) -> str:
    """A number of any size in at most four significant digits: 0.0123, 1234, 1.2e-7."""
    if value is None:
        return MISSING
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:.4g}"
    else:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return MINUS + text[1:] if value < 0 else text


def significant(value: float | None) -> str:
    """A number with three significant digits, trailing zeros kept, so that a column of them lines up."""
    if value is None or value == 0 or not 1e-3 <= abs(value) < 1000:
        return compact(value)
    return f"{value:#.3g}".rstrip(".").replace("-", MINUS)


def percent(value: float | None) -> str:
    """A share as whole per cent, with one decimal below ten per cent."""
    if value is None:
        return MISSING
    share = 100 * value
    return f"{fixed(share, 1 if 0 < abs(share) < 10 else 0)} %"


def duration(seconds: float | None) -> str:
    """Seconds as '48 s', '5 min 12 s' or '3 h 04 min'."""
    if seconds is None:
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def title_of(key: str) -> str:
    """A metric's key as words: 'ratio_max' becomes 'Ratio max', 'velocity_kl' 'Velocity KL'."""
    words = " ".join(word.upper() if word in ("kl", "gb") else word for word in key.split("_") if word)
    return words[:1].upper() + words[1:]


def fill_page(template: str, script: str, **fields: str) -> str:
    """Fill the asset ``template`` with ``fields``; returns self-contained HTML that makes no requests.

    Its content security policy admits only the asset ``script`` (empty: no script).
    """
    assets = files("kvpo.report") / "assets"
    page, style, code = (
        (assets / name).read_text(encoding="utf-8") if name else ""
        for name in (template, "report.css", script)
    )
    return Template(page).substitute(
        fields,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        style=style,
        script=code,
        script_digest=base64.b64encode(hashlib.sha256(code.encode()).digest()).decode(),
    )
