"""The chart and tables of docs/experiments/parallel-adapter.md, from the study's results."""

import statistics
from pathlib import Path
from typing import Any

from compare import Losses, compare, keep, read, write

from new_llm.charts import bar_chart
from new_llm.evaluation import MEASURES
from new_llm.evaluation.statistics import compare_models, estimate_perplexity
from new_llm.report import write_chart

OTHERS = {"base": "the base", "reset": "memory emptied", "foreign": "another document's memory"}
CACHES = ("bare", "+ 2,000 states", "+ longest match", "+ all")

Results = dict[str, dict[str, dict[str, Any]]]
"""A run's results by recipe and seed."""


def draw(results: Results, probes: dict[str, Any], folder: Path) -> None:
    losses = collect(results)
    file = folder / "parallel-adapter" / "losses.json"
    file.parent.mkdir(exist_ok=True)
    write(losses, file)
    draw_differences(losses, folder)
    print(tabulate_runs(results, losses))
    print(tabulate_caches(losses))
    print(tabulate_gradients(probes["gradients"]))
    print(describe_probes(probes))


def collect(results: Results) -> Losses:
    """Tokens and total loss of each document, by recipe, seed and way of reading; `base: …` is the base's."""
    found: Losses = {}
    for name, runs in results.items():
        for seed, run in runs.items():
            long = MEASURES["long"].losses(run["evaluation"]["held_out"])
            ways = {f"long/{way}": losses for way, losses in long.items()}
            for model in run["models"]:
                prefix = "base: " if model["model_type"] == "base" else ""
                caches = MEASURES["caches"].losses(model["evaluation"]["caches"])
                ways |= {f"caches/{prefix}{way}": losses for way, losses in caches.items() if way in CACHES}
            found.setdefault(name, {})[seed] = {way: keep(losses) for way, losses in ways.items()}
    return found


def draw_differences(losses: Losses, folder: Path) -> None:
    """The difference in perplexity between the carried memory and the base, an emptied and a foreign memory."""
    rows: list[dict[str, Any]] = []
    for name in losses:
        for other, title in OTHERS.items():
            found = compare_models(*(read(losses, f"{name}/long/{way}") for way in ("carried", other)))
            assert found is not None
            rows.append({"recipe": name, "against": f"compared with {title}", **found.relative._asdict()})
    axes = {"x": "recipe", "y": "value", "series": "against", "low": "low", "high": "high"}
    titles = {"y_title": "perplexity with the carried memory, difference", "y_format": "+.1%"}
    chart = bar_chart("memory", "Memory", "", rows, **axes, **titles, reference=0.0, is_dotted=True)
    write_chart(chart, folder / "parallel-adapter-memory.svg")


def tabulate_runs(results: Results, losses: Losses) -> str:
    """One row per recipe: alpha of each seed, mean perplexities, and differences over seeds and documents."""
    lines = [
        "| recipe | α in the end | carried | reset | foreign | against base | reset | foreign |",
        "|---|---" + "|---" * 6 + "|",
    ]
    for name, runs in results.items():
        alphas = ", ".join(f"{value:+.3f}" for run in runs.values() for value in as_list(run["alpha"]))
        perplexities = [
            f"{find_perplexity(losses, f'{name}/long/{way}'):.2f}" for way in ("carried", "reset", "foreign")
        ]
        carried = read(losses, f"{name}/long/carried")
        differences = [compare(carried, read(losses, f"{name}/long/{other}")) for other in OTHERS]
        lines.append(f"| {name} | {alphas} | {' | '.join(perplexities)} | {' | '.join(differences)} |")
    return "\n".join(lines) + "\n"


def tabulate_caches(losses: Losses) -> str:
    """One row per recipe and cache: base and adapter with the same cache."""
    lines = ["| recipe | cache | base | adapter | difference |", "|---" * 5 + "|"]
    for name in losses:
        for cache in CACHES:
            ways = [f"{name}/caches/{cache}", f"{name}/caches/base: {cache}"]
            adapted, base = (f"{find_perplexity(losses, way):.2f}" for way in ways)
            difference = compare(*(read(losses, way) for way in ways))
            lines.append(f"| {name} | {cache} | {base} | {adapted} | {difference} |")
    return "\n".join(lines) + "\n"


def find_perplexity(losses: Losses, name: str) -> float:
    """The geometric mean of the seeds' perplexities."""
    return statistics.geometric_mean(estimate_perplexity(part).value for part in read(losses, name).values())


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


def as_list(alpha: Any) -> list[float]:
    return list(alpha.values()) if isinstance(alpha, dict) else [alpha]
