"""Tables of the documents are those that the committed results print."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which imports what it shares with others by plain name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("printed")


def test_tables_of_documents_are_printed_from_results(printed: ModuleType) -> None:
    marked = 0
    for path in printed.documents():
        text = path.read_text(encoding="utf-8")
        assert printed.printed(text) == text, f"python benchmarks/printed.py writes {path} anew"
        marked += len(printed.MARKED.findall(text))
        assert text.count("<!-- printed:") == len(printed.MARKED.findall(text)), path
    assert marked > 5


def test_a_number_that_was_changed_by_hand_is_printed_over(printed: ModuleType) -> None:
    text = "<!-- printed: causality.json by_routed_frames -->\nby hand\n<!-- /printed -->\n"
    again = printed.printed(text)
    assert "by hand" not in again and again.count("|") > 10 and printed.printed(again) == again
