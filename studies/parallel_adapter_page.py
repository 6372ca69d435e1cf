"""The charts and tables of docs/experiments/parallel-adapter.md, from the study's results."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from new_llm.charts import bar_chart, line_chart
from new_llm.report import write_chart

OTHERS = ("base", "reset", "foreign")

Results = dict[str, list[dict[str, Any]]]


def draw(results: Results, probes: dict[str, Any], folder: Path) -> None:
    draw_alpha(results, folder)
    draw_perplexity(results, probes, folder)
    draw_differences(results, folder)
    print(tabulate_runs(results))
    print(tabulate_gradients(probes["gradients"]))
    print(describe_probes(probes))


def draw_alpha(results: Results, folder: Path) -> None:
    """Alpha by optimizer step: each recipe's mean and range over seeds and layers."""
    rows = [
        {"recipe": name, "step": line["step"], "alpha": alpha}
        for name, runs in results.items()
        for run in runs
        for line in run["training"]["steps_log"]
        for alpha in get_alphas(line)
    ]
    axes = {"x": "step", "y": "alpha", "series": "recipe"}
    chart = line_chart("alpha", "Alpha", "", rows, **axes, x_title="optimizer step", y_title="α")
    write_chart(chart, folder / "parallel-adapter-alpha.svg")


def draw_perplexity(results: Results, probes: dict[str, Any], folder: Path) -> None:
    """Perplexity of the held-out documents after each epoch, with the memory carried."""
    base = probes["base"]["perplexity"]
    rows = [
        {"recipe": name, "epoch": line["epoch"], "perplexity": line["validation_perplexity"]}
        for name, runs in results.items()
        for run in runs
        for line in ({"epoch": 0, "validation_perplexity": base}, *run["training"]["epochs_log"])
    ]
    axes = {"x": "epoch", "y": "perplexity", "series": "recipe"}
    titles = {"x_title": "epoch (0: the base)", "y_title": "perplexity, as trained"}
    chart = line_chart("perplexity", "Perplexity", "", rows, **axes, **titles, reference=base)
    write_chart(chart, folder / "parallel-adapter-perplexity.svg")


def draw_differences(results: Results, folder: Path) -> None:
    """The difference in perplexity between the carried memory and the base, a reset, and a foreign memory."""
    rows = [
        {"recipe": name, "against": f"against {other}", **get_difference(run, other)}
        for name, runs in results.items()
        for run in runs
        for other in OTHERS
    ]
    axes = {"x": "recipe", "y": "value", "series": "against", "low": "low", "high": "high"}
    titles = {"y_title": "perplexity with the carried memory against the other", "y_format": "+.1%"}
    chart = bar_chart("memory", "Memory", "", rows, **axes, **titles, reference=0.0, is_dotted=True)
    write_chart(chart, folder / "parallel-adapter-memory.svg")


def tabulate_runs(results: Results) -> str:
    """One row per recipe: alpha of each seed, mean perplexities, and differences over seeds."""
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
    """The mean over seeds in percent, with the outermost ends of the seeds' intervals."""
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
    base, headroom = probes["base"], probes["headroom"]
    lines = [f"base: {base['perplexity']:.2f} on {base['num_tokens']:,} tokens of {base['num_documents']} documents"]
    lines.append("headroom: " + ", ".join(f"{name} {value:.2f}" for name, value in headroom.items()))
    for name, values in probes["reads"].items():
        chosen = {place: round(values[place], 3) for place in (1, 2, 4, 8, 16, 32, len(values) - 1)}
        lines.append(f"length of a read, {name}: {chosen}")
    return "\n".join(lines)


def get_alphas(line: dict[str, Any]) -> list[float]:
    return list(line["alpha"].values())


def get_perplexity(run: dict[str, Any], way: str) -> float:
    return run["evaluation"]["held_out"]["overall"]["perplexity"][way]["value"]


def get_difference(run: dict[str, Any], other: str) -> dict[str, float]:
    """The relative difference between carried and another way of reading, with its interval."""
    return run["evaluation"]["held_out"]["overall"]["differences"][other]["relative"]


def as_list(alpha: Any) -> list[float]:
    return list(alpha.values()) if isinstance(alpha, dict) else [alpha]
