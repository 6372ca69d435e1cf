"""The picture of long documents: perplexity by distance from the start, and what the carried memory is worth."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from new_llm.formats import WAYS, name_range
from new_llm.report.picture import COLORS, new_figure

MARKERS = "os^Dvp*"

WIDTH_INCHES = 7.2
HEIGHT_INCHES = 6.2
BAND_OPACITY = 0.15


def plot_distance(result: dict[str, Any]) -> Figure:
    """Perplexity of each way above, carried against the others below, both by distance.

    Args:
        result: `LongDocumentsResult.to_dict()`, or what a file of the command holds of it.
    """
    ranges = result["ranges"]
    names: list[str] = list(result["overall"]["perplexity"])
    figure = new_figure(WIDTH_INCHES, HEIGHT_INCHES)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for place, name in enumerate(names):
        style = {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)]}
        label = WAYS.get(name, name)
        found = [entry["perplexity"].get(name) for entry in ranges]
        _draw_curve(upper, found, 1.0, style, label, has_band=name == "carried")
        if name != "carried":
            found = [entry["differences"].get(name, {}).get("relative") for entry in ranges]
            _draw_curve(lower, found, 100.0, style, label)
    upper.set_ylabel("perplexity")
    figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    lower.axhline(0, color="0.5", linewidth=1)
    lower.set_ylabel("perplexity with the memory carried,\nagainst each other way (%)", fontsize=8)
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    lower.set_xlabel("distance from the document's start, tokens (documents that reach it)")
    lower.set_xticks(range(len(ranges)), [f"{name_range(entry)}\n({entry['num_documents']})" for entry in ranges])
    for axes in (upper, lower):
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    share = f"{100 * result['confidence']:g} %"
    upper.set_title(
        f"{result['num_documents']:,} documents, {result['num_tokens']:,} tokens, segments of "
        f"{result['segment_length']:,}; bands: {share} over documents (above: carried)"
        + ("" if result["is_complete"] else " (partial)"),
        loc="left",
        fontsize=9,
    )
    return figure


def _draw_curve(
    axes: Axes,
    found: Sequence[dict[str, Any] | None],
    scale: float,
    style: dict[str, Any],
    label: str,
    *,
    has_band: bool = True,
) -> None:
    """A line through the ranges' figures and a band of their intervals; a figure that is not finite is left out."""
    points = [(x, scale * entry["value"]) for x, entry in enumerate(found) if entry and _is_finite(entry["value"])]
    if not points:
        return
    axes.plot(*zip(*points, strict=True), linewidth=1.8, markersize=5, label=label, **style)
    # Documents differ far more than ways do: above, one band stands for all.
    band = [
        (x, scale * entry["low"], scale * entry["high"])
        for x, entry in enumerate(found)
        if entry and _is_finite(entry["low"]) and _is_finite(entry["high"])
    ]
    if band and has_band:
        places, lows, highs = zip(*band, strict=True)
        axes.fill_between(places, lows, highs, color=style["color"], alpha=BAND_OPACITY, linewidth=0)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
