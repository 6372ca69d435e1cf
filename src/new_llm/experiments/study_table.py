"""The figures of a study: means over seeds with intervals, and differences from the reference, paired by seed.

The figures are the columns that the measures define, for what the runs measured themselves and for what the study
measured afterwards. If a measure can't read a result, only the cells of this result are missing.
"""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from new_llm.config.terminal import make_line
from new_llm.evaluation import MEASURES, Column, ask_measure
from new_llm.evaluation.caches import BARE, REPETITION, TEXT_CACHES
from new_llm.evaluation.statistics import (
    MIN_DOCUMENTS,
    MIN_SEEDS,
    Comparison,
    DocumentLosses,
    Estimate,
    compare_models,
    find_t_interval,
)
from new_llm.experiments.config import VALIDATION, StudyConfig
from new_llm.formats import format_bytes, format_count, format_number

Run = Mapping[str, Any]
"""One run: `seed`, `model` (its entry in results.json), `measured` (the study's records by name), `code`."""

COST = "Gates and cost"
CPU_SECONDS = "processor seconds"
MEMORY, STATE = "memory, bytes per row", "state, bytes per row"
"""Titles of cost columns that charts have as their x-axis. Numbers count as float32."""
BEYOND = "beyond repetition"
"""A comparison in which both models also look up the text itself, two bytes per token, by its longest n-grams."""
CONTRASTS = "Right answers, in points"
"""The table of contrasts within a model."""
BITS_PER_BYTE = "bits/byte"
"""The ending of the titles of columns in bits per byte."""
STREAMING_BITS = f"streaming {BITS_PER_BYTE}"


def list_measured(run: Run) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (name of the measurement, name of the measure, result) for a run."""
    for name, result in (run["model"].get("evaluation") or {}).items():
        yield name, name, result
    for what, record in run["measured"].items():
        if record["result"] is not None:
            yield what, record["kind"], record["result"]


class Figure(NamedTuple):
    """A figure of one run, its table, and the number of documents behind it, if known."""

    table: str
    column: Column
    num_documents: int | None = None


def list_figures(run: Run) -> dict[str, Figure]:
    """The figures of a run by name."""
    figures: dict[str, Figure] = {}
    for what, name, result in list_measured(run):
        text = f": {what.removeprefix(f'{name}-')}" if what != name else ""
        number, documents = result.get("num_documents"), result.get("documents")
        if not isinstance(number, int):
            number = len(documents) if isinstance(documents, list) else None
        columns = ask_measure(name, "columns", dict(result), [])
        found = [(column.group or MEASURES[name].title, column.title, column) for column in columns]
        for table in ask_measure(name, "tables", dict(result), []):
            for row, columns in table.rows if table.is_for_studies else ():
                found += [(table.title, f"{row}, {column.title}", column) for column in columns]
        for title, head, column in found:
            if isinstance(column.value, int | float):
                figures[f"{title}{text}: {head}"] = Figure(title + text, column, number)
    model, training, cost = run["model"], run["model"]["training"], run["model"].get("cost") or {}
    gates = [gate for gates in model["gates"].values() for gate in gates]
    num_bytes = {key: None if cost.get(key) is None else 4 * cost[key] for key in ("memory_numbers", "state_numbers")}
    costs = [
        Column("parameters", "parameters", model["num_parameters"]["total"], format_count),
        Column("memory", MEMORY, num_bytes["memory_numbers"], format_bytes),
        Column("state", STATE, num_bytes["state_numbers"], format_bytes),
        Column("FLOPs", "FLOPs/token", cost.get("flops_per_token"), format_count),
        Column("CPU time", CPU_SECONDS, training.get("cpu_seconds"), format_count),
        Column("least gate", "least gate", min(gates, default=None)),
        Column("greatest gate", "greatest gate", max(gates, default=None)),
        Column("tokens/s", "tokens/s", training["tokens_per_second"], format_count),
        Column("peak memory", "peak memory", training["peak_memory_bytes"], format_bytes),
    ]
    return figures | {f"{COST}: {column.title}": Figure(COST, column) for column in costs if column.value is not None}


def list_cached(run: Run) -> dict[str, tuple[Estimate, int]]:
    """By cache: the bits per byte of streaming with this cache, and the bytes that the cache stores.

    The gain of a cache was measured on long documents, where there is something to look up. Here it is subtracted, in
    bits per byte, from the model's own figure on the validation documents. n-grams are looked up in the text itself,
    so the tokens of the longest document count as stored.
    """
    own, later = run["model"].get("evaluation") or {}, run["measured"].get(f"caches-{VALIDATION}") or {}
    streaming, caches = own.get("streaming") or {}, later.get("result") or own.get("caches")
    if not caches or not streaming.get("num_bytes"):
        return {}
    longest = max(sum(document["num_tokens"]) for document in caches["documents"])
    tokens_per_byte = streaming["num_tokens"] / streaming["num_bytes"]
    found: dict[str, tuple[Estimate, int]] = {}
    for cache in caches["caches"][1:]:  # the first one is the bare model
        size, worth = cache["size"], cache["relative"]
        bits: dict[str, Any] = {
            end: None if share is None else streaming["bits_per_byte"] + math.log2(1 + share) * tokens_per_byte
            for end, share in worth.items()
        }
        found[cache["name"]] = Estimate(**bits), size["state_bytes"] + size["bytes_per_token"] * longest
    return found


def describe_study(
    study: StudyConfig,
    found: Mapping[str, list[dict[str, Any]]],
    checkpoints: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> dict[str, Any]:
    """The figures of a study's finished runs as plain values: the content of `study.json`.

    Each variant has its changes, its seeds, the versions of the code that trained it, its size, and:

    - `figures`, by name: the values by seed; their mean with its interval (Student's t over at least MIN_SEEDS seeds;
      for one seed, the measure's own interval over documents); the text of the table's cell; and the difference from
      the reference, paired by seed;
    - `caches`: see `summarize_caches`;
    - `comparisons` with the reference, see `compare_runs`. Tables show these and the comparisons with the study's
      baselines as figures, too.

    `checkpoints`, next to the variants, is the result of `describe_checkpoints`.
    """
    tables: dict[str, dict[str, None]] = {}
    variants: dict[str, Any] = {}
    for name, runs in found.items():
        reference = found.get(study.reference_variant, ()) if name != study.reference_variant else ()
        contrasts, compared = contrast_runs(runs), compare_runs(runs, reference)
        codes = {tuple(sorted(code.items())): code for run in runs if (code := run.get("code"))}
        shown = list(describe_figures(runs, reference))
        shown += [(CONTRASTS, key, _show_comparison(one, is_share=True)) for key, one in contrasts.items()]
        for other in dict.fromkeys((study.reference_variant, *study.baselines)):
            others = found.get(other, ()) if other != name else ()
            against = compared if other == study.reference_variant else compare_runs(runs, others)
            shown += [
                (f"Against {other}{one.table}", key, _show_comparison(one.comparison))
                for key, one in against.items()
                if one.has_column
            ]
        for table, head, _ in shown:
            tables.setdefault(table, {})[f"{table}: {head}"] = None
        variants[name] = {
            "changes": study.variants[name],
            "seeds": [run["seed"] for run in runs],
            "code": list(codes.values()),
            "num_parameters": runs[0]["model"]["num_parameters"]["total"],
            "training_tokens": runs[0]["model"]["training"]["tokens"],
            "figures": {f"{table}: {head}": figure for table, head, figure in shown},
            "caches": summarize_caches(runs),
            "comparisons": {key: one._asdict() for key, one in contrasts.items()}
            | {key: one.comparison._asdict() for key, one in compared.items()},
        }
    cost = {COST: tables.pop(COST)} if COST in tables else {}
    return {
        "name": study.name,
        "question": study.question,
        "reference": study.reference_variant,
        "baselines": [*study.all_baselines],
        "num_seeds": len(study.seeds),
        "tables": {table: list(metrics) for table, metrics in (tables | cost).items()},
        "variants": variants,
        "checkpoints": describe_checkpoints(checkpoints or {}, study.reference_variant),
    }


def describe_figures(runs: Sequence[Run], reference: Sequence[Run]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (table, heading, figure) for a variant, over its seeds; `reference` is empty for the reference itself."""
    by_seed, theirs = ({run["seed"]: list_figures(run) for run in some} for some in (runs, reference))
    for metric in dict.fromkeys(metric for figures in by_seed.values() for metric in figures):
        known = {seed: figures[metric] for seed, figures in by_seed.items() if metric in figures}
        values = {seed: figure.column.value for seed, figure in known.items()}
        has_interval = all(one.num_documents is None or one.num_documents >= MIN_DOCUMENTS for one in known.values())
        differences = [
            value - base
            for seed, value in values.items()
            if isinstance(value, float | int) and metric in theirs.get(seed, {})
            if isinstance(base := theirs[seed][metric].column.value, float | int)
        ]
        table, column, _ = next(iter(known.values()))
        summary = _summarize(list(values.values()), is_shown=has_interval, single=column)
        difference = _summarize(differences, is_shown=has_interval) if differences else None
        figure = {"by_seed": {str(seed): value for seed, value in values.items()}, **summary}
        figure |= {"text": _render(column, summary), "difference_from_reference": difference}
        yield table, metric.removeprefix(f"{table}: "), figure


def summarize_caches(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """By cache added to a variant: the bits per byte of streaming, over seeds, and the bytes that the cache stores."""
    found: dict[str, list[tuple[Estimate, int]]] = {}
    for run in runs:
        for name, cached in list_cached(run).items():
            found.setdefault(name, []).append(cached)
    return {
        name: _summarize([bits.value for bits, _ in seeds], is_shown=True, single=seeds[0][0]) | {"bytes": seeds[0][1]}
        for name, seeds in found.items()
    }


# Models in pairs


class Compared(NamedTuple):
    """A comparison of a variant with the reference, its table, and whether it has a column there at all."""

    comparison: Comparison
    table: str
    has_column: bool


def list_losses(runs: Iterable[Run]) -> dict[str, dict[str, dict[int, DocumentLosses]]]:
    """The losses by which models are compared: by measurement, way of reading, and seed."""
    found: dict[str, dict[str, dict[int, DocumentLosses]]] = {}
    for run in runs:
        for what, name, result in list_measured(run):
            for way, losses in ask_measure(name, "losses", dict(result), {}).items():
                found.setdefault(what, {}).setdefault(way, {})[run["seed"]] = losses
    return found


def compare_runs(runs: Sequence[Run], reference: Sequence[Run], *, is_short: bool = False) -> dict[str, Compared]:
    """Compare a variant with the reference, paired by seed and document, in nats per token; by name.

    Both read in the same way and have the same cache. The comparison `BEYOND` gives both the largest cache of the text
    that was measured (`TEXT_CACHES`). If caches were measured, the bare variant is also compared with the reference
    with each cache: "against + 2,000 states". Comparisons in a range of distance end with "from 1,024"; with
    `is_short`, only the last range is included.
    """
    own, others = list_losses(runs), list_losses(reference)
    found: dict[str, Compared] = {}

    def add(name: str, one: dict[int, DocumentLosses], other: dict[int, DocumentLosses], table: str) -> None:
        starts = next(iter(one.values())).range_starts
        ranges = range(len(starts)) if len(starts) > 1 else ()
        for column in (None, *(ranges[-1:] if is_short else ranges)):
            parts = [{seed: losses.select(column) for seed, losses in by_seed.items()} for by_seed in (one, other)]
            if (comparison := compare_models(parts[0], parts[1])) is not None:
                key = name if column is None else f"{name} from {starts[column]:,}"
                found[key] = Compared(comparison, table, column is None)

    for what, ways in own.items():
        theirs = others.get(what, {})
        shared = [way for way in ways if way in theirs]
        has_caches = BARE in ways
        for way in shared if has_caches else shared[:1]:
            name = what if way == next(iter(ways)) else f"{what}, {way}"
            is_part = way.startswith(REPETITION)
            add(name, ways[way], theirs[way], " by what is repeated" if is_part else "")
        if has_caches:
            caches = [way for way in shared if way.startswith("+ ")]
            for way in [way for way in caches if way.endswith(TEXT_CACHES)][-1:]:
                add(f"{what}, {BEYOND}", ways[way], theirs[way], "")
            for way in caches:
                add(f"{what}, against {way}", ways[BARE], theirs[way], " with a cache")
    return found


def contrast_runs(runs: Sequence[Run]) -> dict[str, Comparison]:
    """Contrasts within each run, e.g. of its hits with those of guessing, over seeds and documents; by name."""
    found: dict[str, tuple[dict[int, DocumentLosses], dict[int, DocumentLosses]]] = {}
    for run in runs:
        for _, name, result in list_measured(run):
            for key, pair in ask_measure(name, "contrasts", dict(result), {}).items():
                for by_seed, losses in zip(found.setdefault(key, ({}, {})), pair, strict=True):
                    by_seed[run["seed"]] = losses
    compared = {key: compare_models(*sides) for key, sides in found.items()}
    return {key: one for key, one in compared.items() if one is not None}


def _show_comparison(found: Comparison, *, is_share: bool = False) -> dict[str, Any]:
    """A comparison as a figure."""
    return {
        "by_seed": {str(seed): nats for seed, nats in found.by_seed.items()},
        "mean": found.nats,
        "low": found.low,
        "high": found.high,
        "num_seeds": found.num_seeds,
        "text": found.describe(is_share=is_share),
        "difference_from_reference": None,
    }


def describe_checkpoints(
    checkpoints: Mapping[str, Sequence[Mapping[str, Any]]], reference: str
) -> dict[str, list[dict[str, Any]]]:
    """By variant, a list over the checkpoints of training. Each has its `share` of the training, `tokens`, `seeds`, the
    `perplexity` of each way of reading (averaged over seeds in the logarithm), and the `comparisons` with the
    reference."""

    def find_runs(variant: str, share: float) -> list[Run]:
        """The runs that were measured at this share, each with the line of its log as its model's entry."""
        logs = [(one["seed"], one["log"]) for one in checkpoints.get(variant, ())]
        return [{"seed": seed, "model": log[share], "measured": {}} for seed, log in logs if share in log]

    def describe(variant: str, share: float) -> dict[str, Any]:
        runs = find_runs(variant, share)
        perplexity = {
            f"{what}, {way}" if way else what: math.exp(
                statistics.fmean(one.total_nll.sum() / max(1, one.num_tokens.sum()) for one in by_seed.values())
            )
            for what, ways in list_losses(runs).items()
            for way, by_seed in ways.items()
        }
        compared = {} if variant == reference else compare_runs(runs, find_runs(reference, share), is_short=True)
        return {
            "share": runs[0]["model"]["share"],
            "tokens": runs[0]["model"]["tokens"],
            "seeds": [run["seed"] for run in runs],
            "perplexity": perplexity,
            "comparisons": {key: one.comparison._asdict() for key, one in compared.items()},
        }

    return {
        variant: [describe(variant, share) for share in sorted({share for one in runs for share in one["log"]})]
        for variant, runs in checkpoints.items()
    }


def _summarize(values: Sequence[Any], *, is_shown: bool, single: Column | Estimate | None = None) -> dict[str, Any]:
    """The mean over seeds with its interval; for one seed, the figure's own interval."""
    finite = [float(value) for value in values if math.isfinite(value)]
    low, high = (single.low, single.high) if single and len(values) == 1 else (None, None)
    if is_shown and len(finite) >= MIN_SEEDS and min(finite) < max(finite):
        low, high = find_t_interval(finite)
    mean = statistics.fmean(finite) if finite else None
    return {"mean": mean, "low": low, "high": high, "num_seeds": len(finite)}


def _render(column: Column, summary: Mapping[str, Any]) -> str:
    mean, *ends = (
        format_number(value) if value is None or not math.isfinite(value) else column.format(value)
        for value in (summary["mean"], summary["low"], summary["high"])
    )
    return mean if None in (summary["low"], summary["high"]) else f"{mean} [{', '.join(ends)}]"


def render_introduction(summary: Mapping[str, Any]) -> str:
    """The study's question, and how to read its figures."""
    return (
        f"{make_line(summary['question'])} Figures are means (seeds: {summary['num_seeds']}) with 95 % intervals: "
        "over documents for a single seed, and none for two seeds. Differences are relative; below 0, the carried "
        "memory is better. Models are compared paired by seed and document, and intervals hold for other seeds and "
        "other documents. A difference that chance could explain is followed by the smallest one that would have been "
        f"seen in four of five repetitions. Figures from fewer than {MIN_DOCUMENTS} documents have no interval."
    )


def render_markdown(summary: Mapping[str, Any]) -> str:
    """The tables of a study in Markdown: a row per variant, a column per figure, with its mean and interval."""
    lines = [render_introduction(summary)]
    for title in summary["tables"]:
        columns, rows = list_cells(summary, title)
        lines += ["", f"{make_line(title)}.", "", "| " + " | ".join(["variant", *columns]) + " |"]
        lines.append("|" + "---|" * (1 + len(columns)))
        lines += ["| " + " | ".join([name, *(text for text, _ in cells)]) + " |" for name, cells in rows]
    return "\n".join(lines) + "\n"


def render_csv(summary: Mapping[str, Any]) -> str:
    """The figures of a study as CSV: a row per variant and figure, with the mean and the values by seed."""
    seeds = dict.fromkeys(str(seed) for entry in summary["variants"].values() for seed in entry["seeds"])
    ends = ("mean", "low", "high", "num_seeds")
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    differences = [f"difference_{end}" for end in ends[:3]]
    table.writerow(["variant", "figure", *ends, *differences, *(f"seed_{seed}" for seed in seeds)])
    for name, entry in summary["variants"].items():
        for figure, found in entry["figures"].items():
            difference = found["difference_from_reference"] or {}
            row = [name, figure, *(found[end] for end in ends), *(difference.get(end) for end in ends[:3])]
            table.writerow([*row, *(found["by_seed"].get(seed) for seed in seeds)])
    return file.getvalue()


def list_cells(
    summary: Mapping[str, Any], title: str
) -> tuple[list[str], list[tuple[str, list[tuple[str, float | None]]]]]:
    """A table's column titles, and the cells (text, sort value) of each variant that has a figure in it."""
    metrics, rows = summary["tables"][title], []
    for name, entry in summary["variants"].items():
        found = [entry["figures"].get(metric, {"text": "–", "mean": None}) for metric in metrics]
        if any(metric in entry["figures"] for metric in metrics):
            num_seeds = len(entry["seeds"])
            rows.append((name, [(str(num_seeds), num_seeds), *((one["text"], one["mean"]) for one in found)]))
    return ["seeds", *(make_line(metric.removeprefix(f"{title}: ")) for metric in metrics)], rows
