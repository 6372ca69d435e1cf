"""The summary of an experiment as rows of text: for the console, and for the page."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from new_llm.formats import (
    MISSING,
    format_bytes,
    format_count,
    format_number,
    format_percent,
    format_short,
    format_with_error,
)
from new_llm.report.outcome import mean_unigram
from new_llm.report.results import compute_mean, compute_spread, get_finite, get_number, get_value
from new_llm.report.runs import Run
from new_llm.report.series import Series, group_series

__all__ = [
    "COLUMNS",
    "Cell",
    "Row",
    "format_number",
    "format_percent",
    "render_summary_table",
    "summarize",
    "summarize_series",
]

UNIGRAM = "unigram"
RATIO = "×\N{NO-BREAK SPACE}unigram"
VERDICT = "verdict"


@dataclass(frozen=True)
class Cell:
    """One value of the summary."""

    text: str
    title: str = ""
    """The exact value or a longer word, for who asks."""
    best: bool = False
    """The lowest of its column, where lower is better."""
    level: str = ""
    """A verdict's level; other cells have none."""
    value: float | None = None
    """What the row is sorted by in this column; None: its text."""


@dataclass(frozen=True)
class Row:
    """One model of the summary, or the floor of skill."""

    name: str
    cells: tuple[Cell, ...]
    is_floor: bool = False
    series: int = -1
    """The model's place; the floor has none."""


@dataclass(frozen=True)
class Column:
    """One measure: where it is in a model's entry and how it reads."""

    name: str
    """Its name where it stands alone; an indented one belongs to the measure above it."""
    group: str
    label: str
    """Its name under its group's."""
    value: Callable[[dict[str, Any], dict[str, Any]], float | None]
    """From the model's entry and the whole results."""
    text: Callable[[float | None], str] = format_number
    compare: bool = False
    """Lower is better, and the lowest is marked."""
    exact: bool = False
    """The text is rounded; the exact count goes into the cell's title."""
    error: tuple[str, ...] = ()
    """Where the standard error is."""
    interval: tuple[str, ...] = ()
    """Where the two ends of the interval are, for the cell's title."""


def _at(*keys: str) -> Callable[[dict[str, Any], dict[str, Any]], float | None]:
    return lambda entry, results: get_number(entry, *keys)


def _unigram_ratio(entry: dict[str, Any], results: dict[str, Any]) -> float | None:
    value = get_number(entry, "evaluation", "sliding", "perplexity")
    unigram = get_finite(results, "unigram_perplexity")
    return value / unigram if value is not None and unigram else None


def _format_ratio(value: float | None) -> str:
    return format_number(value, 3)


PERPLEXITY, REVERSAL, TRAINING = "Validation perplexity", "Reversal perplexity", "Training"
_SLIDING = ("evaluation", "sliding")
_REVERSAL = ("evaluation", "reversal")
COLUMNS = (
    Column(
        "perplexity",
        PERPLEXITY,
        "sliding",
        _at(*_SLIDING, "perplexity"),
        compare=True,
        error=(*_SLIDING, "standard_error"),
    ),
    Column("  streaming", PERPLEXITY, "streaming", _at("evaluation", "streaming", "perplexity"), compare=True),
    Column("  per word", PERPLEXITY, "per word", _at(*_SLIDING, "word_perplexity"), compare=True),
    Column(f"  {RATIO}", PERPLEXITY, RATIO, _unigram_ratio, _format_ratio, compare=True),
    Column("verdict", PERPLEXITY, VERDICT, lambda entry, results: None),
    Column("bits per byte", "Bits", "per byte", _at(*_SLIDING, "bits_per_byte"), compare=True),
    *(
        Column(
            name,
            REVERSAL,
            direction,
            _at(*_REVERSAL, f"{direction}_perplexity"),
            compare=True,
            interval=(*_REVERSAL, "intervals", f"{direction}_perplexity"),
        )
        for name, direction in (("reversal, forward", "forward"), ("  backward", "backward"))
    ),
    Column("parameters", "Size", "parameters", _at("num_parameters", "total"), format_short, exact=True),
    Column("memory", "Size", "memory", _at("memory_info", "total_bytes"), format_bytes, exact=True),
    Column("tokens/s", TRAINING, "tokens/s", _at("training", "tokens_per_second"), format_count),
    Column("peak memory", TRAINING, "peak memory", _at("training", "peak_memory_bytes"), format_bytes, exact=True),
)


def summarize(results: dict[str, Any]) -> list[Row]:
    """`summarize_series` of one run's results."""
    runs = [Run(results)]
    return summarize_series(group_series(runs), runs)


def summarize_series(series: Sequence[Series], runs: Sequence[Run], *, mark_best: bool = True) -> list[Row]:
    """One row a model, and the unigram's where it is known; cells follow `COLUMNS`.

    A cell of several seeds holds their mean, that of the sliding perplexity with their standard deviation.

    Args:
        series: the models.
        runs: what they are from.
        mark_best: whether the lowest of a column is marked: the models were measured on the same text.
    """
    columns: list[list[Cell]] = []
    for column in COLUMNS:
        if column.label == VERDICT:
            columns.append([_make_verdict(one) for one in series])
            continue
        found = [_find_values(one, column) for one in series]
        means = [compute_mean(values) if values else None for values in found]
        finite = [value for value in means if value is not None and math.isfinite(value)]
        lowest = min(finite) if mark_best and column.compare and len(set(finite)) > 1 else None
        columns.append(
            [
                _make_cell(one, column, values, mean, is_best=lowest is not None and mean == lowest)
                for one, values, mean in zip(series, found, means, strict=True)
            ]
        )
    rows = [
        Row(one.name, cells, series=one.index) for one, cells in zip(series, zip(*columns, strict=True), strict=True)
    ]
    unigram = mean_unigram(runs)
    if unigram is not None:
        texts = {"sliding": format_number(unigram), RATIO: "1"}
        rows.append(Row(UNIGRAM, tuple(Cell(texts.get(column.label, "")) for column in COLUMNS), is_floor=True))
    return rows


def _find_values(series: Series, column: Column) -> list[float]:
    """The members' values; of several members the finite ones."""
    found = [column.value(member.entry, member.run.results) for member in series.members]
    known = [value for value in found if value is not None]
    return known if len(known) < 2 else [value for value in known if math.isfinite(value)]


def _make_cell(series: Series, column: Column, values: list[float], mean: float | None, *, is_best: bool) -> Cell:
    entry = series.members[0].entry
    text, title = column.text(mean), _format_ends(entry, column)
    if len(values) > 1:
        spread = compute_spread(values)
        text = format_with_error(mean, spread) if column.error else text
        each = ", ".join(column.text(value) for value in values)
        title = f"{len(values)} seeds: {each}; standard deviation {column.text(spread)}"
    elif column.error:
        text = format_with_error(mean, get_number(entry, *column.error))
    elif column.exact and mean is not None:
        title = format_count(mean)
    return Cell(text, title, is_best, value=mean if mean is not None and math.isfinite(mean) else None)


def _format_ends(entry: dict[str, Any], column: Column) -> str:
    ends = get_value(entry, *column.interval) if column.interval else None
    if not isinstance(ends, list) or len(ends) != 2:
        return ""
    low, high = (get_number({"end": end}, "end") for end in ends)
    return f"interval {format_number(low)} – {format_number(high)}"


def _make_verdict(series: Series) -> Cell:
    """The first verdict that a member has."""
    for member in series.members:
        verdict = get_value(member.entry, "evaluation", "sliding", "verdict")
        if isinstance(verdict, dict) and verdict.get("level"):
            level, text, span = (str(verdict.get(key) or "") for key in ("level", "text", "range"))
            title = f"{text or level}, perplexity {span}" if span else text
            return Cell("still training" if level == "training" else level, title=title, level=level)
    return Cell(MISSING)


def render_summary_table(results: dict[str, Any]) -> Table:
    """The summary for a console: measures down, models across, so that it fits a narrow terminal.

    The lowest perplexity of a row is bold. Measures that no model has are left out.
    """
    rows = summarize(results)
    table = Table(
        title=Text(str(results.get("name") or "results")),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    table.add_column("")
    for row in rows:
        table.add_column(Text(row.name), justify="right", style="dim" if row.is_floor else "", overflow="fold")
    for index, column in enumerate(COLUMNS):
        cells = [row.cells[index] for row in rows]
        if all(cell.text in ("", MISSING) for cell in cells):
            continue
        table.add_row(Text(column.name), *(Text(cell.text, style="bold" if cell.best else "") for cell in cells))
    return table
