"""A page of a report as its elements and its visible text."""

from html.parser import HTMLParser

from kvpo.report.page import write_report

VOID = {"meta", "input", "br", "img", "link", "hr"}
SVG_EMPTY = {"path"}


class Structure(HTMLParser):
    """Checks that elements nest, and collects them and the visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID and not (tag in SVG_EMPTY and self.get_starttag_text().endswith("/>")):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


def parse(text: str) -> Structure:
    structure = Structure()
    structure.feed(text)
    assert structure.open == []
    return structure


def page_of(directory) -> tuple[str, Structure]:
    text = write_report(directory).read_text()
    return text, parse(text)
