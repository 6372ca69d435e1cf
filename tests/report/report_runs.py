"""Runs as the report reads them, made of a finished one's results."""

import copy
import json
import math
from pathlib import Path
from typing import Any

MODELS = ("pythia", "infini", "multi_memory", "hierarchical")


def pick(results: dict[str, Any], *models: str) -> dict[str, Any]:
    """A copy with some of the models."""
    results = copy.deepcopy(results)
    by_name = {entry["model_type"]: entry for entry in results["models"]}
    return results | {"models": [by_name[name] for name in models]}


def make_seed(results: dict[str, Any], seed: int, factors: dict[str, float]) -> dict[str, Any]:
    """One run of a comparison over seeds: each model's perplexities times a factor."""
    results = pick(results, *factors)
    results["config"]["seed"], results["name"] = seed, f"seed-{seed}"
    for entry, factor in zip(results["models"], factors.values(), strict=True):
        for protocol in ("sliding", "streaming"):
            found = entry["evaluation"][protocol]
            found["perplexity"] *= factor
            totals = zip(found["documents"]["total_nll"], found["documents"]["num_tokens"], strict=True)
            found["documents"]["total_nll"] = [total + count * math.log(factor) for total, count in totals]
    return results


def make_record(results: dict[str, Any], model: str) -> dict[str, Any]:
    """What `new-llm eval long` writes of a model."""
    (entry,) = pick(results, model)["models"]
    return {
        "record_version": 1,
        "kind": "long",
        "status": "complete",
        "created": "2026-02-01T09:00:00+00:00",
        "command": f"new-llm eval long --run runs/four --model {model}",
        "subject": {"model": model},
        "text": {"source": "books/war.txt"},
        "result": entry["evaluation"]["long"],
    }


def set_at(entry: Any, path: tuple[Any, ...], value: Any) -> None:
    """Put a value at the end of a path of keys and places."""
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value


def write_run(folder: Path, results: dict[str, Any], *records: dict[str, Any]) -> Path:
    """A run folder with what the report reads of it."""
    (folder / "evaluations").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    for index, record in enumerate(records):
        (folder / "evaluations" / f"{record['kind']}-{index}.json").write_text(json.dumps(record), encoding="utf-8")
    return folder
