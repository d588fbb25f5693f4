"""kvpo: preference alignment of streaming autoregressive video generators by KV-cache policy optimisation.

import kvpo

config = kvpo.preset("demo", {"optim.updates": 20})
summary = kvpo.align(config, "runs/try")
videos = kvpo.generate(config, "videos", run="runs/try")
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["align", "evaluate", "generate", "preset", "write_report"]

if TYPE_CHECKING:
    from kvpo.app.align import align
    from kvpo.app.configuration import preset
    from kvpo.app.evaluate import evaluate
    from kvpo.app.generate import generate
    from kvpo.report.page import write_report

_HOME = {
    "align": "kvpo.app.align",
    "evaluate": "kvpo.app.evaluate",
    "generate": "kvpo.app.generate",
    "preset": "kvpo.app.configuration",
    "write_report": "kvpo.report.page",
}


def __getattr__(name: str) -> Any:
    """Import the functions of ``__all__`` on first access, because torch takes seconds to load."""
    if name not in _HOME:
        raise AttributeError(f"module 'kvpo' has no attribute {name!r}")
    return vars(importlib.import_module(_HOME[name]))[name]
