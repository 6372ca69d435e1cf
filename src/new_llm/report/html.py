"""The report: one self-contained HTML page from one run's results."""

import json
import math
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from new_llm.config.atomic import write_text_atomically
from new_llm.report import plots, tables
from new_llm.report.results import (
    describe_outcome,
    get_entries,
    get_finite,
    get_number,
    get_value,
    named_models,
)
from new_llm.report.svg import KEY_PATHS, NUM_SERIES

TEMPLATE_FILE = "report.html"
# How a verdict's badge looks; a level that is not here looks neutral.
BADGES = {
    "abnormal": "bad",
    "suspicious": "warn",
    "normal": "good",
    "undertrained": "info",
    "training": "info",
}


def write_report(results: dict[str, Any], path: Path) -> None:
    """Write the page; what the results lack is left out.

    The page loads nothing: style and pictures are inside it. The file appears whole or not at all.

    Args:
        results: as in results.json. NaN and infinite numbers may occur.
        path: the .html file; its folder is made where it is missing, and an older file is replaced.
    """
    page = render_report(results)
    # JSON may hold lone surrogates, which UTF-8 can't.
    write_text_atomically(path, page.encode("utf-8", "replace").decode("utf-8"))


def render_report(results: dict[str, Any]) -> str:
    """The page's text."""
    results = json.loads(json.dumps(results, default=str))  # one form, however the results were made
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": tables.format_number,
        "count": tables.format_count,
        "short": tables.format_short,
        "bytes": tables.format_bytes,
        "percent": tables.format_percent,
        "seconds": tables.format_seconds,
    }
    template = environment.from_string(resources.files("new_llm.report").joinpath(TEMPLATE_FILE).read_text("utf8"))
    named = named_models(results)
    config = results.get("config")
    return template.render(
        name=str(results.get("name") or "experiment"),
        status=str(results.get("status") or "unknown"),
        created=_format_time(results.get("created")),
        facts=_list_facts(results),
        outcome=describe_outcome(results),
        keys=[(name, i % NUM_SERIES, KEY_PATHS[i % len(KEY_PATHS)]) for i, (name, _) in enumerate(named)],
        groups=[(group, len(list(members))) for group, members in groupby(tables.COLUMNS, lambda c: c.group)],
        columns=tables.COLUMNS,
        rows=tables.summarize(results),
        badges=BADGES,
        verdicts=_list_verdicts(results),
        measured=_describe_measurement(results),
        charts={chart.name: chart for chart in plots.draw_charts(results)},
        svg=Markup,
        training=_list_training(results),
        layers=_list_layers(results),
        reversal=_list_reversal(results),
        command=str(results.get("command") or ""),
        revision=_describe_revision(results),
        data=[leaf for leaf in _flatten(get_value(results, "data")) if leaf[0] != "notes"],
        notes=_list_notes(results),
        environment=_flatten(get_value(results, "environment")),
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
    )


def _format_time(created: Any) -> str:
    """2026-01-31T14:05:02Z as 2026-01-31 14:05 UTC; anything else as it is."""
    text = str(created or "")
    is_utc = len(text) >= 16 and text[10] == "T" and (text.endswith("Z") or text.endswith("+00:00"))
    return f"{text[:10]} {text[11:16]} UTC" if is_utc else text


def _list_facts(results: dict[str, Any]) -> list[str]:
    """What stands under the title: where the text is from, where it ran, the seed."""
    source, seed = get_value(results, "data", "source"), get_value(results, "config", "seed")
    device, precision = (get_value(results, "environment", key) for key in ("device", "precision"))
    where = " ".join(str(part) for part in (device, precision) if part)
    facts = [f"text: {source}" if source else "", where, f"seed {seed}" if seed is not None else ""]
    return [fact for fact in facts if fact]


def _describe_revision(results: dict[str, Any]) -> str:
    version, revision = (get_value(results, "code", key) for key in ("version", "git_revision"))
    parts = [f"new-llm {version}" if version else "", f"commit {str(revision)[:12]}" if revision else ""]
    text = ", ".join(part for part in parts if part)
    is_dirty = bool(text and get_value(results, "code", "git_dirty"))
    return f"{text}, with changes that were not committed" if is_dirty else text


def _describe_measurement(results: dict[str, Any]) -> str:
    """What was scored, and how, from the first model that was."""
    for _, entry in named_models(results):
        sliding = get_value(entry, "evaluation", "sliding")
        context, stride, tokens, documents = (
            get_finite(sliding, key) for key in ("context", "stride", "num_tokens", "num_documents")
        )
        if tokens is None:
            continue
        window = f", windows of {context:,.0f} tokens moved by {stride:,.0f}" if context and stride else ""
        held = f" of {documents:,.0f} document{'s' if documents != 1 else ''}" if documents else ""
        return f"Scored on {tokens:,.0f} validation tokens{held}{window}."
    return ""


def _list_verdicts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What each verdict means, and the models that got it."""
    verdicts: dict[str, list[str]] = {}
    for name, entry in named_models(results):
        text, span = (get_value(entry, "evaluation", "verdict", key) for key in ("text", "range"))
        if text:
            verdicts.setdefault(f"{text} ({span})" if span else str(text), []).append(name)
    return [(", ".join(names), text) for text, names in verdicts.items()]


def _list_training(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, entry in named_models(results):
        training = get_value(entry, "training")
        if isinstance(training, dict):
            keys = ("epochs", "best_epoch", "steps", "tokens", "seconds")
            stopped = {"True": "early", "False": "at the end"}.get(str(training.get("stopped_early")), tables.MISSING)
            losses = [get_number(line, "loss") for line in get_entries(training, "steps_log")]
            last = losses[-1] if losses else None
            words = {"name": name, "stopped": stopped, "loss": last}
            rows.append({key: get_number(training, key) for key in keys} | words)
    return rows


def _list_layers(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameters and memory of each model's parts."""
    models = []
    for name, entry in named_models(results):
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
            models.append({"name": name, "parts": parts})
    return models


def _list_reversal(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows by kind of fact and by relation: one title, then a line a model."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    relations: dict[str, list[dict[str, Any]]] = {}
    keys = ("forward_perplexity", "backward_perplexity", "forward_accuracy", "backward_accuracy")

    def add(table: dict[str, list[dict[str, Any]]], title: str, name: str, entry: Any) -> None:
        numbers: dict[str, Any] = {key: get_number(entry, key) for key in keys}
        forward, backward = numbers["forward_perplexity"], numbers["backward_perplexity"]
        ratio = forward / backward if forward is not None and backward else None
        pairs = get_number(entry, "num_pairs")
        table.setdefault(title, []).append(numbers | {"name": name, "ratio": ratio, "num_pairs": pairs})

    for name, entry in named_models(results):
        reversal = get_value(entry, "evaluation", "reversal")
        if not isinstance(reversal, dict):
            continue
        add(kinds, "all facts", name, reversal)
        by_kind = reversal.get("by_kind")
        for kind, numbers in by_kind.items() if isinstance(by_kind, dict) else ():
            add(kinds, f"{kind} facts", name, numbers)
        for relation in get_entries(reversal, "per_relation"):
            add(relations, str(relation.get("relation") or "unnamed").replace("_", " "), name, relation)
    return {"kinds": _as_rows(kinds), "relations": _as_rows(relations)}


def _as_rows(table: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{"title": title, "lines": lines} for title, lines in table.items()]


def _list_notes(results: dict[str, Any]) -> list[str]:
    notes = [get_value(results, "notes"), get_value(results, "data", "notes")]
    return [str(note) for group in notes if isinstance(group, list) for note in group]


def _flatten(entry: Any, prefix: str = "") -> list[tuple[str, str]]:
    """(name, value) of a mapping's leaves; the names of nested ones are joined."""
    if not isinstance(entry, dict):
        return []
    leaves: list[tuple[str, str]] = []
    for key, value in entry.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, dict):
            leaves += _flatten(value, f"{name}, ")
        elif isinstance(value, int) and not isinstance(value, bool):
            leaves.append((name, f"{value:,}"))
        elif isinstance(value, float):
            leaves.append((name, tables.format_number(value) if math.isfinite(value) else str(value)))
        elif isinstance(value, list):
            leaves.append((name, ", ".join(str(item) for item in value)))
        elif value is not None and value != "":
            leaves.append((name, str(value)))
    return leaves
