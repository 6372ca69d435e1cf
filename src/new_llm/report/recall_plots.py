"""Heat maps of recall by depth and length."""

from collections.abc import Sequence
from typing import Any

from new_llm.report.evaluation_plots import FIGURES, MAX_CELLS, TASKS, Record, find_records
from new_llm.report.heat_chart import HeatCell, draw_heat
from new_llm.report.points import MAX_VALUE, get_between
from new_llm.report.results import compute_mean, get_entries, get_finite
from new_llm.report.series import Series
from new_llm.report.svg import Chart, View


def plot_recalls(series: Sequence[Series]) -> list[Chart]:
    """A chart for each model and task, a view for each figure; of several seeds the first that was measured."""
    charts: list[Chart] = []
    for one in series:
        for number, records in enumerate(find_records(one, "recall").values()):
            cells = get_entries(records[0], "result", "cells")
            for task in dict.fromkeys(str(cell.get("task")) for cell in cells):
                chosen = [cell for cell in cells if str(cell.get("task")) == task]
                chart = plot_recall(one, records[0], chosen, task, f"recall-{one.index}-{number}-{len(charts)}")
                charts += [chart] if chart is not None else []
    return charts


def plot_recall(one: Series, record: Record, cells: list[dict[str, Any]], task: str, name: str) -> Chart | None:
    """Recall of one task with the memory carried, by depth (down) and length (across)."""
    placed: dict[tuple[float, float], dict[str, Any]] = {}
    for cell in cells:
        length, depth = get_finite(cell, "length"), get_finite(cell, "depth")
        if length is not None and depth is not None:
            placed[depth, length] = cell
    depths, lengths = (sorted({key[side] for key in placed})[:MAX_CELLS] for side in (0, 1))
    candidates = get_finite(record, "result", "num_candidates")
    views: list[View] = []
    for figure, title in FIGURES.items():
        table = [
            [_make_cell(placed.get((depth, length)), figure, candidates, depth, length) for length in lengths]
            for depth in depths
        ]
        known = [cell for line in table for cell in line if cell is not None]
        if not known:
            continue
        alt = f"Recall of {one.name}, {title}, depth by length. {'; '.join(cell.tip for cell in known)}."
        titles = (f"{title}{'' if figure == 'mean_rank' else ', %'}; depth 0 is the beginning", "length, segments")
        columns = [f"{length:,.0f}" for length in lengths]
        views.append(draw_heat([f"{depth:g}" for depth in depths], columns, table, titles, alt, label=title))
    if not views:
        return None
    trials = get_finite(record, "result", "num_trials")
    partial = "Interrupted: what had been measured by then. " if record.get("status") == "partial" else ""
    return Chart(
        name,
        f"Recall of {one.name}: {TASKS.get(task, task)}",
        tuple(views),
        f"{partial}With the memory carried from the sentence to the question. {_say_control(cells, record)}"
        + (f" {trials:,.0f} texts in all." if trials else ""),
        (one.index,),
        switch="recall figure",
    )


def _make_cell(
    cell: dict[str, Any] | None, figure: str, candidates: float | None, depth: float, length: float
) -> HeatCell | None:
    least, most = (1.0, MAX_VALUE) if figure == "mean_rank" else (0.0, 1.0)
    value = get_between(least, most, cell, "carried", figure, "value")
    if value is None:
        return None
    low, high = (get_between(least, most, cell, "carried", figure, end) for end in ("low", "high"))
    where = f"depth {depth:g}, length {length:,.0f}"
    if figure == "mean_rank":
        span = (candidates or value) - 1
        ends = f", interval {low:.1f} – {high:.1f}" if low is not None and high is not None else ""
        return HeatCell(1 - (value - 1) / span if span > 0 else 1.0, f"{value:.1f}", f"{where}: {value:.1f}{ends}")
    ends = f", interval {100 * low:.0f} – {100 * high:.0f}%" if low is not None and high is not None else ""
    return HeatCell(value, f"{100 * value:.0f}", f"{where}: {100 * value:.0f}%{ends}")


def _say_control(cells: list[dict[str, Any]], record: Record) -> str:
    """What an empty memory gives where the sentence is out of the question's segment, and what a guess gives."""
    far = [cell for cell in cells if (get_finite(cell, "length") or 0) > 1]
    said: list[str] = []
    for figure, words in FIGURES.items():
        most = MAX_VALUE if figure == "mean_rank" else 1.0
        found = [get_between(0.0, most, cell, "reset", figure, "value") for cell in far]
        values = [value for value in found if value is not None]
        if values:
            mean = compute_mean(values)
            said.append(f"{words} {mean:.1f}" if figure == "mean_rank" else f"{words} {100 * mean:.0f}%")
    chance = get_finite(record, "result", "chance_first")
    control = f"With the memory reset, beyond one segment: {', '.join(said)}." if said else ""
    return control + (f" A guess ranks first in {100 * chance:.0f}%." if chance is not None else "")
