"""The figures of a study: means over seeds with intervals, and differences from the reference, paired by seed."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from new_llm.evaluation.statistics import find_t_interval
from new_llm.experiments.study_config import StudyConfig

Run = Mapping[str, Any]

CONFIDENCE = 0.95


def _validation(protocol: str) -> Callable[[Run], float | None]:
    return lambda run: run["model"]["evaluation"][protocol]["perplexity"]


def _relative(what: str, against: str) -> Callable[[Run], float | None]:
    """Perplexity with the memory carried / another way − 1, on long documents."""

    def find(run: Run) -> float | None:
        record = run["measured"].get(what)
        difference = record and record["result"]["overall"]["differences"].get(against)
        return difference["relative"]["value"] if difference else None

    return find


def _carried(what: str) -> Callable[[Run], float | None]:
    def find(run: Run) -> float | None:
        record = run["measured"].get(what)
        return record["result"]["overall"]["perplexity"]["carried"]["value"] if record else None

    return find


def _gate(choose: Callable[[Sequence[float]], float]) -> Callable[[Run], float | None]:
    def find(run: Run) -> float | None:
        values = [value for gates in run["model"]["gates"].values() for value in gates]
        return choose(values) if values else None

    return find


def _reversal(name: str) -> Callable[[Run], float | None]:
    def find(run: Run) -> float | None:
        reversal = run["model"]["evaluation"].get("reversal")
        return reversal[name] if reversal else None

    return find


REVERSAL_METRICS = {
    "reversal forward perplexity": "forward_perplexity",
    "reversal backward perplexity": "backward_perplexity",
    "reversal ratio": "ratio",
    "reversal gap": "gap",
    "answers first, forward": "forward_accuracy",
    "answers first, backward": "backward_accuracy",
}
"""The column's name, and that of the reversal curse's figure."""


def group_metrics(study: StudyConfig) -> dict[str, dict[str, Callable[[Run], float | None]]]:
    """By table, its columns: a name, and how to find the figure of one run (None: it has none)."""
    groups: dict[str, dict[str, Callable[[Run], float | None]]] = {
        "Validation perplexity": {
            "sliding perplexity": _validation("sliding"),
            "streaming perplexity": _validation("streaming"),
        }
    }
    if study.long_documents is not None:
        for text in study.long_texts:
            what = f"long-{text}"
            ways = ("reset", "foreign", *study.baselines, *study.window_baselines)
            groups[f"Long documents: {text}"] = {f"{text}: carried perplexity": _carried(what)} | {
                f"{text}: carried vs {against}": _relative(what, against) for against in ways
            }
    groups["Reversal curse"] = {name: _reversal(figure) for name, figure in REVERSAL_METRICS.items()}
    groups["Gates and cost"] = {
        "least gate": _gate(min),
        "greatest gate": _gate(max),
        "tokens/s": lambda run: run["model"]["training"]["tokens_per_second"],
        "peak MiB": lambda run: run["model"]["training"]["peak_memory_bytes"] / 2**20,
    }
    return groups


def list_metrics(study: StudyConfig) -> dict[str, Callable[[Run], float | None]]:
    """All columns of `group_metrics`."""
    return {name: find for group in group_metrics(study).values() for name, find in group.items()}


def describe_study(study: StudyConfig, found: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """All figures of the study as plain values.

    Args:
        study: the study.
        found: by variant, its finished runs.

    Returns:
        `name`, `question`, `reference`, `tables` (which figures stand in which), and `variants`: for each its runs'
        figures, the versions of the code that trained them, their mean and interval (Student's t over seeds; None for
        one seed), the paired difference from the reference, long documents by distance, and recall by task and
        distance.
    """
    metrics = list_metrics(study)
    reference = {run["seed"]: run for run in found.get(study.reference_variant, [])}
    variants: dict[str, Any] = {}
    for name, runs in found.items():
        figures: dict[str, Any] = {}
        for metric, find in metrics.items():
            by_seed = {run["seed"]: find(run) for run in runs}
            known = {seed: value for seed, value in by_seed.items() if value is not None}
            if not known:
                continue
            differences = [
                value - other
                for seed, value in known.items()
                if name != study.reference_variant
                and seed in reference
                and (other := find(reference[seed])) is not None
            ]
            figures[metric] = {
                "by_seed": {str(seed): value for seed, value in known.items()},
                **_summarize(list(known.values())),
                "difference_from_reference": _summarize(differences) if differences else None,
            }
        variants[name] = {
            "changes": study.variants[name],
            "seeds": [run["seed"] for run in runs],
            "code": find_codes(runs),
            "num_parameters": runs[0]["model"]["num_parameters"]["total"],
            "training_tokens": runs[0]["model"]["training"]["tokens"],
            "figures": figures,
            "ranges": {what: _collect_ranges(runs, what) for what in runs[0]["measured"] if what.startswith("long-")},
            "recall": _collect_recall(runs),
        }
    return {
        "name": study.name,
        "question": study.question,
        "reference": study.reference_variant,
        "baselines": [*study.baselines, *study.window_baselines],
        "num_seeds": len(study.seeds),
        "tables": {name: list(group) for name, group in group_metrics(study).items()},
        "variants": variants,
    }


def find_codes(runs: Sequence[Run]) -> list[Mapping[str, Any]]:
    """The versions of the code that trained some runs, each once."""
    found = {tuple(sorted(code.items())): code for run in runs if (code := run.get("code"))}
    return list(found.values())


def _summarize(values: Sequence[float]) -> dict[str, Any]:
    low, high = find_t_interval(values, CONFIDENCE)
    return {"mean": statistics.fmean(values), "low": low, "high": high, "num_seeds": len(values)}


def _collect_ranges(runs: Sequence[Run], what: str) -> list[dict[str, Any]]:
    """Of each range of distance: the mean of each way's perplexity and of each difference.

    Seeds may have different validation documents, and reach different distances: each range is the mean over the seeds
    that reach it, `num_seeds` says how many those are, and `num_tokens` is their tokens together.
    """
    records = [record["result"] for run in runs if (record := run["measured"].get(what))]
    found: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        for entry in record["ranges"]:
            found.setdefault(entry["start"], []).append(entry)
    return [
        {
            "start": start,
            "end": same[0]["end"],
            "num_tokens": sum(entry["num_tokens"] for entry in same),
            "perplexity": _average_ways([{way: e["value"] for way, e in x["perplexity"].items()} for x in same]),
            "relative": _average_ways(
                [{way: e["relative"]["value"] for way, e in x["differences"].items()} for x in same]
            ),
        }
        for start, same in sorted(found.items())
    ]


def _average_ways(values: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The mean of each way over the seeds that have it."""
    ways = dict.fromkeys(way for by_way in values for way in by_way)
    return {way: _summarize([by_way[way] for by_way in values if way in by_way]) for way in ways}


def _collect_recall(runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """By task, for each distance in segments: how often the answer was exact, and ranked first, mean over seeds.

    `reset` is the share ranked first with the memory emptied before the question.
    """
    records = [record["result"] for run in runs if (record := run["measured"].get("recall"))]
    collected: dict[str, list[dict[str, Any]]] = {}
    places = dict.fromkeys(
        (cell["task"], round(cell["mean_distance"])) for record in records for cell in record["cells"]
    )
    for task, distance in sorted(places):

        def average(way: str, figure: str, task: str = task, distance: int = distance) -> dict[str, Any]:
            means = (_average_cells(record["cells"], task, distance, way, figure) for record in records)
            return _summarize([mean for mean in means if mean is not None])

        entry = {"distance": distance, "exact": average("carried", "exact"), "first": average("carried", "first")}
        collected.setdefault(task, []).append(entry | {"reset": average("reset", "first")})
    return collected


def _average_cells(cells: Sequence[Run], task: str, distance: int, way: str, figure: str) -> float | None:
    """The mean over the trials of a distance; None where the seed has none."""
    same = [cell for cell in cells if cell["task"] == task and round(cell["mean_distance"]) == distance]
    num_trials = sum(cell["num_trials"] for cell in same)
    return sum(cell[way][figure]["value"] * cell["num_trials"] for cell in same) / num_trials if same else None


def render_markdown(summary: Mapping[str, Any]) -> str:
    """The tables of a study: a line a variant, a column a metric; intervals where there are several seeds."""
    variants = summary["variants"]
    lines = [
        f"**{summary['question']}** Mean and 95 % interval over {summary['num_seeds']} seeds; differences of "
        "perplexity are relative: below 0 the carried memory is better.",
    ]
    for title, names in summary["tables"].items():
        metrics = [name for name in names if any(name in entry["figures"] for entry in variants.values())]
        known = {name: entry for name, entry in variants.items() if any(m in entry["figures"] for m in metrics)}
        if not known:
            continue
        columns = [metric.rpartition(": ")[2] for metric in metrics]
        lines += ["", f"{title}.", "", "| " + " | ".join(["variant", "seeds", *columns]) + " |"]
        lines.append("|" + "---|" * (2 + len(metrics)))
        for name, entry in known.items():
            cells = [render_figure(metric, entry["figures"].get(metric)) for metric in metrics]
            lines.append("| " + " | ".join([name, str(len(entry["seeds"])), *cells]) + " |")
    for task in dict.fromkeys(task for entry in variants.values() for task in entry["recall"]):
        lines += ["", *_render_recall(task, variants)]
    return "\n".join(lines) + "\n"


def _render_recall(task: str, variants: Mapping[str, Any]) -> list[str]:
    """A table: a line a variant, a column a distance; shares of exact answers, and of answers ranked first."""
    known = {name: entry["recall"][task] for name, entry in variants.items() if task in entry["recall"]}
    distances = sorted({found["distance"] for cells in known.values() for found in cells})
    lines = [
        f"Recall of {task} by segments between the sentence and the question: exact / ranked first, mean over seeds.",
        "",
        "| " + " | ".join(["variant", *map(str, distances)]) + " |",
        "|" + "---|" * (1 + len(distances)),
    ]
    for name, cells in known.items():
        by_distance = {found["distance"]: found for found in cells}
        shown = [
            f"{found['exact']['mean']:.0%} / {found['first']['mean']:.0%}" if (found := by_distance.get(d)) else "–"
            for d in distances
        ]
        lines.append("| " + " | ".join([name, *shown]) + " |")
    return lines


def render_figure(metric: str, figure: Mapping[str, Any] | None) -> str:
    """One cell: the mean, and the interval where there is one."""
    if figure is None:
        return "–"
    is_relative = " vs " in metric

    def render(value: float) -> str:
        if is_relative:
            return f"{100 * value:+.2f} %"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"

    text = render(figure["mean"])
    if figure["low"] is not None and math.isfinite(figure["low"]):
        text += f" [{render(figure['low'])}, {render(figure['high'])}]"
    return text
