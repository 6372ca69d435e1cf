"""The summary of an experiment as rows of text: for the console, and for the page."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from new_llm.report.results import get_finite, get_number, get_value, named_models

MISSING = "—"
UNIGRAM = "unigram"
RATIO = "×\N{NO-BREAK SPACE}unigram"
VERDICT = "verdict"


def format_number(value: float | None, digits: int = 4) -> str:
    """A number with that many significant digits, thousands separated; a dash where there is none."""
    special = _format_special(value)
    if value is None or special is not None:
        return special or MISSING
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude >= 9 or magnitude < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def format_count(value: float | None) -> str:
    """A count in full: 70,426,624."""
    return _format_special(value) or f"{value:,.0f}"


def format_short(value: float | None) -> str:
    """A count in thousands, millions or billions: 70.4M."""
    return _format_special(value) or _scale(value or 0.0, 1000.0, ("", "k", "M", "B", "T"), "")


def format_bytes(value: float | None) -> str:
    """Bytes in decimal units: 1.05 MB."""
    return _format_special(value) or _scale(value or 0.0, 1000.0, ("B", "kB", "MB", "GB", "TB"), " ")


def format_percent(value: float | None) -> str:
    """A share as a percentage: 4.2%."""
    return _format_special(value) or f"{100 * (value or 0.0):.1f}%"


def format_seconds(value: float | None) -> str:
    """A duration: 42 s, 3 min 05 s, 2 h 10 min."""
    special = _format_special(value)
    if value is None or special is not None:
        return special or MISSING
    seconds = round(value)
    if value < 10:
        return f"{value:.1f} s"
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600:,} h {seconds % 3600 // 60:02d} min"


def format_with_error(value: float | None, error: float | None) -> str:
    """A value ± its standard error, cut where the error's second digit is: 83.93 ± 0.50."""
    if error is None or not 0 < error < math.inf or value is None or not math.isfinite(value):
        return format_number(value)
    decimals = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}"


def _format_special(value: float | None) -> str | None:
    if value is None:
        return MISSING
    if math.isnan(value):
        return "NaN"
    return ("∞" if value > 0 else "−∞") if math.isinf(value) else None


def _scale(value: float, base: float, units: tuple[str, ...], space: str) -> str:
    power = 0
    while abs(value) >= base and power < len(units) - 1:
        value, power = value / base, power + 1
    number = f"{value:.0f}" if power == 0 else format_number(value, 3)
    return f"{number}{space if units[power] else ''}{units[power]}"


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


@dataclass(frozen=True)
class Row:
    """One model of the summary, or the floor of skill."""

    name: str
    cells: tuple[Cell, ...]
    is_floor: bool = False


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
    """One row a model in the results' order, and the unigram's where it is known; cells follow `COLUMNS`."""
    named = named_models(results)
    columns: list[list[Cell]] = []
    for column in COLUMNS:
        if column.label == VERDICT:
            columns.append([_make_verdict(entry) for _, entry in named])
            continue
        values = [column.value(entry, results) for _, entry in named]
        finite = [value for value in values if value is not None and math.isfinite(value)]
        lowest = min(finite) if column.compare and len(set(finite)) > 1 else None
        columns.append(
            [
                Cell(
                    format_with_error(value, get_number(entry, *column.error)) if column.error else column.text(value),
                    title=format_count(value) if column.exact and value is not None else _format_ends(entry, column),
                    best=lowest is not None and value == lowest,
                )
                for value, (_, entry) in zip(values, named, strict=True)
            ]
        )
    rows = [Row(name, cells) for (name, _), cells in zip(named, zip(*columns, strict=True), strict=True)]
    unigram = get_number(results, "unigram_perplexity")
    if unigram is not None:
        texts = {"sliding": format_number(unigram), RATIO: "1"}
        cells = tuple(Cell(texts.get(column.label, "")) for column in COLUMNS)
        rows.append(Row(UNIGRAM, cells, is_floor=True))
    return rows


def _format_ends(entry: dict[str, Any], column: Column) -> str:
    ends = get_value(entry, *column.interval) if column.interval else None
    if not isinstance(ends, list) or len(ends) != 2:
        return ""
    low, high = (get_number({"end": end}, "end") for end in ends)
    return f"interval {format_number(low)} – {format_number(high)}"


def _make_verdict(entry: dict[str, Any]) -> Cell:
    verdict = get_value(entry, "evaluation", "verdict")
    if not isinstance(verdict, dict) or not verdict.get("level"):
        return Cell(MISSING)
    level, text, span = (str(verdict.get(key) or "") for key in ("level", "text", "range"))
    title = f"{text or level}, perplexity {span}" if span else text
    return Cell("still training" if level == "training" else level, title=title, level=level)


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
