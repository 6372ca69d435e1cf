"""Charts of training: losses and perplexities against tokens, steps, seconds and compute, and what models cost."""

from collections.abc import Callable, Sequence
from typing import Any

from new_llm.formats import format_bytes, format_count, format_number, format_seconds, format_short
from new_llm.report.bar_chart import Bar, BarRow, draw_bars
from new_llm.report.line_chart import Axis, Curve, draw_lines
from new_llm.report.points import MAX_VALUE, MAX_X, Point, average, get_between, smooth, thin
from new_llm.report.results import compute_mean, get_entries, get_finite
from new_llm.report.scale import format_power, format_tick
from new_llm.report.series import Series, merge_lines
from new_llm.report.svg import Chart, View

FLOPS_PER_WEIGHT = 6  # a token's multiplications and additions, forward and backward, of one weight
AXES = (
    ("tokens", Axis("training tokens", say="count")),
    ("steps", Axis("optimizer steps", say="count")),
    ("seconds", Axis("seconds of training", say="number")),
    ("compute", Axis("FLOPs of compute, 6 · N · tokens", words=format_power, say="power")),
)
X_SWITCH = "x-axis"
COUNTED = (
    "Compute is counted as 6 · N · tokens: N the weights that multiply each token (all but the input embedding, the "
    "layers of a selective model once a pass); attention and memory reads are not counted."
)


def count_weights(entry: dict[str, Any], settings: dict[str, Any]) -> float | None:
    """N of 6 · N · tokens: the weights that a token is multiplied with; None where the parts are not known.

    Source: Kaplan et al., arXiv:2001.08361, section 2.1; the head, which they leave out, is counted.
    """
    layers, head = (get_finite(entry, "num_parameters", key) for key in ("transformer", "lm_head"))
    if layers is None or head is None:
        return None
    extra = settings.get("model.skip_interval") if entry.get("model_type") == "selective" else 0
    passes = 1 + extra if isinstance(extra, int) else 1
    return passes * layers + head


def find_x(line: dict[str, Any], axis: str, weights: float | None) -> float | None:
    """Where a log's line stands on an axis."""
    if axis == "compute":
        tokens = get_between(0.0, MAX_X, line, "tokens")
        return FLOPS_PER_WEIGHT * weights * tokens if weights is not None and tokens is not None else None
    return get_between(0.0, MAX_X, line, {"tokens": "tokens", "steps": "step", "seconds": "seconds"}[axis])


def match_lines(series: Series, log: str) -> list[list[dict[str, Any]]]:
    """A log's lines, those of the seeds side by side: matched by their step, or their tokens where no step is known."""

    def read(entry: dict[str, Any]) -> list[dict[str, Any]]:
        return get_entries(entry, "training", log)

    return [lines for _, lines in merge_lines(series, read, "step") or merge_lines(series, read, "tokens")]


def read_curve(series: Series, matched: list[list[dict[str, Any]]], key: str, axis: str, least: float) -> list[Point]:
    """The mean of the seeds' curves, with a band from the lowest to the highest; what can't be drawn is left out."""
    weights = count_weights(series.members[0].entry, series.settings)
    points: list[Point] = []
    for lines in matched:
        xs = [find_x(line, axis, weights) for line in lines]
        ys = [get_between(least, MAX_VALUE, line, key) for line in lines]
        known = [(x, y) for x, y in zip(xs, ys, strict=True) if x is not None and y is not None]
        if len(known) == len(lines):
            points.append(average(compute_mean([x for x, _ in known]), [y for _, y in known]))
    return sorted(points)


def plot_curves(
    series: Sequence[Series], name: str, title: str, log: str, key: str, y: Axis, reading: str, *, is_smooth: bool
) -> Chart | None:
    """A learning curve in a view for each x-axis that its lines have."""
    least = 1.0 if "perplexity" in key else -MAX_VALUE
    matched = [(one, match_lines(one, log)) for one in series]
    views: list[View] = []
    shown: tuple[int, ...] = ()
    rings_shown = False
    for axis, x in AXES:
        found = [(one, read_curve(one, lines, key, axis, least)) for one, lines in matched]
        found = [(one, points) for one, points in found if points]
        if not found:
            continue
        curves: list[Curve] = []
        for one, points in found if is_smooth else ():
            if all(point.low is None for point in points):
                curves.append(Curve(one.index, "", thin(points), "pale", is_marked=False))
        curves += [Curve(one.index, one.name, thin(smooth(points) if is_smooth else points)) for one, points in found]
        rings = [] if is_smooth else [ring for one, _ in found for ring in find_kept(one, log, key, axis, least)]
        rings_shown = rings_shown or bool(rings)
        said = " ".join(
            f"{one.name}: {format_number(p[0].y, 3)} first, {format_number(p[-1].y, 3)} last." for one, p in found
        )
        views.append(draw_lines(curves, x, y, f"{title} against {x.title}. {said}", label=axis, rings=rings))
        shown = shown or tuple(one.index for one, _ in found)
    if not views:
        return None
    signs = (("ring", "weights kept and evaluated"),) if rings_shown else ()
    return Chart(name, title, tuple(views), reading, shown, signs, X_SWITCH)


def find_kept(one: Series, log: str, key: str, axis: str, least: float) -> list[tuple[int, float, float]]:
    """Where the weights that were kept stand, for a single seed."""
    if len(one.members) != 1:
        return []
    entry = one.members[0].entry
    best = get_finite(entry, "training", "best_epoch")
    weights = count_weights(entry, one.settings)
    kept = [line for line in get_entries(entry, "training", log) if best is not None and line.get("epoch") == best]
    places = [(find_x(line, axis, weights), get_between(least, MAX_VALUE, line, key)) for line in kept]
    return [(one.index, x, y) for x, y in places if x is not None and y is not None]


def plot_validation(series: Sequence[Series]) -> Chart | None:
    """Validation perplexity after each epoch; the kept weights are ringed."""
    return plot_curves(
        series,
        "validation",
        "Validation perplexity",
        "epochs_log",
        "validation_perplexity",
        Axis("perplexity", log=None),
        "After each epoch, on documents that are never trained on. A curve that turns up is overfitting."
        + _bands(series),
        is_smooth=False,
    )


def plot_training_loss(series: Sequence[Series]) -> Chart | None:
    """Training loss, as logged and smoothed."""
    return plot_curves(
        series,
        "training-loss",
        "Training loss",
        "steps_log",
        "loss",
        Axis("loss, nats per token"),
        "Lower is better. Pale: as logged; solid: a running average. The models of a run read the same samples in the "
        "same order." + _bands(series),
        is_smooth=True,
    )


def _bands(series: Sequence[Series]) -> str:
    """What a band is, where there is one."""
    if all(len(one.members) < 2 for one in series):
        return ""
    return " Lines are means over seeds, bands reach from the lowest to the highest seed."


COSTS: tuple[tuple[str, str, tuple[str, ...], Callable[[float | None], str]], ...] = (
    ("speed", "training, tokens a second", ("training", "tokens_per_second"), format_count),
    ("time", "time of training", ("training", "seconds"), format_seconds),
    ("peak memory", "peak memory of training", ("training", "peak_memory_bytes"), format_bytes),
    ("parameters", "parameters", ("num_parameters", "total"), format_short),
    ("held memory", "memory that is carried along, M and z", ("memory_info", "total_bytes"), format_bytes),
)


def plot_costs(series: Sequence[Series]) -> Chart | None:
    """Throughput, time, memory and size: a view each."""
    views: list[View] = []
    shown: list[int] = []
    for label, title, keys, words in COSTS:
        rows = []
        for one in series:
            values = [value for value in one.collect(*keys) if 0 <= value <= MAX_VALUE * 1e6]
            if values:
                point = average(0.0, values)
                ends = (point.low, point.high) if point.low is not None and point.high is not None else None
                rows.append(BarRow(one.index, one.name, (Bar(point.y, label, ends),)))
        if rows and any(row.bars[0].value for row in rows):
            said = ", ".join(f"{row.name} {words(row.bars[0].value)}" for row in rows)
            ticks = words if words in (format_bytes, format_seconds) else format_tick
            views.append(draw_bars(rows, words, title, f"{title}: {said}.", label=label, ticks=ticks))
            shown += [row.series for row in rows if row.series not in shown]
    if not views:
        return None
    seeds = " Bars are means over seeds, thin lines reach from the lowest to the highest."
    reading = "What a model costs on the machine named below: longer is more." + (
        seeds if any(len(one.members) > 1 for one in series) else ""
    )
    return Chart("costs", "Throughput and memory", tuple(views), reading, tuple(shown), switch="measure")
