"""The summary of an experiment, with a row per model and a column per figure, for both console and page."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Self

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from new_llm.config.terminal import make_line
from new_llm.evaluation import MEASURES, Column, ask_measure
from new_llm.formats import (
    MISSING,
    format_bytes,
    format_count,
    format_number,
    format_seconds,
    format_short,
    format_with_error,
)
from new_llm.report.headline import describe_outcome
from new_llm.report.results import (
    Member,
    Place,
    Series,
    compute_mean,
    compute_spread,
    get_value,
    group_series,
    list_places,
    make_run,
    name_section,
    write_value,
)

GAP = 2  # blanks between columns of the console's tables


@dataclass(frozen=True)
class Cell:
    """One figure of one model.

    `hint` has details: the exact value, the interval, the values by seed. Rows are sorted by `value`; None for words
    and empty cells.
    """

    text: str
    hint: str = ""
    value: float | None = None
    is_best: bool = False


Heading = tuple[str, str]
"""The heading of a column's group, and the column's own."""


@dataclass(frozen=True)
class Summary:
    """The table; each of `rows` has a model's name, its index among the models, and a cell for each heading."""

    headings: list[Heading]
    rows: list[tuple[str, int, list[Cell]]]


# A model's size and training cost: group, title, keys in the model's entry, format.
FACTS: tuple[tuple[str, str, tuple[str, ...], Callable[[float | None], str]], ...] = (
    ("Model", "context, tokens", ("context_tokens",), format_count),
    ("Model", "parameters", ("num_parameters", "total"), format_short),
    ("Model", "memory", ("memory_info", "total_bytes"), format_bytes),
    ("Model", "state, numbers", ("cost", "state_numbers"), format_short),
    ("Model", "FLOPs/ token", ("cost", "flops_per_token"), format_short),
    ("Training", "tokens", ("training", "tokens"), format_short),
    ("Training", "best epoch", ("training", "best_epoch"), format_count),
    ("Training", "tokens/s", ("training", "tokens_per_second"), format_count),
    ("Training", "time", ("training", "seconds"), format_seconds),
    ("Training", "CPU time", ("training", "cpu_seconds"), format_seconds),
    ("Training", "peak memory", ("training", "peak_memory_bytes"), format_bytes),
)


def list_facts(member: Member) -> list[Column]:
    """A trained model's size and cost as columns, with the exact number as the hint."""
    return [
        Column(title, title, value, write, group=group, hint=format_count(value))
        for group, title, keys, write in FACTS
        if (value := get_value(member.entry, *keys)) is not None
    ]


def list_measured_columns(place: Place, result: dict[str, Any]) -> list[Column]:
    """A measure's columns for one result, each with its group's heading."""
    columns: list[Column] = []
    for column in ask_measure(place[0], "columns", result, []):
        group = make_line(column.group or MEASURES[place[0]].title)
        columns.append(replace(column, group=name_section(group, place)))
    return columns


def summarize(series: Sequence[Series], *, mark_best: bool = True) -> Summary:
    """Summarise the models: their size, the results of measures, and the cost of training.

    `mark_best`: mark the best value of each column; only sensible if all models were measured on the same text.
    """
    facts = _collect([[list_facts(member) for member in one.members] for one in series])
    columns = [found for found in facts if found[0][0] == "Model"]
    for place in list_places(series):
        results = [one.find_results(place).values() for one in series]
        listed = [[list_measured_columns(place, result) for result in some] for some in results]
        columns += _collect(listed, mark_best=mark_best)
    columns += [found for found in facts if found[0][0] != "Model"]
    groups = list(dict.fromkeys(heading[0] for heading, _ in columns))
    columns.sort(key=lambda one: groups.index(one[0][0]))  # keep the columns of a group together
    known = [(heading, cells) for heading, cells in columns if any(cell.text != MISSING for cell in cells)]
    rows = [(one.name, one.index, [cells[place] for _, cells in known]) for place, one in enumerate(series)]
    return Summary([heading for heading, _ in known], rows)


def _collect(
    listed: Sequence[Sequence[Sequence[Column]]], *, mark_best: bool = False, has_intervals: bool = False
) -> list[tuple[Heading, list[Cell]]]:
    """The heading and the cells (one per model) of each column that any model has."""
    by_key: dict[str, list[list[Column]]] = {}
    for place, members in enumerate(listed):
        for column in (column for columns in members for column in columns):
            by_key.setdefault(column.key, [[] for _ in listed])[place].append(column)
    found: list[tuple[Heading, list[Cell]]] = []
    for models in by_key.values():
        first = next(columns[0] for columns in models if columns)
        cells = [_make_cell(columns, has_intervals=has_intervals) for columns in models]
        values = {cell.value for cell in cells if cell.value is not None}
        if mark_best and first.better and len(values) > 1:
            best = min(values) if first.better == "lower" else max(values)
            cells = [replace(cell, is_best=cell.value == best) for cell in cells]
        found.append(((make_line(first.group), make_line(first.title)), cells))
    return found


def _make_cell(columns: Sequence[Column], *, has_intervals: bool) -> Cell:
    """One model's cell: for several seeds their mean, with values and standard deviation as the hint; for one seed its
    value, perhaps with its interval."""
    if not columns:
        return Cell(MISSING)
    first, hint = columns[0], make_line(columns[0].hint)
    values = [column.value for column in columns if isinstance(column.value, int | float)]
    finite = [value for value in values if math.isfinite(value)]
    if not values:
        return Cell(MISSING if first.value is None else make_line(first.value), hint)
    if len(values) > 1 and finite:
        mean, each = compute_mean(finite), ", ".join(write_value(first, value) for value in values)
        spread = f"; standard deviation {format_number(compute_spread(finite), 3)}" if len(finite) > 1 else ""
        return Cell(write_value(first, mean), f"{len(values)} seeds: {each}{spread}", mean)
    if first.low is not None and first.high is not None:
        hint = f"{hint} interval {format_number(first.low)} to {format_number(first.high)}".strip()
    text = write_value(first, values[0]) if first.error is None else format_with_error(values[0], first.error)
    if has_intervals and finite and first.low is not None and first.high is not None:
        text += f" [{write_value(first, first.low)}, {write_value(first, first.high)}]"
    return Cell(text, hint, finite[0] if finite else None)


class SummaryTable:
    """A run's summary for rich: tables that fit the console, and a sentence that sums them up."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.run = make_run(results)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        series = group_series([self.run])
        outcome = describe_outcome(series)
        yield Text(self.run.name, style="bold")
        yield from make_tables(summarize(series), options.max_width)
        yield Text(f"\n{outcome.text}")
        yield Text(" ".join(outcome.caveats))


class ColumnTable:
    """A table of measures' columns for rich, with a row for each name, and with intervals."""

    @classmethod
    def of_words(cls, rows: Sequence[tuple[str, Mapping[str, str]]]) -> Self:
        """A table of words, each row given by its headings."""
        return cls([(name, [Column(title, title, words) for title, words in row.items()]) for name, row in rows])

    def __init__(self, rows: Sequence[tuple[str, Sequence[Column]]]) -> None:
        found = _collect([[columns] for _, columns in rows], has_intervals=True)
        named = [(make_line(name), 0, [cells[place] for _, cells in found]) for place, (name, _) in enumerate(rows)]
        self.summary = Summary([heading for heading, _ in found], named)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Padding]:
        return make_tables(self.summary, options.max_width)


def make_tables(summary: Summary, width: int) -> Iterator[Padding]:
    """Split a summary into tables at most `width` characters wide, unless a single word or figure is longer.

    No word is cut: headings and names wrap between words, and columns that do not fit go into further tables below.
    Columns of a group stay together if they fit into one table.
    """
    names = [name for name, _, _ in summary.rows]
    name_width = min(max(map(cell_len, names), default=0), max(_longest_word(*names), width // 3))
    widths = [
        max(_longest_word(*heading), *(cell_len(cells[place].text) for *_, cells in summary.rows))
        for place, heading in enumerate(summary.headings)
    ]

    def fits(columns: Sequence[int]) -> bool:
        return name_width + sum(GAP + widths[place] for place in columns) <= width

    block: list[int] = []
    for _, found in groupby(range(len(widths)), lambda place: summary.headings[place][0]):
        group = list(found)
        for columns in [group] if fits(group) else [[place] for place in group]:
            if block and not fits([*block, *columns]):
                yield _make_table(summary, block, name_width, widths)
                block = []
            block += columns
    if block:
        yield _make_table(summary, block, name_width, widths)


def _make_table(summary: Summary, columns: Sequence[int], name_width: int, widths: Sequence[int]) -> Padding:
    """A table of some of the columns; a group's heading is above its first column."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    table.width = name_width + sum(GAP + widths[place] for place in columns)  # may exceed the console's width
    table.add_column(width=name_width)
    shared = ""
    for place in columns:
        group, title = summary.headings[place]
        above = "" if group in ("", shared) else f"{group}\n"
        shared = group
        table.add_column(Text(above + title), width=widths[place], justify="right")
    for name, _, cells in summary.rows:
        shown = [Text(cells[place].text, style="bold" if cells[place].is_best else "") for place in columns]
        table.add_row(Text(name), *shown)
    return Padding(table, (1, 0, 0, 0), expand=False)


def _longest_word(*texts: str) -> int:
    return max((cell_len(word) for text in texts for word in text.split()), default=0)
