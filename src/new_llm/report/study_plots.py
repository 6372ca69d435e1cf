"""The pictures of a study, as SVG files that stand alone."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from new_llm.report.picture import COLORS, new_figure, save_picture

MARKERS = "os^Dvp*"

WIDTH_INCHES = 7.0
ROW_INCHES = 0.28
CURVES_INCHES = 3.4
MAX_CURVES = len(COLORS)

Curve = list[tuple[float, Mapping[str, Any]]]
"""Places, and at each a mean with its interval."""


def write_study_figures(summary: dict[str, Any], folder: Path) -> None:
    """Draw what the summary has numbers for.

    `differences.svg`; for each text `distance-<text>.svg`, against the memory reset, and one against each baseline;
    `recall-<task>.svg` of exact answers, `recall-<task>-first.svg` of right ones ranked first.
    """
    figures = {"differences": plot_differences(summary)}
    variants = summary["variants"].values()
    for what in dict.fromkeys(what for entry in variants for what in entry["ranges"]):
        text = what.removeprefix("long-")
        figures[f"distance-{text}"] = plot_distance(summary, what, "reset")
        for baseline in summary["baselines"]:
            figures[f"distance-{text}-against-{baseline}"] = plot_distance(summary, what, baseline)
    for task in dict.fromkeys(task for entry in variants for task in entry["recall"]):
        figures[f"recall-{task}"] = plot_recall(summary, task, "exact")
        figures[f"recall-{task}-first"] = plot_recall(summary, task, "first")
    for name, figure in figures.items():
        if figure is not None:
            save_picture(figure, folder / f"{name}.svg")


def plot_differences(summary: Mapping[str, Any]) -> Figure | None:
    """Perplexity of long validation documents, memory carried against reset: a row a variant."""
    rows = [
        (name, figure)
        for name, entry in _with_memory(summary)
        if (figure := entry["figures"].get("validation: carried vs reset")) is not None
    ]
    if not rows:
        return None
    figure = new_figure(WIDTH_INCHES, 1.1 + ROW_INCHES * len(rows))
    axes = figure.add_subplot()
    axes.axvline(0, color="0.5", linewidth=1)
    for place, (_, found) in enumerate(rows):
        x = 100 * found["mean"]
        if found["low"] is not None and math.isfinite(found["low"]):
            axes.plot([100 * found["low"], 100 * found["high"]], [place, place], color=COLORS[0], linewidth=2)
        axes.plot([x], [place], "o", color=COLORS[0], markersize=6)
        axes.annotate(f"{x:+.1f} %", (x, place), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_xlabel("perplexity with the memory carried, against reset at every segment (%)")
    _clean(axes)
    return figure


def plot_distance(summary: Mapping[str, Any], what: str, against: str) -> Figure | None:
    """Perplexity with the memory carried, against another way, by distance from the document's start.

    A curve a variant that has memory, the first `MAX_CURVES`, with its interval as a band.

    Args:
        summary: of the study.
        what: `long-<text>`.
        against: `reset`, or a baseline.
    """
    curves: dict[str, Curve] = {}
    for name, entry in _with_memory(summary):
        ranges = [found for found in entry["ranges"].get(what, []) if against in found["relative"]]
        if ranges:
            curves[name] = [(_find_middle(found), found["relative"][against]) for found in ranges]
    if not curves:
        return None
    figure = new_figure(WIDTH_INCHES, CURVES_INCHES)
    axes = figure.add_subplot()
    axes.axhline(0, color="0.5", linewidth=1)
    _draw_curves(axes, curves)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
    axes.set_xlabel("tokens from the document's start (middle of the range)")
    axes.set_ylabel(f"perplexity against {against} (%)")
    return figure


def plot_recall(summary: Mapping[str, Any], task: str, score: Literal["exact", "first"]) -> Figure | None:
    """Share of questions answered so well, by segments between the sentence and the question.

    A curve a variant, the first `MAX_CURVES`, those with memory first.

    Args:
        summary: of the study.
        task: passkey or facts.
        score: exact, or first: the right answer is more probable than the other candidates.
    """
    curves: dict[str, Curve] = {}
    for name, entry in (dict(_with_memory(summary)) | summary["variants"]).items():
        # Distance 0, the same segment, has no place on a logarithmic axis.
        if points := [(cell["distance"], cell[score]) for cell in entry["recall"].get(task, []) if cell["distance"]]:
            curves[name] = points
    if not curves:
        return None
    figure = new_figure(WIDTH_INCHES, CURVES_INCHES)
    axes = figure.add_subplot()
    _draw_curves(axes, curves)
    if score == "exact":
        axes.set_ylim(-3, 103)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlabel("segments from the sentence to the question")
    axes.set_ylabel(f"{task}: {'answered exactly' if score == 'exact' else 'right answer first'} (%)")
    return figure


def _with_memory(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The variants that have gates: what the others carry is nothing."""
    return [(name, entry) for name, entry in summary["variants"].items() if "least gate" in entry["figures"]]


def _draw_curves(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Shares as percents over a logarithmic axis, each with its interval as a band."""
    for (name, points), color, marker in zip(curves.items(), COLORS, MARKERS * 2, strict=False):
        xs = [x for x, _ in points]
        axes.plot(xs, [100 * found["mean"] for _, found in points], f"-{marker}", color=color, label=name, markersize=5)
        known = [(x, found) for x, found in points if found["low"] is not None and math.isfinite(found["low"])]
        if known:
            low, high = ([100 * found[end] for _, found in known] for end in ("low", "high"))
            axes.fill_between([x for x, _ in known], low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    _clean(axes)


def _find_middle(found: Mapping[str, Any]) -> float:
    """The geometric middle of a range; an open one is taken to end at twice its beginning."""
    start = max(1, found["start"])
    end = found["end"] if found["end"] is not None else 2 * max(start, 2)
    return math.sqrt(start * end)


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
