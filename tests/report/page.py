"""A page as tests read it."""

from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

from new_llm.report.page import draw_charts, render_page, write_page
from new_llm.report.results import Run, group_series

VOID = {"meta", "link", "br", "hr", "img", "input", "source", "wbr"}


class Page(HTMLParser):
    """The page's elements; refuses tags that are closed out of order or not at all."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.source = text
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def ids(self) -> list[str]:
        return [value for _, attributes in self.elements if (value := attributes.get("id"))]

    def read(self) -> str:
        return " ".join(" ".join(self.text).split())


def read_page(runs: Sequence[Run], folder: Path | None = None) -> Page:
    """The page of some runs; with a folder it is written there with its figures."""
    if folder is not None:
        write_page(runs, folder / "report.html")
        return Page((folder / "report.html").read_text(encoding="utf-8"))
    series = group_series(runs)
    return Page(render_page(runs, series, draw_charts(series)))
