"""Horizontal bars with intervals, a group of bars a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from new_llm.report.points import shorten
from new_llm.report.scale import LOG_FROM_RATIO, format_tick, make_scale
from new_llm.report.svg import WIDTH, Canvas, View

BAR, GAP, NAME, FOOT = 17.0, 3.0, 24.0, 44.0
MAX_NAME = 48
LETTER = 9.5  # width of a letter on a phone
NO_ROOM = 1.16  # factor by which an axis reaches beyond the longest bar, for its number


@dataclass(frozen=True)
class Bar:
    """A value, its interval where it has one, and what it is in the read-out."""

    value: float
    what: str
    interval: tuple[float, float] | None = None
    is_pale: bool = False


@dataclass(frozen=True)
class BarRow:
    """A model's bars."""

    series: int
    name: str
    bars: tuple[Bar, ...]


def draw_bars(
    rows: Sequence[BarRow],
    words: Callable[[float], str],
    title: str,
    alt: str,
    *,
    label: str = "",
    base: float = 0.0,
    level: float | None = None,
    ticks: Callable[[float], str] | None = None,
) -> View:
    """A chart of bars.

    Args:
        rows: at least one bar among them.
        words: how a value reads.
        title: of the axis below.
        alt: what the picture shows, for who does not see it.
        label: the view's.
        base: where bars begin; above 0 the axis is logarithmic where the values reach far.
        level: where a dashed line is drawn; None: nowhere.
        ticks: how a tick reads; None: short.
    """
    heights = [NAME + len(row.bars) * (BAR + GAP) + 6 for row in rows]
    canvas = Canvas(height=sum(heights) + FOOT, left=0.0, top=0.0, bottom=sum(heights))
    values = [end for row in rows for bar in row.bars for end in (bar.value, *(bar.interval or ()))]
    values += [level] if level is not None else []
    is_log = base > 0 and max(values) > LOG_FROM_RATIO * base
    room = LETTER * max(len(words(bar.value)) for row in rows for bar in row.bars) + 8
    low = base if is_log else 0.0
    high = max(max(values), low * 1.05, 1e-9)
    across = make_scale([low, high], 0.0, WIDTH - room, log=is_log, low=low, high=high, words=ticks or format_tick)
    for value, text in across.ticks:
        canvas.line(across(value), 0, across(value), canvas.bottom, "grid")
        anchor = "start" if across(value) < 12 else "middle"
        canvas.text(across(value), canvas.bottom + 17, text, anchor=anchor)
    canvas.text(WIDTH / 2, canvas.height - 4, title, anchor="middle")
    if level is not None:
        canvas.line(across(level), 0, across(level), canvas.bottom, "level")
    top = 0.0
    for row, height in zip(rows, heights, strict=True):
        canvas.open_series(row.series)
        canvas.mark(row.series, 6, top + 13, size=10)
        canvas.text(16, top + 18, shorten(row.name, MAX_NAME), kind="name")
        for place, bar in enumerate(row.bars):
            y = top + NAME + place * (BAR + GAP)
            ends = bar.interval or (bar.value, bar.value)
            tip = f"{row.name}: {bar.what} {words(bar.value)}"
            tip += f", interval {words(ends[0])} – {words(ends[1])}" if bar.interval else ""
            kind = "bar pale" if bar.is_pale else "bar"
            canvas.box(across(low), y, max(1.0, across(bar.value) - across(low)), BAR, kind, tip=tip)
            if bar.interval:
                middle = y + BAR / 2
                canvas.line(across(ends[0]), middle, across(ends[1]), middle, "interval")
                for end in ends:
                    canvas.line(across(end), middle - 4, across(end), middle + 4, "interval")
            at = max(across(bar.value), across(ends[1]))
            if level is not None and 0 <= across(level) - at < 6:
                at = across(level)
            canvas.text(at + 6, y + BAR - 3.5, words(bar.value), kind="value")
        canvas.close()
        top += height
    return View(canvas.to_svg(alt), label)
