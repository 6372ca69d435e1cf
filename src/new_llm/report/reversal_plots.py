"""Pictures of the reversal curse."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from new_llm.report.axes import (
    DASHES,
    LOG_FROM_RATIO,
    PALE,
    get_perplexity,
    get_share,
    label_axes,
    set_log_ticks,
    set_rows,
    set_scale,
)
from new_llm.report.results import get_value, named_models
from new_llm.report.svg import INK, Chart, drawing, series_color, to_svg
from new_llm.report.tables import format_number, format_percent

DIRECTIONS = (("solid", "forward"), ("pale", "backward"))


def plot_reversal_perplexity(results: dict[str, Any]) -> Chart | None:
    """Perplexity of the sentences, forward against backward, a pair of bars a model."""
    rows = _read_reversal(results, "perplexity")
    known = [value for row in rows for value in row.values if value is not None]
    if not known:
        return None
    known += [end for row in rows for interval in row.intervals if interval is not None for end in interval]
    is_log = max(known) > LOG_FROM_RATIO
    with drawing(0.6 + 0.58 * len(rows)) as (figure, axes):
        if is_log:
            axes.set_xscale("log")
            set_log_ticks(axes.xaxis, 1.0, max(known))
            axes.set_xlim(1, max(known) ** 1.16)
        else:
            set_scale(axes, "x", [])
            axes.set_xlim(0, max(known) * 1.16)
        # On a logarithmic axis bars grow from perplexity 1, which is certainty.
        said = _draw_pairs(axes, rows, 1.0 if is_log else 0.0, lambda value: format_number(value, 3))
        label_axes(axes, "perplexity", "", count_x=False)
        is_trained = get_value(results, "config", "data", "reversal_pairs") is not False
        trained = f"Training held {'the forward sentences only' if is_trained else 'neither direction'}."
        return Chart(
            "reversal-perplexity",
            "Perplexity of the facts",
            to_svg(figure, "reversal-perplexity", f"Perplexity of the sentences. {said}"),
            f"{trained} The further backward exceeds forward, the stronger the reversal curse.{_describe_lines(rows)}",
            signs=DIRECTIONS,
        )


def plot_reversal_accuracy(results: dict[str, Any]) -> Chart | None:
    """Share of right answers that rank first, forward against backward, a pair of bars a model."""
    rows = _read_reversal(results, "accuracy")
    known = [value for row in rows for value in row.values if value is not None]
    if not known:
        return None
    known += [end for row in rows for interval in row.intervals if interval is not None for end in interval]
    entries = [get_share(e, "evaluation", "reversal", "chance_accuracy") for _, e in named_models(results)]
    chance = next((value for value in entries if value is not None), None)
    with drawing(0.6 + 0.58 * len(rows)) as (figure, axes):
        axes.set_xlim(0, min(1.16, max(*known, chance or 0.0, 0.01) * 1.16))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g}%"))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        said = _draw_pairs(axes, rows, 0.0, format_percent, chance or 0.0)
        if chance is not None:
            axes.axvline(chance, color=INK, linewidth=1.2, dashes=DASHES)
        label_axes(axes, "share of facts", "", count_x=False)
        line = [("dash", f"chance, {format_percent(chance)}")] if chance is not None else []
        return Chart(
            "reversal-accuracy",
            "Right answer ranked first",
            to_svg(figure, "reversal-accuracy", f"Share of facts whose right answer ranks first. {said}"),
            "Share of facts whose right answer is likelier than every other answer of its relation."
            + _describe_lines(rows),
            signs=(*DIRECTIONS, *line),
        )


@dataclass(frozen=True)
class _Row:
    """One model's forward and backward value, each with its interval where it has one."""

    index: int
    name: str
    values: list[float | None]
    intervals: list[tuple[float, float] | None]


def _read_reversal(results: dict[str, Any], measure: str) -> list[_Row]:
    """The models that have either value."""
    rows: list[_Row] = []
    for index, (name, entry) in enumerate(named_models(results)):
        reversal = get_value(entry, "evaluation", "reversal")
        get = get_perplexity if measure == "perplexity" else get_share
        keys = [f"{direction}_{measure}" for direction in ("forward", "backward")]
        values = [get(reversal, key) for key in keys]
        if any(value is not None for value in values):
            rows.append(_Row(index, name, values, [_read_interval(reversal, key, get) for key in keys]))
    return rows


def _read_interval(reversal: Any, key: str, get: Callable[..., float | None]) -> tuple[float, float] | None:
    """Both ends of a figure's interval; None where one is missing."""
    found = get_value(reversal, "intervals", key)
    if not isinstance(found, list) or len(found) != 2:
        return None
    low, high = (get({"end": end}, "end") for end in found)
    return None if low is None or high is None else (low, high)


def _describe_lines(rows: list[_Row]) -> str:
    has_lines = any(interval is not None for row in rows for interval in row.intervals)
    return " Thin lines are bootstrap intervals over facts." if has_lines else ""


def _draw_pairs(axes: Axes, rows: list[_Row], base: float, words: Any, clear: float = 0.0) -> str:
    """Two bars a row, solid and pale, each with its value and interval; says the same in words.

    A value is written right of its bar and its interval, and right of `clear` where a line is drawn.
    """
    set_rows(axes, [row.name for row in rows])
    for place, row in enumerate(rows):
        for value, interval, offset, alpha in zip(row.values, row.intervals, (-0.19, 0.19), (1.0, PALE), strict=True):
            if value is None:
                continue
            color = series_color(row.index)
            axes.barh(place + offset, value - base, 0.34, left=base, color=color, alpha=alpha, linewidth=0)
            ends = interval or (value, value)
            if interval is not None:
                axes.plot(ends, (place + offset, place + offset), color=INK, linewidth=1.0, solid_capstyle="butt")
            at = (max(value, ends[1], clear), place + offset)
            axes.annotate(words(value), at, (4, 0), textcoords="offset points", va="center")
    return " ".join(f"{row.name}: forward {words(row.values[0])}, backward {words(row.values[1])}." for row in rows)
