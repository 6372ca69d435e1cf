"""The pictures and tables of docs/experiments/parallel-adapter.md, from the study's results."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLORS = ("#4c566a", "#b0a000", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8f8f8f", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "parallel-adapter",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
}
OTHERS = ("base", "reset", "foreign")

Results = dict[str, list[dict[str, Any]]]


def draw(results: Results, probes: dict[str, Any], folder: Path) -> None:
    """Write the pictures into a folder and print the tables in Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        draw_alpha(results, folder / "parallel-adapter-alpha.svg")
        draw_perplexity(results, probes, folder / "parallel-adapter-perplexity.svg")
        draw_differences(results, folder / "parallel-adapter-memory.svg")
    print(tabulate_runs(results))
    print(tabulate_gradients(probes["gradients"]))
    print(describe_probes(probes))


def draw_alpha(results: Results, path: Path) -> None:
    """Alpha by optimizer step, recipes that begin at 0 and those that begin at 1: a line a seed and layer."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for number, (name, runs) in enumerate(results.items()):
        axes = panels[0 if runs[0]["config"]["adapter"]["initial_alpha"] == 0 else 1]
        for seed, run in enumerate(runs):
            log = run["training"]["steps_log"]
            steps = [line["step"] for line in log]
            for layer, values in enumerate(zip(*(get_alphas(line) for line in log), strict=True)):
                label = name if seed == layer == 0 else None
                axes.plot(steps, values, color=COLORS[number], linewidth=1.3 if layer == 0 else 0.7, label=label)
    for axes in panels:
        axes.set_xlabel("optimizer step")
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=8.5)
    panels[0].set_ylabel("α")
    save(figure, path)


def draw_perplexity(results: Results, probes: dict[str, Any], path: Path) -> None:
    """Perplexity of the held-out documents, memory carried, after each epoch."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    base = probes["base"]["perplexity"]
    for number, (name, runs) in enumerate(results.items()):
        for seed, run in enumerate(runs):
            points = [
                (0, base),
                *((line["epoch"], line["validation_perplexity"]) for line in run["training"]["epochs_log"]),
            ]
            style: dict[str, Any] = {"color": COLORS[number], "marker": MARKERS[number], "markersize": 4}
            axes.plot(*zip(*points, strict=True), **style, label=name if seed == 0 else None, linewidth=1.3)
    axes.axhline(base, color="#222222", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(1 + max(len(run["training"]["epochs_log"]) for runs in results.values() for run in runs)))
    axes.set_xlabel("epoch (0: the base)")
    axes.set_ylabel("perplexity, as trained")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)


def draw_differences(results: Results, path: Path) -> None:
    """How much lower the perplexity is with the carried memory: against the base, reset and foreign memory."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    names = list(results)
    for shift, (other, color) in enumerate(zip(OTHERS, ("#222222", "#0072b2", "#d55e00"), strict=True)):
        for place, name in enumerate(names):
            for seed, run in enumerate(results[name]):
                found = get_difference(run, other)
                y = place + (shift - 1) * 0.26 + (seed - 1) * 0.07
                label = f"against {other}" if place == seed == 0 else None
                axes.plot([100 * found["low"], 100 * found["high"]], [y, y], color=color, linewidth=1)
                axes.plot(100 * found["value"], y, MARKERS[shift], color=color, markersize=4, label=label)
    axes.axvline(0, color="#222222", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("perplexity with the carried memory against …, percent (95% over documents)")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write an SVG that is the same for the same figures."""
    FigureCanvasSVG(figure)
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def tabulate_runs(results: Results) -> str:
    """One row a recipe: alpha of each seed, mean perplexities, and differences over seeds."""
    lines = [
        "| recipe | α in the end | carried | reset | foreign | against base | reset | foreign |",
        "|---|---" + "|---" * 6 + "|",
    ]
    for name, runs in results.items():
        alphas = ", ".join(f"{value:+.3f}" for run in runs for value in as_list(run["alpha"]))
        perplexities = [
            f"{statistics.mean(get_perplexity(run, way) for run in runs):.2f}"
            for way in ("carried", "reset", "foreign")
        ]
        differences = [describe_difference([get_difference(run, other) for run in runs]) for other in OTHERS]
        lines.append(f"| {name} | {alphas} | {' | '.join(perplexities)} | {' | '.join(differences)} |")
    return "\n".join(lines) + "\n"


def describe_difference(found: Sequence[dict[str, float]]) -> str:
    """The mean over seeds in percent, and the ends of the seeds' intervals."""
    mean = 100 * statistics.mean(one["value"] for one in found)
    low, high = (100 * function(one[end] for one in found) for function, end in ((min, "low"), (max, "high")))
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def tabulate_gradients(gradients: dict[str, list[float]]) -> str:
    """Sign and size of dL/d alpha at 0."""
    lines = ["| dL/dα at α = 0 | negative | mean | standard deviation |", "|---|---|---|---|"]
    for name, values in gradients.items():
        negative = sum(value < 0 for value in values)
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        lines.append(f"| {name} | {negative} of {len(values)} | {mean:+.1e} | {deviation:.1e} |")
    return "\n".join(lines) + "\n"


def describe_probes(probes: dict[str, Any]) -> str:
    """The other probes in a line each."""
    base, headroom = probes["base"], probes["headroom"]
    lines = [f"base: {base['perplexity']:.2f} on {base['num_tokens']:,} tokens of {base['num_documents']} documents"]
    lines.append("headroom: " + ", ".join(f"{name} {value:.2f}" for name, value in headroom.items()))
    for name, values in probes["reads"].items():
        chosen = {place: round(values[place], 3) for place in (1, 2, 4, 8, 16, 32, len(values) - 1)}
        lines.append(f"length of a read, {name}: {chosen}")
    return "\n".join(lines)


def get_alphas(line: dict[str, Any]) -> list[float]:
    """Alpha of a line of metrics, one a layer."""
    return list(line["alpha"].values())


def get_perplexity(run: dict[str, Any], way: str) -> float:
    """Of the held-out documents."""
    return run["evaluation"]["held_out"]["overall"]["perplexity"][way]["value"]


def get_difference(run: dict[str, Any], other: str) -> dict[str, float]:
    """Carried against another way, relative, with its interval."""
    return run["evaluation"]["held_out"]["overall"]["differences"][other]["relative"]


def as_list(alpha: Any) -> list[float]:
    """Alpha of one layer or several."""
    return list(alpha.values()) if isinstance(alpha, dict) else [alpha]
