"""The page's tables and facts as plain values."""

import math
from collections.abc import Sequence
from typing import Any

from new_llm.formats import MISSING, format_number, format_percent
from new_llm.report.evaluation_plots import name_text
from new_llm.report.outcome import CONFIDENCE
from new_llm.report.points import MAX_VALUE
from new_llm.report.results import compute_mean, compute_spread, get_entries, get_finite, get_number, get_value
from new_llm.report.runs import Run
from new_llm.report.series import Series

REVERSAL_KEYS = ("forward_perplexity", "backward_perplexity", "forward_accuracy", "backward_accuracy")
TRAINING_KEYS = ("epochs", "best_epoch", "steps", "tokens", "seconds", "tokens_per_second", "peak_memory_bytes")


def format_time(created: Any) -> str:
    """2026-01-31T14:05:02Z as 2026-01-31 14:05 UTC; anything else as it is."""
    text = str(created or "")
    is_utc = len(text) >= 16 and text[10] == "T" and (text.endswith("Z") or text.endswith("+00:00"))
    return f"{text[:10]} {text[11:16]} UTC" if is_utc else text


def list_facts(runs: Sequence[Run]) -> list[str]:
    """What stands under the title: where the text is from, where it ran, the seeds."""
    if not runs:
        return []

    def collect(*keys: str) -> str:
        found = [get_value(run.results, *keys) for run in runs]
        return ", ".join(dict.fromkeys(str(value) for value in found if value is not None and value != ""))

    source, seed = collect("data", "source"), collect("config", "seed")
    where = " ".join(part for part in (collect("environment", "device"), collect("environment", "precision")) if part)
    facts = [f"{len(runs)} runs" if len(runs) > 1 else "", f"text: {source}" if source else "", where]
    facts.append(f"seed{'s' if ',' in seed else ''} {seed}" if seed else "")
    return [fact for fact in facts if fact]


def describe_revision(results: dict[str, Any]) -> str:
    """The program's version and revision."""
    version, revision = (get_value(results, "code", key) for key in ("version", "git_revision"))
    parts = [f"new-llm {version}" if version else "", f"commit {str(revision)[:12]}" if revision else ""]
    text = ", ".join(part for part in parts if part)
    is_dirty = bool(text and get_value(results, "code", "git_dirty"))
    return f"{text}, with changes that were not committed" if is_dirty else text


def describe_measurement(series: Sequence[Series]) -> str:
    """What was scored, and how, from the first model that was."""
    for member in (member for one in series for member in one.members):
        sliding = get_value(member.entry, "evaluation", "sliding")
        context, stride, tokens, documents = (
            get_finite(sliding, key) for key in ("context", "stride", "num_tokens", "num_documents")
        )
        if tokens is None:
            continue
        window = f", windows of {context:,.0f} tokens moved by {stride:,.0f}" if context and stride else ""
        held = f" of {documents:,.0f} document{'s' if documents != 1 else ''}" if documents else ""
        return f"Scored on {tokens:,.0f} validation tokens{held}{window}."
    return ""


def list_verdicts(series: Sequence[Series]) -> list[tuple[str, str]]:
    """The models that got a verdict, and what it means."""
    verdicts: dict[str, list[str]] = {}
    for one in series:
        for member in one.members:
            text, span = (get_value(member.entry, "evaluation", "sliding", "verdict", key) for key in ("text", "range"))
            if text:
                names = verdicts.setdefault(f"{text} ({span})" if span else str(text), [])
                names += [one.name] if one.name not in names else []
    return [(", ".join(names), text) for text, names in verdicts.items()]


def list_training(series: Sequence[Series]) -> list[dict[str, Any]]:
    """How each training went, a row a model and seed."""
    rows = []
    for one in series:
        for member in one.members:
            training = get_value(member.entry, "training")
            if isinstance(training, dict):
                stopped = {"True": "early", "False": "at the end"}.get(str(training.get("stopped_early")), MISSING)
                losses = [get_number(line, "loss") for line in get_entries(training, "steps_log")]
                words = {
                    "name": one.name,
                    "seed": member.seed,
                    "stopped": stopped,
                    "loss": losses[-1] if losses else None,
                }
                rows.append({key: get_number(training, key) for key in TRAINING_KEYS} | words | {"series": one.index})
    return rows


def list_layers(series: Sequence[Series]) -> list[dict[str, Any]]:
    """Parameters and memory of each model's parts."""
    models = []
    for one in series:
        entry = one.members[0].entry
        parameters = get_value(entry, "num_parameters")
        per_layer = get_value(parameters, "per_layer")
        memories = {get_number(item, "layer"): item for item in get_entries(entry, "memory_info", "per_layer")}
        parts = [
            {
                "name": f"layer {index}",
                "kind": str(get_value(memories.get(index), "kind") or ""),
                "parameters": get_number({"n": number}, "n"),
                "bytes": get_number(memories.get(index), "bytes"),
            }
            for index, number in enumerate(per_layer if isinstance(per_layer, list) else [])
        ]
        for key, label in (("embedding", "embedding"), ("lm_head", "head"), ("total", "total")):
            memory = get_number(entry, "memory_info", "total_bytes") if key == "total" else None
            if (number := get_number(parameters, key)) is not None:
                parts.append({"name": label, "kind": "", "parameters": number, "bytes": memory})
        if parts:
            models.append({"name": one.name, "parts": parts})
    return models


def list_reversal(series: Sequence[Series]) -> dict[str, list[dict[str, Any]]]:
    """Rows by kind of fact and by relation, means over seeds: one title, then a line a model."""
    kinds: dict[str, dict[str, list[Any]]] = {}
    relations: dict[str, dict[str, list[Any]]] = {}
    for one in series:
        for member in one.members:
            reversal = get_value(member.entry, "evaluation", "reversal")
            if not isinstance(reversal, dict):
                continue
            kinds.setdefault("all facts", {}).setdefault(one.name, []).append(reversal)
            by_kind = reversal.get("by_kind")
            for kind, numbers in by_kind.items() if isinstance(by_kind, dict) else ():
                kinds.setdefault(f"{kind} facts", {}).setdefault(one.name, []).append(numbers)
            for relation in get_entries(reversal, "per_relation"):
                title = str(relation.get("relation") or "unnamed").replace("_", " ")
                relations.setdefault(title, {}).setdefault(one.name, []).append(relation)
    return {"kinds": _list_groups(kinds), "relations": _list_groups(relations)}


def _list_groups(table: dict[str, dict[str, list[Any]]]) -> list[dict[str, Any]]:
    groups = []
    for title, lines in table.items():
        rows = []
        for name, entries in lines.items():
            numbers = {key: _mean(entries, key) for key in REVERSAL_KEYS}
            forward, backward = numbers["forward_perplexity"], numbers["backward_perplexity"]
            ratio = forward / backward if forward is not None and backward else None
            rows.append(numbers | {"name": name, "ratio": ratio, "num_pairs": get_number(entries[0], "num_pairs")})
        groups.append({"title": title, "lines": rows})
    return groups


def _mean(entries: Sequence[Any], key: str) -> float | None:
    values = [value for entry in entries if (value := get_number(entry, key)) is not None]
    if len(values) < 2:
        return values[0] if values else None
    finite = [value for value in values if math.isfinite(value)]
    return compute_mean(finite) if finite else None


def list_pairs(series: Sequence[Series]) -> list[dict[str, Any]]:
    """Where several seeds were trained: each model's perplexity, mean and interval over seeds."""
    if all(len(one.members) < 2 for one in series):
        return []
    from new_llm.evaluation.bootstrap import find_t_interval  # torch comes with it: only where it is needed

    rows = []
    for one in series:
        values = one.collect("evaluation", "sliding", "perplexity")
        if not values or max(values) > MAX_VALUE:
            continue
        low, high = find_t_interval(values, CONFIDENCE)
        each = ", ".join(
            f"{member.seed}: {format_number(value)}" for member, value in zip(one.members, values, strict=False)
        )
        ends = f"{format_number(low)} – {format_number(high)}" if low is not None else MISSING
        spread = compute_spread(values) if len(values) > 1 else None
        rows.append({"name": one.name, "each": each, "mean": compute_mean(values), "spread": spread, "interval": ends})
    return rows


def list_evaluations(runs: Sequence[Run]) -> list[dict[str, str]]:
    """What `new-llm eval` has measured, a row a record."""
    rows = []
    for run in runs:
        for record in run.evaluations:
            is_partial = record.get("status") == "partial"
            rows.append(
                {
                    "run": run.name,
                    "kind": str(record.get("kind")) + (", partial" if is_partial else ""),
                    "model": str(get_value(record, "subject", "model") or MISSING),
                    "text": name_text(record),
                    "found": describe_record(record),
                    "created": format_time(record.get("created")),
                    "command": str(record.get("command") or ""),
                }
            )
    return rows


def describe_record(record: dict[str, Any]) -> str:
    """The main figure of an evaluation."""
    result = record["result"]
    perplexity = get_number(result, "perplexity")
    if perplexity is not None:
        protocol = str(get_value(result, "protocol") or "")
        return f"perplexity {format_number(perplexity)}" + (f" ({protocol})" if protocol else "")
    overall = get_value(result, "overall")
    carried = get_number(overall, "perplexity", "carried", "value")
    if carried is not None:
        relative = get_number(overall, "differences", "reset", "relative", "value")
        against = f", {100 * relative:+.2f} % against reset" if relative is not None else ""
        return f"perplexity {format_number(carried)} with the memory carried{against}"
    if isinstance(get_value(result, "cells"), list):
        exact = [get_finite(cell, "carried", "exact", "value") for cell in get_entries(result, "cells")]
        known = [value for value in exact if value is not None]
        return f"exact recall {format_percent(compute_mean(known))} over all cells" if known else MISSING
    ratio = get_number(result, "ratio")
    if ratio is not None:
        return f"forward/backward perplexity {format_number(ratio, 3)}"
    if get_number(result, "num_fault") is not None:
        counts = [f"{result.get(f'num_{level}')} {level}" for level in ("ok", "warning", "fault")]
        return ", ".join(counts)
    return MISSING


def flatten_facts(entry: Any, prefix: str = "") -> list[tuple[str, str]]:
    """(name, value) of a mapping's leaves; the names of nested ones are joined."""
    if not isinstance(entry, dict):
        return []
    leaves: list[tuple[str, str]] = []
    for key, value in entry.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, dict):
            leaves += flatten_facts(value, f"{name}, ")
        elif isinstance(value, int) and not isinstance(value, bool):
            leaves.append((name, f"{value:,}"))
        elif isinstance(value, float):
            leaves.append((name, format_number(value) if math.isfinite(value) else str(value)))
        elif isinstance(value, list):
            leaves.append((name, ", ".join(str(item) for item in value)))
        elif value is not None and value != "":
            leaves.append((name, str(value)))
    return leaves
