"""Pictures of the gates between memory and the segment at hand."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from new_llm.report.axes import DASHES, PALE, format_tick, label_axes, mark_some, shorten, split, thin
from new_llm.report.results import get_entries, get_finite, get_gates, named_models
from new_llm.report.svg import HEIGHT_INCHES, INK, MUTED, Chart, drawing, series_color, series_marker, to_svg


def plot_final_gates(results: dict[str, Any]) -> Chart | None:
    """The share that each head takes from memory, after training."""
    layers = [
        (index, name, layer, values)
        for index, (name, entry) in enumerate(named_models(results))
        for layer, values in get_gates(entry).items()
    ]
    if not layers:
        return None
    with drawing(HEIGHT_INCHES) as (figure, axes):
        for place, (index, _, _, values) in enumerate(layers):
            marks = {"color": series_color(index), "markersize": 7.5, "markeredgewidth": 0, "alpha": 0.7}
            axes.plot([place] * len(values), values, series_marker(index), clip_on=False, **marks)
        axes.set_xticks(range(len(layers)), [f"{shorten(name)}\n{_name_layer(layer)}" for _, name, layer, _ in layers])
        axes.tick_params(axis="x", labelcolor=INK, length=0, labelrotation=90 if len(layers) > 5 else 0)
        axes.set_xlim(-0.6, len(layers) - 0.4)
        begin = _draw_gate_axis(axes, results)
        said = [f"{name} {_name_layer(layer)}: {_say_gates(values)}." for _, name, layer, values in layers]
        return Chart(
            "gates-final",
            "Gates after training",
            to_svg(figure, "gates-final", f"Gate of each head after training. {' '.join(said)}"),
            "One mark a head: 1 takes everything from memory, 0 everything from the segment at hand. "
            "A gate that stays where it began has not learned whether memory helps.",
            tuple(dict.fromkeys(index for index, *_ in layers)),
            begin,
        )


def plot_gate_trajectories(results: dict[str, Any]) -> Chart | None:
    """Each gate during training, and the mean of a layer's."""
    said: list[str] = []
    series: list[int] = []
    with drawing(HEIGHT_INCHES) as (figure, axes):
        for index, (name, entry) in enumerate(named_models(results)):
            log = [(get_finite(line, "step"), get_gates(line)) for line in get_entries(entry, "training", "steps_log")]
            layers = list(dict.fromkeys(layer for _, gates in log for layer in gates))
            for order, layer in enumerate(layers):
                lines = [(step, gates[layer]) for step, gates in log if step is not None and layer in gates]
                if not lines:
                    continue
                num_heads = len(lines[0][1])
                for head in range(num_heads) if num_heads > 1 else ():
                    points = thin([(step, values[head]) for step, values in lines if head < len(values)])
                    axes.plot(*split(points), color=series_color(index), linewidth=0.8, alpha=PALE)
                mean = thin([(step, sum(values) / len(values)) for step, values in lines])
                style: dict[str, Any] = {"dashes": (2 + 2 * order, 2)} if order else {}
                style |= mark_some(index, len(mean))
                axes.plot(*split(mean), color=series_color(index), linewidth=1.8, **style)
                if len(layers) > 1:
                    axes.annotate(_name_layer(layer), mean[-1], (5, 0), textcoords="offset points", va="center")
                said.append(f"{name} {_name_layer(layer)}: {mean[0][1]:.2f} to {mean[-1][1]:.2f}.")
                series.append(index)
        if not said:
            return None
        label_axes(axes, "optimizer steps", "")
        begin = _draw_gate_axis(axes, results)
        return Chart(
            "gates-training",
            "Gates during training",
            to_svg(figure, "gates-training", f"Mean gate of each layer, first to last step. {' '.join(said)}"),
            "Thick: a layer's mean; thin: its heads. A gate that rises takes more from memory and less "
            "from the segment.",
            tuple(dict.fromkeys(series)),
            begin,
        )


def _draw_gate_axis(axes: Axes, results: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The whole range of a gate, and a dashed line where it begins, sigmoid(β); the key's sign for it."""
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(format_tick))
    axes.set_title("gate towards memory", loc="left", color=MUTED, fontsize="medium", pad=8)
    beta = get_finite(results, "config", "model", "gate_init")
    if beta is None:
        return ()
    axes.axhline(1 / (1 + math.exp(-max(-50.0, min(50.0, beta)))), color=INK, linewidth=1, dashes=DASHES)
    return (("dash", "where gates begin"),)


def _name_layer(layer: str) -> str:
    return shorten(layer.replace("layers.", "layer "))


def _say_gates(values: list[float]) -> str:
    return (
        f"{values[0]:.2f}" if len(values) == 1 else f"{min(values):.2f} to {max(values):.2f} over {len(values)} heads"
    )
