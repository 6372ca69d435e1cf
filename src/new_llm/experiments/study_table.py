"""The figures of a study: means over seeds with intervals, and differences from the reference, paired by seed."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from new_llm.config.study import StudyConfig
from new_llm.evaluation.bootstrap import find_t_interval

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


def list_metrics(study: StudyConfig) -> dict[str, Callable[[Run], float | None]]:
    """The columns of the table: a name, and how to find the figure of one run (None: it has none)."""
    metrics: dict[str, Callable[[Run], float | None]] = {
        "sliding perplexity": _validation("sliding"),
        "streaming perplexity": _validation("streaming"),
    }
    if study.long_documents is not None:
        for text in study.long_texts:
            what = f"long-{text}"
            metrics[f"{text}: carried perplexity"] = _carried(what)
            for against in ("reset", "foreign", *study.baselines, *study.window_baselines):
                metrics[f"{text}: carried vs {against}"] = _relative(what, against)
    metrics["least gate"], metrics["greatest gate"] = _gate(min), _gate(max)
    metrics["tokens/s"] = lambda run: run["model"]["training"]["tokens_per_second"]
    metrics["peak MiB"] = lambda run: run["model"]["training"]["peak_memory_bytes"] / 2**20
    return metrics


def describe_study(study: StudyConfig, found: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """All figures of the study as plain values.

    Args:
        study: the study.
        found: by variant, its finished runs.

    Returns:
        `name`, `question`, `reference`, and `variants`: for each its runs' figures, their mean and interval (Student's
        t over seeds; None for one seed), and the paired difference from the reference.
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
            "num_parameters": runs[0]["model"]["num_parameters"]["total"],
            "training_tokens": runs[0]["model"]["training"]["tokens"],
            "figures": figures,
            "ranges": {what: _collect_ranges(runs, what) for what in runs[0]["measured"] if what.startswith("long-")},
            "recall": [record["result"] for run in runs if (record := run["measured"].get("recall"))],
        }
    return {
        "name": study.name,
        "question": study.question,
        "reference": study.reference_variant,
        "baselines": [*study.baselines, *study.window_baselines],
        "num_seeds": len(study.seeds),
        "variants": variants,
    }


def _summarize(values: Sequence[float]) -> dict[str, Any]:
    low, high = find_t_interval(values, CONFIDENCE)
    return {"mean": statistics.fmean(values), "low": low, "high": high, "num_seeds": len(values)}


def _collect_ranges(runs: Sequence[Run], what: str) -> list[dict[str, Any]]:
    """Of each range of distance: the mean over seeds of each way's perplexity and of each difference."""
    records = [record["result"] for run in runs if (record := run["measured"].get(what))]
    if not records:
        return []
    collected: list[dict[str, Any]] = []
    for index, entry in enumerate(records[0]["ranges"]):
        same = [record["ranges"][index] for record in records]
        collected.append(
            {
                "start": entry["start"],
                "end": entry["end"],
                "num_tokens": entry["num_tokens"],
                "perplexity": {
                    way: _summarize([found["perplexity"][way]["value"] for found in same])
                    for way in entry["perplexity"]
                },
                "relative": {
                    way: _summarize([found["differences"][way]["relative"]["value"] for found in same])
                    for way in entry["differences"]
                },
            }
        )
    return collected


def render_markdown(summary: Mapping[str, Any]) -> str:
    """The table of a study: a line a variant, a column a metric; intervals where there are several seeds."""
    variants = summary["variants"]
    metrics = list(dict.fromkeys(metric for entry in variants.values() for metric in entry["figures"]))
    lines = [
        f"**{summary['question']}** Mean and 95 % interval over {summary['num_seeds']} seeds; differences of "
        "perplexity are relative: below 0 the carried memory is better.",
        "",
        "| " + " | ".join(["variant", "seeds", *metrics]) + " |",
        "|" + "---|" * (2 + len(metrics)),
    ]
    for name, entry in variants.items():
        cells = [render_figure(metric, entry["figures"].get(metric)) for metric in metrics]
        lines.append("| " + " | ".join([name, str(len(entry["seeds"])), *cells]) + " |")
    return "\n".join(lines) + "\n"


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
