"""Drawing SVG by hand: figures that take their colours and their typeface from the page."""

from dataclasses import dataclass, field
from html import escape
from typing import Any

# matplotlib's markers for the pictures that stand alone, in the order of `KEY_PATHS`.
MARKERS = ("o", "s", "^", "D", "v", "P")
# The same markers as outlines in a 10 × 10 box.
KEY_PATHS = (
    "M5 1.6a3.4 3.4 0 1 0 .01 0z",
    "M2 2h6v6h-6z",
    "M5 1.2 8.8 8.4H1.2z",
    "M5 .8 9.2 5 5 9.2.8 5z",
    "M5 8.8 1.2 1.6h7.6z",
    "M3.7 1h2.6v2.7H9v2.6H6.3V9H3.7V6.3H1V3.7h2.7z",
)
NUM_COLORS = 7  # with six markers no two of 42 models look the same
WIDTH = 520.0
HEIGHT = 310.0


@dataclass(frozen=True)
class View:
    """One way to see a chart's numbers."""

    svg: str
    label: str = ""
    """What tells it from the chart's other views: an x-axis, a measure, a layer."""
    plot: dict[str, Any] | None = None
    """Scales and points for the page's read-out; None: the marks carry their own words."""


@dataclass(frozen=True)
class Chart:
    """A picture with the words that go with it."""

    name: str
    title: str
    views: tuple[View, ...]
    """The first is shown until another is chosen."""
    reading: str
    """How to read it, in a sentence or two."""
    series: tuple[int, ...] = ()
    """Places of the models that the key above it names."""
    signs: tuple[tuple[str, str], ...] = ()
    """Other signs that the key explains: (solid, pale, dot, ring, dash, dots or thin; what it stands for)."""
    switch: str = ""
    """What the views are a choice of; charts with the same word change together."""


def color(series: int) -> str:
    """The CSS colour of the model at that place, the same in every figure."""
    return f"var(--series-{series % NUM_COLORS})"


def marker_path(series: int) -> str:
    """The outline of the model's marker: colours are never the only difference."""
    return KEY_PATHS[series % len(KEY_PATHS)]


def number(value: float) -> str:
    """A coordinate, to a tenth."""
    return f"{value:.1f}".removesuffix(".0")


@dataclass
class Canvas:
    """An SVG in the making; y grows downwards, text is escaped.

    Attributes:
        height: of the picture; its width is `WIDTH`.
        left: where the plot begins.
        right: where it ends.
        top: likewise.
        bottom: likewise.
    """

    height: float = HEIGHT
    left: float = 56.0
    right: float = WIDTH - 12
    top: float = 28.0
    bottom: float = HEIGHT - 46
    parts: list[str] = field(default_factory=list)

    def add(self, markup: str) -> None:
        """Markup that is known to be safe."""
        self.parts.append(markup)

    def open_series(self, series: int | None) -> None:
        """What follows belongs to a model, and can be hidden with it; None: to none. Close it by `close`."""
        self.add("<g>" if series is None else f'<g data-s="{series}" style="color:{color(series)}">')

    def close(self) -> None:
        """End the group."""
        self.add("</g>")

    def text(self, x: float, y: float, words: str, *, anchor: str = "start", kind: str = "") -> None:
        """A line of text; kind is a class of the page's style."""
        if not words:
            return
        attributes = f' class="{kind}"' if kind else ""
        attributes += f' text-anchor="{anchor}"' if anchor != "start" else ""
        self.add(f'<text x="{number(x)}" y="{number(y)}"{attributes}>{escape(words)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """A straight line."""
        self.add(f'<path class="{kind}" d="M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}"/>')

    def curve(self, points: list[tuple[float, float]], kind: str) -> None:
        """A line through points."""
        if points:
            steps = "L".join(f"{number(x)} {number(y)}" for x, y in points)
            self.add(f'<path class="{kind}" d="M{steps}"/>')

    def band(self, points: list[tuple[float, float, float]]) -> None:
        """The area between (x, low, high)."""
        if len(points) > 1:
            around = [(x, low) for x, low, _ in points] + [(x, high) for x, _, high in reversed(points)]
            steps = "L".join(f"{number(x)} {number(y)}" for x, y in around)
            self.add(f'<path class="band" d="M{steps}z"/>')

    def mark(self, series: int, x: float, y: float, *, size: float = 11.0, kind: str = "mark", tip: str = "") -> None:
        """The model's marker around a point; `tip` are the words of its read-out."""
        scale = size / 10
        place = f"translate({number(x - size / 2)} {number(y - size / 2)}) scale({number(scale)})"
        words = f' data-t="{escape(tip)}"' if tip else ""
        self.add(f'<path class="{kind}" transform="{place}" d="{marker_path(series)}"{words}/>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, *, tip: str = "", more: str = "") -> None:
        """A rectangle; `more` is further markup of its attributes that is known to be safe."""
        words = f' data-t="{escape(tip)}"' if tip else ""
        corner = f'x="{number(x)}" y="{number(y)}" width="{number(max(0.0, width))}" height="{number(height)}"'
        self.add(f'<rect class="{kind}" {corner}{words}{more}/>')

    def to_svg(self, alt: str) -> str:
        """The picture as an element to stand in a page; `alt` says what it shows to who does not see it."""
        box = f'viewBox="0 0 {number(WIDTH)} {number(self.height)}" role="img" aria-label="{escape(alt)}"'
        return f"<svg {box}>{''.join(self.parts)}</svg>"
