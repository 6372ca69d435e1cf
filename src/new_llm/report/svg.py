"""Inline SVG: matplotlib figures that take their colours and their typeface from the page."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Colours that stand for the page's CSS variables while matplotlib draws; nothing else in a figure has them.
INK, MUTED, GRID = "#010101", "#010102", "#010103"
NUM_SERIES = 6
_SERIES = [f"#0102{index:02x}" for index in range(NUM_SERIES)]
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid"} | {c: f"series-{i}" for i, c in enumerate(_SERIES)}

# Outlines of the markers in a 10 × 10 box, for the page's key; the order is matplotlib's in MARKERS.
MARKERS = ("o", "s", "^", "D", "v", "P")
KEY_PATHS = (
    "M5 1.6a3.4 3.4 0 1 0 .01 0z",
    "M2 2h6v6h-6z",
    "M5 1.2 8.8 8.4H1.2z",
    "M5 .8 9.2 5 5 9.2.8 5z",
    "M5 8.8 1.2 1.6h7.6z",
    "M3.7 1h2.6v2.7H9v2.6H6.3V9H3.7V6.3H1V3.7h2.7z",
)
POINTS_PER_INCH = 72
WIDTH_INCHES = 4.9  # about a phone's width in points, so that text stays readable there
HEIGHT_INCHES = 2.9
FONT_POINTS = 9.8

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": FONT_POINTS,
    "axes.labelsize": FONT_POINTS,
    "xtick.labelsize": FONT_POINTS,
    "ytick.labelsize": FONT_POINTS,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Chart:
    """A picture with the words that go with it."""

    name: str
    title: str
    svg: str
    reading: str
    """How to read it, in a sentence or two."""
    series: tuple[int, ...] = ()
    """Places of the models that the key above it names."""
    signs: tuple[tuple[str, str], ...] = ()
    """Other signs that the key explains: (solid, pale, dot, ring or dash; what it stands for)."""


def series_color(index: int) -> str:
    """The colour of the model at that place in the results, the same in every figure."""
    return _SERIES[index % NUM_SERIES]


def series_marker(index: int) -> str:
    """The marker of the model at that place: colours are never the only difference."""
    return MARKERS[index % len(MARKERS)]


@contextmanager
def drawing(height_inches: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one pair of axes in the page's style; draw and call `to_svg` inside the context."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Glyph.*missing from.*")  # the browser has its own fonts
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.grid(axis="y")
        yield figure, axes


def to_svg(figure: Figure, name: str, alt: str) -> str:
    """The figure as an <svg> element to stand in a page.

    Args:
        figure: drawn with this module's colours.
        name: prefix of the element's ids; unique in the page.
        alt: what the picture shows, for who does not see it.

    Returns:
        Markup without fixed size, fonts or ids of its own, so that several may stand in one page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    width, height = figure.get_size_inches() * POINTS_PER_INCH
    box = f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(alt)}"'
    svg = re.sub(r"<svg[^>]*>", lambda _: f"<svg {box}>", svg, count=1)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg).replace("xlink:href", "href")
    svg = re.sub(r"font: (?:\w+ )??([\d.]+px) [^;\"]+", r"font-size: \1", svg)
    svg = re.sub(r"#0102?[0-9a-f]{2,4}\b", lambda m: f"var(--{_VARIABLES[m[0]]})" if m[0] in _VARIABLES else m[0], svg)
    return re.sub(r"\s*\n\s*", "\n", svg)
