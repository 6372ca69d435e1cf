"""The pictures of an experiment: each function makes a chart, or None where there is nothing to show."""

from typing import Any

from new_llm.report.axes import (
    DASHES,
    PALE,
    Points,
    get_perplexity,
    label_axes,
    mark_some,
    read_curve,
    set_rows,
    set_scale,
    smooth,
    split,
    thin,
)
from new_llm.report.gate_plots import plot_final_gates, plot_gate_trajectories
from new_llm.report.results import get_entries, get_finite, named_models
from new_llm.report.reversal_plots import plot_reversal_accuracy, plot_reversal_perplexity
from new_llm.report.svg import HEIGHT_INCHES, INK, Chart, drawing, series_color, series_marker, to_svg
from new_llm.report.tables import format_number

MAX_MARKED = 30  # points of a curve that are marked one by one


def draw_charts(results: dict[str, Any]) -> list[Chart]:
    """Every picture that the results have numbers for."""
    charts = (
        plot_overview(results),
        plot_positions(results),
        plot_training_loss(results),
        plot_validation(results),
        plot_reversal_perplexity(results),
        plot_reversal_accuracy(results),
        plot_final_gates(results),
        plot_gate_trajectories(results),
    )
    return [chart for chart in charts if chart is not None]


def plot_overview(results: dict[str, Any]) -> Chart | None:
    """Where the models stand between perfect prediction and token frequencies alone."""
    rows: list[tuple[int, str, dict[str, float]]] = []
    for index, (name, entry) in enumerate(named_models(results)):
        found = {key: get_perplexity(entry, "evaluation", key, "perplexity") for key in ("sliding", "streaming")}
        values = {key: value for key, value in found.items() if value is not None}
        if values:
            rows.append((index, name, values))
    if not rows:
        return None
    unigram = get_perplexity(results, "unigram_perplexity")
    known = [value for *_, values in rows for value in values.values()] + ([unigram] if unigram else [])
    said = [f"{name} {format_number(values.get('sliding'))}" for _, name, values in rows]
    alt = f"Validation perplexity: {', '.join(said)}" + (f"; unigram {format_number(unigram)}." if unigram else ".")
    with drawing(HEIGHT_INCHES) as (figure, axes):
        set_rows(axes, [name for _, name, _ in rows])
        for row, (index, _, values) in enumerate(rows):
            color, marker = series_color(index), series_marker(index)
            for protocol, value in values.items():
                style: dict[str, Any] = {"markersize": 8, "markeredgewidth": 0}
                if protocol == "streaming":
                    style |= {"markerfacecolor": "none", "markeredgewidth": 1.4}
                axes.plot([value], [row], marker, color=color, **style)
            left = min(values.values())
            text = format_number(values.get("sliding"), 3)
            axes.annotate(text, (left, row), (-9, 0), textcoords="offset points", va="center", ha="right")
        if unigram:
            axes.axvline(unigram, color=INK, linewidth=1.2, dashes=DASHES)
            text, top = f"unigram {format_number(unigram, 3)}", len(rows) - 0.5
            axes.annotate(text, (unigram, top), (-6, 0), textcoords="offset points", ha="right", va="bottom")
        set_scale(axes, "x", known, floor=0.62, force_log=True)
        label_axes(axes, "perplexity", "", count_x=False)
        signs = (
            (("dot", "sliding window"), any("sliding" in values for *_, values in rows)),
            (("ring", "streaming"), any("streaming" in values for *_, values in rows)),
            (("dash", "unigram"), unigram is not None),
        )
        return Chart(
            "overview",
            "Where the models stand",
            to_svg(figure, "overview", alt),
            "Further left is better. The unigram guesses each token by its frequency alone: a model near "
            "it has learned little.",
            signs=tuple(sign for sign, is_shown in signs if is_shown),
        )


def plot_training_loss(results: dict[str, Any]) -> Chart | None:
    """Training loss against tokens, as logged and smoothed."""
    curves = [read_curve(entry, "steps_log", "loss") for _, entry in named_models(results)]
    if not any(curves):
        return None
    with drawing(HEIGHT_INCHES) as (figure, axes):
        for index, points in enumerate(curves):
            line = thin(smooth(points))
            axes.plot(*split(thin(points)), color=series_color(index), linewidth=0.8, alpha=PALE)
            axes.plot(*split(line), color=series_color(index), linewidth=1.8, **mark_some(index, len(line)))
        label_axes(axes, "training tokens", "loss, nats per token")
        return Chart(
            "training-loss",
            "Training loss",
            to_svg(figure, "training-loss", f"Training loss against tokens. {_say_ends(results, curves)}"),
            "Lower is better. Pale: as logged; solid: a running average. All models read the same samples "
            "in the same order.",
            _present(curves),
        )


def plot_validation(results: dict[str, Any]) -> Chart | None:
    """Validation perplexity after each epoch; the kept weights are ringed."""
    named = named_models(results)
    curves = [read_curve(entry, "epochs_log", "validation_perplexity") for _, entry in named]
    if not any(curves):
        return None
    with drawing(HEIGHT_INCHES) as (figure, axes):
        for index, ((_, entry), points) in enumerate(zip(named, curves, strict=True)):
            marks: dict[str, Any] = {"marker": series_marker(index), "markersize": 5, "markeredgewidth": 0}
            if len(points) > MAX_MARKED:
                marks = {}
            axes.plot(*split(thin(points)), color=series_color(index), linewidth=1.8, **marks)
            best = get_finite(entry, "training", "best_epoch")
            kept = [line for line in get_entries(entry, "training", "epochs_log") if line.get("epoch") == best]
            ring = read_curve({"training": {"kept": kept}}, "kept", "validation_perplexity")
            axes.plot(*split(ring), "o", color=series_color(index), markerfacecolor="none", markersize=11)
        set_scale(axes, "y", [y for points in curves for _, y in points])
        label_axes(axes, "training tokens", "perplexity")
        return Chart(
            "validation",
            "Validation perplexity",
            to_svg(figure, "validation", f"Validation perplexity after each epoch. {_say_ends(results, curves)}"),
            "After each epoch, on documents that are never trained on. A curve that turns up is overfitting.",
            _present(curves),
            (("ring", "weights kept and evaluated"),),
        )


def plot_positions(results: dict[str, Any]) -> Chart | None:
    """Perplexity by the token's position in its sample."""
    measured: list[dict[tuple[float, float], float]] = []
    for _, entry in named_models(results):
        ranges: dict[tuple[float, float], float] = {}
        for item in get_entries(entry, "evaluation", "positions"):
            start, end = get_finite(item, "start"), get_finite(item, "end")
            value = get_perplexity(item, "perplexity")
            if start is not None and end is not None and value is not None:
                ranges[start, end] = value
        measured.append(ranges)
    spans = sorted({span for ranges in measured for span in ranges})
    if not spans:
        return None
    curves = [[(float(spans.index(span)), ranges[span]) for span in sorted(ranges)] for ranges in measured]
    with drawing(HEIGHT_INCHES) as (figure, axes):
        for index, points in enumerate(curves):
            marks = {"marker": series_marker(index), "markersize": 5.5, "markeredgewidth": 0}
            axes.plot(*split(points), color=series_color(index), linewidth=1.8, **marks)
        axes.set_xticks(range(len(spans)), [f"{start:g}–{end:g}" for start, end in spans])
        axes.set_xlim(-0.3, len(spans) - 0.7)
        set_scale(axes, "y", [value for ranges in measured for value in ranges.values()])
        label_axes(axes, "position in the sample, tokens", "perplexity", count_x=False)
        return Chart(
            "positions",
            "Perplexity by position",
            to_svg(figure, "positions", f"Perplexity by position in the sample. {_say_ends(results, curves)}"),
            "A line that keeps falling is a model that uses what it read before. Where models cut text "
            "into segments, tokens beyond the first segment can gain from earlier ones through memory "
            "alone.",
            _present(curves),
        )


def _say_ends(results: dict[str, Any], curves: list[Points]) -> str:
    """Each curve's first and last value, in words."""
    named = [(name, curve) for (name, _), curve in zip(named_models(results), curves, strict=True) if curve]
    return " ".join(
        f"{name}: {format_number(c[0][1], 3)} first, {format_number(c[-1][1], 3)} last." for name, c in named
    )


def _present(curves: list[Points]) -> tuple[int, ...]:
    return tuple(index for index, curve in enumerate(curves) if curve)
