"""Charts of memory: gates and α during training, and how full each memory is along a document."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from new_llm.formats import format_number
from new_llm.report.heat_chart import HeatCell, draw_heat
from new_llm.report.learning_plots import AXES, X_SWITCH, count_weights, find_x, match_lines
from new_llm.report.line_chart import Axis, Curve, draw_axes, draw_lines
from new_llm.report.points import Point, average, thin
from new_llm.report.results import compute_mean, get_entries, get_finite, get_gates, get_value
from new_llm.report.scale import Scale, make_scale, thin_labels
from new_llm.report.series import Series
from new_llm.report.svg import Canvas, Chart, View

Read = Callable[[dict[str, Any]], dict[str, list[float]]]
"""From a log's line to the values of each layer."""

_Group = tuple[list[dict[str, Any]], list[dict[str, list[float]]]]
"""Lines of the seeds, and what was read of each."""

KINDS = ("line", "dash", "dots")
MAX_HEADS_LAYERS = 2  # of models with more layers the heads are left out: nobody could tell them apart
MAX_ALPHA = 1e3
GATE = Axis("gate towards memory", low=0.0, high=1.0)
MAX_MAPS = 24  # layers whose memory is shown
MAX_ROW, MAX_MAP = 24.0, 340.0  # height of a row, and of a map


def get_alphas(entry: dict[str, Any]) -> dict[str, list[float]]:
    """α of each layer's parallel adapter, from a model's entry or a line of its steps log."""
    found = entry.get("alpha")
    layers = found if isinstance(found, dict) else {"0": found}
    values = {str(layer): get_finite({"alpha": value}, "alpha") for layer, value in layers.items()}
    return {layer: [value] for layer, value in values.items() if value is not None and abs(value) <= MAX_ALPHA}


def plot_trajectories(
    series: Sequence[Series], read: Read, name: str, title: str, y: Axis, level: float | None, reading: str
) -> Chart | None:
    """Each layer's mean during training, in a view for each x-axis, with its heads where there is one seed."""
    views: list[View] = []
    shown: tuple[int, ...] = ()
    matched = [(one, match_lines(one, "steps_log")) for one in series]
    matched = [(one, [(lines, [read(line) for line in lines]) for lines in groups]) for one, groups in matched]
    for axis, x in AXES:
        heads: list[Curve] = []
        means: list[Curve] = []
        for one, groups in matched:
            found = _read_layers(one, groups, axis)
            for order, (layer, lines) in enumerate(found.items()):
                points = thin([average(at, [sum(values) / len(values) for values in rows]) for at, rows in lines])
                named = f"{one.name}, {name_layer(layer)}"
                means.append(Curve(one.index, named, points, KINDS[min(order, len(KINDS) - 1)]))
                num_heads = min(len(rows[0]) for _, rows in lines)
                if len(one.members) == 1 and num_heads > 1 and len(found) <= MAX_HEADS_LAYERS:
                    for head in range(num_heads):
                        track = thin([Point(at, rows[0][head]) for at, rows in lines])
                        heads.append(Curve(one.index, "", track, "pale", is_marked=False))
        if not means:
            continue
        said = " ".join(
            f"{c.name}: {format_number(c.points[0].y, 3)} to {format_number(c.points[-1].y, 3)}." for c in means
        )
        alt = f"{title}, mean of each layer, first to last. {said}"
        level_line = None if level is None else (level, "")
        views.append(draw_lines([*heads, *means], x, y, alt, label=axis, level=level_line))
        shown = shown or tuple(dict.fromkeys(curve.series for curve in means if curve.series is not None))
    if not views:
        return None
    signs = (("dash", "where it begins"),) if level is not None else ()
    return Chart(name, title, tuple(views), reading, shown, signs, X_SWITCH)


def _read_layers(one: Series, groups: list[_Group], axis: str) -> dict[str, list[tuple[float, list[list[float]]]]]:
    """By layer: (x, the values of each seed), rising."""
    weights = count_weights(one.members[0].entry, one.settings)
    layers: dict[str, list[tuple[float, list[list[float]]]]] = {}
    for lines, found in groups:
        xs = [find_x(line, axis, weights) for line in lines]
        known = [x for x in xs if x is not None]
        if len(known) == len(lines):
            for layer in found[0]:
                if all(layer in values for values in found):
                    layers.setdefault(layer, []).append((compute_mean(known), [values[layer] for values in found]))
    return layers


def plot_gate_trajectories(series: Sequence[Series]) -> Chart | None:
    """Each gate during training, and the mean of a layer's."""
    return plot_trajectories(
        series,
        get_gates,
        "gates-training",
        "Gates during training",
        GATE,
        find_start(series),
        "Thick: a layer's mean; pale: its heads. A gate that rises takes more from memory and less from the segment.",
    )


def plot_alphas(series: Sequence[Series]) -> Chart | None:
    """α of parallel adapters during training."""
    return plot_trajectories(
        series,
        get_alphas,
        "alpha-training",
        "α during training",
        Axis("α"),
        None,
        "The adapter adds α times its output to its layer's: at 0 the model is its base.",
    )


def list_final_alphas(series: Sequence[Series]) -> list[str]:
    """α after training, in words."""
    return [
        f"{one.name}, {name_layer(layer)}: {values[0]:+.4f}"
        for one in series
        for member in one.members
        for layer, values in get_alphas(member.entry).items()
    ]


def find_start(series: Sequence[Series]) -> float | None:
    """Where gates begin, sigmoid(β), if they all begin there."""
    names = ("model.gate_init", "model.read_gate_init")
    betas = {get_finite(one.settings, name) for one in series for name in names if name in one.settings}
    beta = betas.pop() if len(betas) == 1 else None
    return None if beta is None else 1 / (1 + math.exp(-max(-50.0, min(50.0, beta))))


def plot_final_gates(series: Sequence[Series]) -> Chart | None:
    """The share that each head takes from memory, after training."""
    found = [(one, member, get_gates(member.entry)) for one in series for member in one.members]
    layers = sorted({layer for *_, gates in found for layer in gates}, key=lambda layer: (len(layer), layer))
    if not layers:
        return None
    canvas = Canvas()
    with_gates = list(dict.fromkeys(one.index for one, _, gates in found if gates))
    labels = thin_labels([name_layer(layer) for layer in layers], canvas.right - canvas.left)
    ticks = tuple((float(place), label) for place, label in enumerate(labels))
    across = Scale(-0.5, len(layers) - 0.5, canvas.left, canvas.right, ticks=ticks)
    up = make_scale([0.0, 1.0], canvas.bottom, canvas.top, low=0.0, high=1.0)
    draw_axes(canvas, across, up, Axis("", names=tuple(labels)), GATE)
    start = find_start(series)
    if start is not None:
        canvas.line(canvas.left, up(start), canvas.right, up(start), "level")
    said: list[str] = []
    for one, _, gates in found:
        if not gates:
            continue
        shift = (with_gates.index(one.index) + 0.5) / len(with_gates) - 0.5
        canvas.open_series(one.index)
        for layer, values in gates.items():
            at = across(layers.index(layer) + 0.8 * shift)
            for head, value in enumerate(values):
                tip = f"{one.name}, {name_layer(layer)}, head {head}: {value:.3f}"
                canvas.mark(one.index, at, up(value), size=13, kind="mark clear", tip=tip)
            heads = f" over {len(values)} heads" if len(values) > 1 else ""
            said.append(f"{one.name} {name_layer(layer)}: {min(values):.2f} to {max(values):.2f}{heads}.")
        canvas.close()
    return Chart(
        "gates-final",
        "Gates after training",
        (View(canvas.to_svg(f"Gate of each head after training. {' '.join(said)}")),),
        "One mark a head: 1 takes everything from memory, 0 everything from the segment at hand. A gate that stays "
        "where it began has not learned whether memory helps.",
        tuple(with_gates),
        (("dash", "where gates begin"),) if start is not None else (),
    )


def name_layer(layer: str) -> str:
    """A layer's name for readers."""
    name = layer.removeprefix("layers.").removeprefix("layer ")
    return f"layer {name}" if len(name) <= 12 else f"layer {name[:11]}…"


def plot_memory_usage(one: Series) -> Chart | None:
    """How full each memory and head is along a document, a view a layer."""
    usage = get_value(one.members[0].entry, "evaluation", "memory_usage")
    views: list[View] = []
    for entry in get_entries(usage, "layers")[:MAX_MAPS]:
        norms = entry.get("norms")
        grid = _read_norms(norms)
        if not grid:
            continue
        num_memories, num_heads, num_segments = len(grid), len(grid[0]), len(grid[0][0])
        rows = [(m, h) for m in range(num_memories) for h in range(num_heads)]
        most = max((value for m, h in rows for value in grid[m][h]), default=0.0) or 1.0
        names = [_name_row(m, h, num_memories, num_heads) for m, h in rows]
        cells = [
            [HeatCell(value / most, "", f"{name}: ‖M‖ {format_number(value, 3)}") for value in grid[m][h]]
            for (m, h), name in zip(rows, names, strict=True)
        ]
        label = f"layer {entry.get('layer')}"
        ends = ", ".join(
            f"{name} {format_number(grid[m][h][-1], 3)}" for (m, h), name in list(zip(rows, names, strict=True))[:8]
        )
        alt = f"Norm of the memory of {one.name}, {label}, along {num_segments} segments; at the end: {ends}."
        titles = (f"‖M‖: pale 0, full {format_number(most, 3)}", "segment of the document")
        height = max(5.0, min(MAX_ROW, MAX_MAP / len(rows)))
        columns = [str(segment + 1) for segment in range(num_segments)]
        views.append(draw_heat(names, columns, cells, titles, alt, label=label, row_height=height))
    if not views:
        return None
    segments, tokens = get_finite(usage, "num_segments"), get_finite(usage, "segment_length")
    read = f" {segments:,.0f} segments of {tokens:,.0f} tokens were read." if segments and tokens else ""
    return Chart(
        f"memory-usage-{one.index}",
        f"Memory use of {one.name}",
        tuple(views),
        "Norm of M of each memory and head after each segment of one validation document, read from an empty memory. "
        "A row that stays pale is a memory that holds little." + read,
        switch=f"layer of memory map {one.index}",
    )


def _name_row(memory: int, head: int, num_memories: int, num_heads: int) -> str:
    parts = [f"mem {memory}"] * (num_memories > 1) + [f"head {head}"] * (num_heads > 1)
    return " ".join(parts) or "memory"


def _read_norms(norms: Any) -> list[list[list[float]]]:
    """[memory][head][segment] from [segment][memory][head]; empty where it has another form."""
    try:
        table = [[[float(value) for value in heads] for heads in memories] for memories in norms]
    except (TypeError, ValueError, OverflowError):
        return []
    shapes = {(len(memories), *(len(heads) for heads in memories)) for memories in table}
    if len(shapes) != 1 or len(set(next(iter(shapes))[1:])) != 1 or not table[0] or not table[0][0]:
        return []
    if not all(0 <= value < math.inf for memories in table for heads in memories for value in heads):
        return []
    return [[[memories[m][h] for memories in table] for h in range(len(table[0][0]))] for m in range(len(table[0]))]
