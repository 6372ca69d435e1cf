"""The picture of recall: a depth × length heat map for each task and figure."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from new_llm.report.picture import new_figure

FIGURES = {"exact": "greedy exact match", "first": "right answer ranked first", "mean_rank": "mean rank"}
TASKS = {"passkey": "pass key", "facts": "facts about invented persons"}
CELL_INCHES = (0.62, 0.5)
MARGIN_INCHES = (1.5, 1.5)
COLOR_MAP = "viridis"
DARK_BELOW = 0.6  # share of the colour map's range under which letters are white
EMPTY_COLOR = "0.92"


def plot_recall(result: dict[str, Any]) -> Figure:
    """A row of heat maps for each task: exact match, first places, mean rank; under each title its control.

    Args:
        result: `RecallResult.to_dict()`, or what a file of the command holds of it.
    """
    tasks = list(dict.fromkeys(cell["task"] for cell in result["cells"])) or list(TASKS)
    lengths, depths = (sorted({cell[key] for cell in result["cells"]}) for key in ("length", "depth"))
    width = len(FIGURES) * (CELL_INCHES[0] * max(3, len(lengths)) + MARGIN_INCHES[0])
    height = len(tasks) * (CELL_INCHES[1] * max(3, len(depths)) + MARGIN_INCHES[1])
    figure = new_figure(width, height)
    panels = figure.subplots(len(tasks), len(FIGURES), squeeze=False)
    for row, task in enumerate(tasks):
        cells = [cell for cell in result["cells"] if cell["task"] == task]
        for axes, name in zip(panels[row], FIGURES, strict=True):
            _draw(axes, cells, name, lengths, depths, result)
    share = "" if result["is_complete"] else " (partial)"
    figure.suptitle(
        f"Recall from memory, segments of {result['segment_length']:,} tokens, {result['num_trials']:,} texts{share}",
        fontsize=11,
    )
    return figure


def _draw(
    axes: Axes,
    cells: Sequence[dict[str, Any]],
    name: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    result: dict[str, Any],
) -> None:
    low, high = (1.0, float(result["num_candidates"])) if name == "mean_rank" else (0.0, 1.0)
    values = [[math.nan] * len(lengths) for _ in depths]
    for cell in cells:
        values[depths.index(cell["depth"])][lengths.index(cell["length"])] = cell["carried"][name]["value"]
    colors = matplotlib.colormaps[f"{COLOR_MAP}_r" if name == "mean_rank" else COLOR_MAP]
    if values and lengths:
        axes.pcolormesh(range(len(lengths)), range(len(depths)), values, cmap=colors, vmin=low, vmax=high)
        axes.set_facecolor(EMPTY_COLOR)
        axes.invert_yaxis()
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if math.isfinite(value):
                brightness = (high - value if name == "mean_rank" else value - low) / (high - low)
                text = f"{value:.1f}" if name == "mean_rank" else f"{100 * value:.0f}"
                color = "white" if brightness < DARK_BELOW else "black"
                axes.text(x, y, text, ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=8)
    axes.set_xlabel("length of the text, segments", fontsize=8)
    axes.set_ylabel("depth: 0 is the beginning", fontsize=8)
    task = TASKS.get(cells[0]["task"], cells[0]["task"]) if cells else ""
    unit = "" if name == "mean_rank" else " (%)"
    axes.set_title(f"{task}: {FIGURES[name]}{unit}\n{_say_control(cells, name, result)}", fontsize=9)


def _say_control(cells: Sequence[dict[str, Any]], name: str, result: dict[str, Any]) -> str:
    """What an empty memory gives where the sentence is out of the question's segment, and what a guess gives."""
    control = [cell["reset"][name]["value"] for cell in cells if cell["length"] > 1]
    mean = sum(control) / len(control) if control else math.nan
    if name == "mean_rank":
        chance = f"chance {result['chance_rank']:g}"
        return f"memory reset {mean:.1f}; {chance}" if control else chance
    said = [f"memory reset {100 * mean:.0f} %"] if control else []
    if name == "first":
        said.append(f"chance {100 * result['chance_first']:.0f} %")
    return "; ".join(said)
