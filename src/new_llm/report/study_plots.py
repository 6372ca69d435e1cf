"""The pictures of a study, as SVG files that stand alone."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from new_llm.report.picture import COLORS, new_figure, save_picture
from new_llm.report.svg import MARKERS

WIDTH_INCHES = 7.0
ROW_INCHES = 0.28
CURVES_INCHES = 3.4
MAX_CURVES = len(COLORS)


def write_study_figures(summary: dict[str, Any], folder: Path) -> None:
    """Draw what the summary has numbers for: `differences.svg`, and `distance-<text>.svg` for each text."""
    if (figure := plot_differences(summary)) is not None:
        save_picture(figure, folder / "differences.svg")
    texts = dict.fromkeys(what for entry in summary["variants"].values() for what in entry["ranges"])
    for what in texts:
        if (figure := plot_distance(summary, what)) is not None:
            save_picture(figure, folder / f"distance-{what.removeprefix('long-')}.svg")


def plot_differences(summary: Mapping[str, Any]) -> Figure | None:
    """Perplexity of long validation documents, memory carried against reset: a row a variant."""
    rows = [
        (name, figure)
        for name, entry in summary["variants"].items()
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


def plot_distance(summary: Mapping[str, Any], what: str) -> Figure | None:
    """The same difference by distance from the document's start: a curve a variant, the first `MAX_CURVES`."""
    curves: list[tuple[str, list[tuple[float, Mapping[str, Any]]]]] = []
    for name, entry in summary["variants"].items():
        ranges = [found for found in entry["ranges"].get(what, []) if "reset" in found["relative"]]
        if ranges:
            curves.append((name, [(_find_middle(found), found["relative"]["reset"]) for found in ranges]))
    if not curves:
        return None
    figure = new_figure(WIDTH_INCHES, CURVES_INCHES)
    axes = figure.add_subplot()
    axes.axhline(0, color="0.5", linewidth=1)
    for (name, points), color, marker in zip(curves, COLORS, MARKERS * 2, strict=False):
        xs = [x for x, _ in points]
        axes.plot(xs, [100 * found["mean"] for _, found in points], f"-{marker}", color=color, label=name, markersize=5)
        known = [(x, found) for x, found in points if found["low"] is not None and math.isfinite(found["low"])]
        if known:
            low, high = ([100 * found[end] for _, found in known] for end in ("low", "high"))
            axes.fill_between([x for x, _ in known], low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
    axes.set_xlabel("tokens from the document's start (middle of the range)")
    axes.set_ylabel("perplexity, carried against reset (%)")
    axes.legend(fontsize=8, frameon=False, ncols=2)
    _clean(axes)
    return figure


def _find_middle(found: Mapping[str, Any]) -> float:
    """The geometric middle of a range; an open one is taken to end at twice its beginning."""
    start = max(1, found["start"])
    end = found["end"] if found["end"] is not None else 2 * max(start, 2)
    return math.sqrt(start * end)


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
