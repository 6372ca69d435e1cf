"""Charts drawn: as SVG for the page, in its colours, and as files that stand alone."""

import copy
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import vl_convert

from new_llm import charts
from new_llm.charts import PALETTE, SHAPES, Chart
from new_llm.config import UserError
from new_llm.config.files import read_address_limit, write_atomically, write_text_atomically
from new_llm.config.terminal import hide_home
from new_llm.formats import format_bytes

PNG_SCALE = 2.0
ENGINE_BYTES = 80 * 10**9
"""Addresses that Vega's JavaScript engine reserves, with some to spare."""
ENDINGS = (".svg", ".png", ".csv")
# Which of the page's variables stands for each colour of `new_llm.charts`.
VARIABLES = {color: f"--series-{place}" for place, color in enumerate(PALETTE)} | {
    charts.INK: "--ink",
    charts.MUTED: "--muted",
    charts.GRID: "--grid",
    charts.HEAT: "--heat",
    charts.HEAT_INK: "--heat-ink",
}


def find_obstacle() -> str | None:
    """Why no chart can be drawn here; None: nothing. The engine that draws would end the whole process."""
    limit = read_address_limit()
    if limit is None or limit >= ENGINE_BYTES:
        return None
    return (
        f"charts can't be drawn: their engine reserves {format_bytes(ENGINE_BYTES)} of addresses (not of memory), and "
        f"this process may use {format_bytes(limit)} (ulimit -v)"
    )


def draw(spec: dict[str, Any]) -> str:
    """The SVG of a chart's specification; nothing is loaded, and no home folder is named."""
    return hide_home(vl_convert.vegalite_to_svg(spec, allowed_base_urls=[]))


def write_table(chart: Chart) -> str:
    """A chart's numbers as CSV, without home folders and lone surrogates, which JSON may hold and UTF-8 can't."""
    return hide_home(chart.to_csv()).encode("utf-8", "replace").decode("utf-8")


def write_chart(chart: Chart, path: Path, svg: str | None = None) -> None:
    """Write a chart as .svg or .png, or its numbers as .csv; another ending is a `UserError`.

    `svg` is the chart, if it has been drawn.
    """
    if path.suffix not in ENDINGS:
        raise UserError(f"{path}: a picture's name ends with {', '.join(ENDINGS)}")
    if path.suffix == ".csv":
        write_text_atomically(path, write_table(chart))
        return
    if obstacle := find_obstacle():
        raise UserError(f"{path}: {obstacle}")
    svg = svg or draw(chart.spec)
    if path.suffix == ".svg":
        write_text_atomically(path, svg)
        return
    with write_atomically(path) as temporary:
        temporary.write_bytes(vl_convert.svg_to_png(svg, scale=PNG_SCALE))


def name_apart(charts: Iterable[Chart]) -> Iterator[Chart]:
    """Charts with names that differ: of two with one name the later one gets a number."""
    taken: set[str] = set()
    for chart in charts:
        name, number = chart.name, 2
        while name in taken:
            name, number = f"{chart.name[:76]}-{number}", number + 1
        taken.add(name)
        yield dataclasses.replace(chart, name=name)


def write_charts(charts: Iterable[Chart], folder: Path) -> None:
    """Write charts into a folder, each as SVG, PNG and CSV under its name."""
    for chart in name_apart(charts):
        svg = draw(chart.spec)
        for ending in ENDINGS:
            write_chart(chart, folder / f"{chart.name}{ending}", svg)


def draw_for_page(chart: Chart, spec: dict[str, Any], places: Mapping[str, int]) -> str:
    """An SVG element for the page: no legend, the page's colours, a tooltip for each mark.

    Args:
        places: the models' places, which choose their colours and marks in all charts alike.
    """
    spec = copy.deepcopy(spec)
    spec["config"]["background"] = None
    _adapt_encodings(spec, list(place_series(chart, places).values()))
    return adapt_svg(draw(spec), f"{chart.title} {chart.view}".strip())


def place_series(chart: Chart, places: Mapping[str, int]) -> dict[str, int]:
    """By name, the places of a chart's series, in the order of its legend: the models' own, else as the chart has them.

    Empty where the chart has no legend.
    """
    color = chart.spec.get("encoding", {}).get("color", {})
    if color.get("legend") is None:
        return {}
    named = zip(color["scale"]["domain"], color["scale"]["range"], strict=True)
    return {name: places.get(name, PALETTE.index(own) if own in PALETTE else 0) for name, own in named}


def choose_mark(place: int) -> tuple[str, str]:
    """The colour, as a variable of the page, and the shape of the series at a place."""
    return f"var(--series-{place % len(PALETTE)})", SHAPES[place % len(SHAPES)]


def _adapt_encodings(part: Any, places: Sequence[int]) -> None:
    """Take the legends out, and let the models' places choose colours and shapes."""
    for channel, options in (("color", PALETTE), ("shape", SHAPES)):
        encoding = part.get("encoding", {}).get(channel)
        if encoding and encoding.get("legend") is not None:
            encoding["legend"] = None
            encoding["scale"]["range"] = [options[place % len(options)] for place in places]
    for layer in part.get("layer", ()):
        _adapt_encodings(layer, places)


_COLOR = re.compile(r'\b(fill|stroke)="(#[0-9a-f]{6})"')
_NOISE = re.compile(
    r' (?:role|aria-roledescription|aria-hidden|pointer-events|stroke-miterlimit|class|version|font-family)="[^"]*"'
)
_GROUP_LABEL = re.compile(r'(<g\b[^>]*?) aria-label="[^"]*"')
_MARK_LABEL = re.compile(r'<(path|text|line|rect) aria-label="([^"]*)"([^>]*?)/>')
_UNSEEN = re.compile(r'<path(?: [\w-]+="[^"]*")*? d="(?:M0,0h0v0h0Z)?"[^>]*/>|<g></g>')
_ROOT = re.compile(r'<svg [^>]*?width="([\d.]+)" height="([\d.]+)"[^>]*>')


def adapt_svg(svg: str, label: str) -> str:
    """Vega's SVG as an element of the page: the page's colours and letters, labels of marks as tooltips."""
    svg = _NOISE.sub("", svg)
    svg = _GROUP_LABEL.sub(r"\1", svg)
    svg = _MARK_LABEL.sub(r"<\1\3><title>\2</title></\1>", svg)
    for _ in range(3):  # what holds nothing but what is empty is empty
        svg = _UNSEEN.sub("", svg)
    svg = _COLOR.sub(lambda m: f'{m[1]}="var({VARIABLES[m[2]]})"' if m[2] in VARIABLES else m[0], svg)
    return _ROOT.sub(rf'<svg viewBox="0 0 \1 \2" role="img" aria-label="{escape(label)}">', svg, count=1)
