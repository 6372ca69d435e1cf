"""Curves over an axis, with bands, and the numbers for the page's read-out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from new_llm.report.points import Point, round_number
from new_llm.report.scale import Scale, make_scale, thin_labels
from new_llm.report.svg import HEIGHT, Canvas, View

MAX_MARKED = 30  # points of a curve that are marked one by one
NUM_MARKS = 6  # markers of a longer curve


@dataclass(frozen=True)
class Curve:
    """One line.

    Attributes:
        series: the model it belongs to, which gives colour and marker; None: to none.
        name: in the read-out; empty: the curve is not read.
        points: by rising x.
        kind: line, pale, dash, dots or thin.
        is_marked: whether it has markers.
    """

    series: int | None
    name: str
    points: list[Point]
    kind: str = "line"
    is_marked: bool = True


@dataclass(frozen=True)
class Axis:
    """How a direction reads.

    Attributes:
        title: its name.
        log: whether it is logarithmic; None: where the values ask for it.
        low: its least value; None: from the values.
        high: its greatest; likewise.
        words: how a tick reads; None: short.
        names: categories at 0, 1, 2 … in place of numbers.
        say: what the read-out's numbers are: number, count, percent, seconds, power or share.
    """

    title: str
    log: bool | None = False
    low: float | None = None
    high: float | None = None
    words: Callable[[float], str] | None = None
    names: tuple[str, ...] = ()
    say: str = "number"


def draw_lines(
    curves: Sequence[Curve],
    x: Axis,
    y: Axis,
    alt: str,
    *,
    label: str = "",
    level: tuple[float, str] | None = None,
    rings: Sequence[tuple[int, float, float]] = (),
) -> View:
    """A chart of curves.

    Args:
        curves: at least one with a point; later ones are drawn over earlier ones.
        x: the axis below.
        y: the axis at the left.
        alt: what the picture shows, for who does not see it.
        label: the view's.
        level: a dashed line at a y, and its name.
        rings: (series, x, y) to draw a ring around.
    """
    canvas = Canvas()
    xs = [point.x for curve in curves for point in curve.points]
    ys = [value for curve in curves for point in curve.points for value in point[1:] if value is not None]
    ys += [level[0]] if level else []
    across = _make_x_scale(x, xs, canvas)
    up = make_scale(ys, canvas.bottom, canvas.top, log=y.log, low=y.low, high=y.high, words=y.words)
    draw_axes(canvas, across, up, x, y)
    if level:
        canvas.line(canvas.left, up(level[0]), canvas.right, up(level[0]), "level")
    for curve in curves:
        canvas.open_series(curve.series)
        canvas.band(
            [(across(p.x), up(p.low), up(p.high)) for p in curve.points if p.low is not None and p.high is not None]
        )
        places = [(across(point.x), up(point.y)) for point in curve.points]
        canvas.curve(places, curve.kind)
        if curve.is_marked and curve.series is not None:
            every = 1 if len(places) <= MAX_MARKED else max(1, len(places) // NUM_MARKS)
            first = 0 if every == 1 else curve.series * every // 4 % every
            for place in places[first::every]:
                canvas.mark(curve.series, *place, size=10 if every == 1 else 9)
        canvas.close()
    for series, at, value in rings:
        canvas.open_series(series)
        canvas.add(f'<circle class="ring" cx="{across(at):.1f}" cy="{up(value):.1f}" r="9"/>')
        canvas.close()
    read = [curve for curve in curves if curve.name and curve.points]
    plot: dict[str, Any] = {
        "x": across.to_list(),
        "y": up.to_list(),
        "xt": x.title,
        "xs": x.say,
        "ys": y.say,
        "names": list(x.names),
        "curves": [
            {
                "s": curve.series if curve.series is not None else -1,
                "n": curve.name,
                "p": [_plain(p) for p in curve.points],
            }
            for curve in read
        ],
    }
    return View(canvas.to_svg(alt), label, plot if read else None)


def _plain(point: Point) -> list[float]:
    return [float(f"{point.x:.9g}"), *(round_number(value) for value in point[1:] if value is not None)]


def _make_x_scale(x: Axis, xs: list[float], canvas: Canvas) -> Scale:
    if not x.names:
        low = x.low if x.low is not None or min(xs, default=0) < 0 or x.log else 0.0
        return make_scale(xs, canvas.left, canvas.right, log=x.log, low=low, high=x.high, words=x.words)
    last = len(x.names) - 1
    labels = thin_labels(x.names, canvas.right - canvas.left)
    ticks = tuple((float(place), label) for place, label in enumerate(labels))
    return Scale(-0.3, last + 0.3, canvas.left, canvas.right, ticks=ticks)


def draw_axes(canvas: Canvas, across: Scale, up: Scale, x: Axis, y: Axis) -> None:
    """Grid, ticks and names of both axes; the vertical one's stands above it, level, where it is read first."""
    for value, words in up.ticks:
        canvas.line(canvas.left, up(value), canvas.right, up(value), "grid")
        canvas.text(canvas.left - 8, up(value) + 4.5, words, anchor="end")
    canvas.line(canvas.left, canvas.bottom, canvas.right, canvas.bottom, "axis")
    for value, words in across.ticks:
        canvas.line(across(value), canvas.bottom, across(value), canvas.bottom + 4, "axis")
        at = across(value)
        anchor = "end" if at > canvas.right - 16 and not x.names else "middle"
        canvas.text(at if anchor == "middle" else canvas.right, canvas.bottom + 19, words, anchor=anchor)
    canvas.text((canvas.left + canvas.right) / 2, HEIGHT - 4, x.title, anchor="middle")
    canvas.text(0, 14, y.title)
