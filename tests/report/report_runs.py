"""Results as a finished experiment writes them: invented numbers that behave like a real run's."""

import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

# Final loss, and what the model costs: made up, in the proportions of a small CPU run.
SHAPES = {
    "pythia": (4.43, 0, 6_150_000),
    "infini": (4.36, 266_240, 6_152_561),
    "multi_memory": (4.33, 1_064_960, 6_153_000),
    "hierarchical": (4.345, 1_064_960, 6_170_113),
}

SEVERAL = {"num_memories": 4, "num_memory_heads": 4, "gate_init": 0.0}
OPTIONS = {"pythia": {}, "infini": {"num_memory_heads": 1, "gate_init": 0.0}}


def make_model(model_type: str, rng: random.Random) -> dict[str, Any]:
    final, memory_bytes, parameters = SHAPES[model_type]
    steps_log = [
        {"tokens": 4096 * step, "seconds": 0.3 * step, "loss": final - 0.35 + 4.2 * math.exp(-step / 80)}
        | ({"gates": {"layers.0": [0.5 + step / 2700 * (1 + head / 6) for head in range(4)]}} if memory_bytes else {})
        for step in range(10, 481, 10)
    ]
    epochs_log = [
        {
            "tokens": 491_520 * epoch,
            "seconds": 36.0 * epoch,
            "validation_perplexity": math.exp(final + 2.2 * math.exp(-1.6 * (epoch - 1))),
        }
        for epoch in range(1, 5)
    ]
    return {
        "model_type": model_type,
        "options": OPTIONS.get(model_type, SEVERAL),
        "context_tokens": 256 if model_type == "pythia" else 64,
        "num_parameters": {"total": parameters},
        "memory_info": {"total_bytes": memory_bytes},
        "cost": {"state_numbers": 91_904, "flops_per_token": 8_440_000.0},
        "training": {
            "epochs": 4,
            "best_epoch": 3,
            "steps": 480,
            "tokens": 1_966_080,
            "seconds": 144.2,
            "cpu_seconds": 260.0,
            "tokens_per_second": 13_634.0 - memory_bytes / 1000,
            "peak_memory_bytes": 1_483_120_640,
            "stopped_early": True,
            "steps_log": steps_log,
            "epochs_log": epochs_log,
        },
        "gates": {"layers.0": [0.68, 0.71, 0.74, 0.77]} if memory_bytes else {},
        "evaluation": make_evaluation(math.exp(final), rng) | {"memory_usage": make_usage() if memory_bytes else None},
    }


def make_usage() -> dict[str, Any]:
    """Two memories of two heads, written in turn."""
    norms = [[[10.0 * ((s + 2 - m) // 2), 5.0 * ((s + 2 - m) // 2)] for m in range(2)] for s in range(8)]
    return {
        "document": 0,
        "num_segments": 8,
        "segment_length": 64,
        "layers": [{"layer": 0, "kind": "multi_memory", "norms": norms}],
    }


def make_evaluation(perplexity: float, rng: random.Random) -> dict[str, Any]:
    sliding = {
        "protocol": "sliding",
        "perplexity": perplexity,
        "standard_error": perplexity * 0.006,
        "bits_per_byte": math.log(perplexity) / math.log(2) / 4.3,
        "word_perplexity": perplexity**1.35,
        "num_tokens": 104_221,
        "context": 256,
        "stride": 128,
        "documents": make_documents(math.log(perplexity), rng),
        "unigram_perplexity": 649.0,
        "verdict": {"level": "normal", "range": "30–100", "text": "normal for small data"},
    }
    ranges = [
        {"start": a, "end": b, "perplexity": perplexity * (0.93 + 1.6 * math.exp(-a / 18)), "num_tokens": 407 * (b - a)}
        for a, b in pairwise((0, 16, 32, 64, 96, 256))
    ]
    streaming = {"protocol": "streaming", "perplexity": perplexity * 1.08, "context": None, "stride": None}
    return {
        "sliding": sliding,
        "streaming": sliding | streaming,
        "positions": {"seq_length": 256, "ranges": ranges},
        "reversal": make_reversal(rng),
    }


def make_documents(loss: float, rng: random.Random) -> dict[str, list[float]]:
    """What each document cost; models of one run agree on which documents are hard, but for a little."""
    hard = random.Random(1)
    counts = [hard.randint(2000, 6000) for _ in range(22)]
    losses = [loss + hard.gauss(0, 0.1) + rng.gauss(0, 0.01) for _ in counts]
    return {"num_tokens": counts, "total_nll": [n * each for n, each in zip(counts, losses, strict=True)]}


def make_reversal(rng: random.Random) -> dict[str, Any]:
    figures = {
        "forward_perplexity": 14 * (0.9 + rng.random() / 5),
        "backward_perplexity": 640 * (0.9 + rng.random() / 5),
        "forward_accuracy": 0.42 * (0.9 + rng.random() / 5),
        "backward_accuracy": 0.05 * (0.7 + rng.random() / 2),
    }
    figures["ratio"] = figures["forward_perplexity"] / figures["backward_perplexity"]
    figures["gap"] = figures["backward_perplexity"] - figures["forward_perplexity"]
    return figures | {"intervals": {name: [0.9 * value, 1.1 * value] for name, value in figures.items()}}


def make_results(*model_types: str) -> dict[str, Any]:
    rng = random.Random(0)
    return {
        "schema_version": 1,
        "name": "quick-2026-01-31-140502",
        "created": "2026-01-31T14:05:02Z",
        "status": "complete",
        "command": "new-llm experiment --config quick --models " + " ".join(model_types),
        "code": {"version": "0.1.0", "git_revision": "3152522f0a1b4c6d8e9f00112233445566778899"},
        "environment": {"processor": "Example CPU @ 2.50GHz", "device": "cpu", "precision": "fp32"},
        "config": {
            "name": None,
            "models": list(model_types),
            "seed": 0,
            "model": {"hidden_size": 256, "num_hidden_layers": 4, "use_delta_rule": True, "gate_init": 0.0},
            "data": {"source": "sotu", "num_samples": 2000, "seq_length": 256, "segments_per_sample": 4},
            "train": {"num_epochs": 4, "learning_rate": 0.001},
        },
        "data": {
            "source": "sotu",
            "source_fingerprint": "sha256:5d41402abc4b2a76b9719d911017c592ae2b",
            "tokenizer": {"name": "bpe-8192", "fingerprint": "sha256:7d793037a0760186574b0282f2f435e7"},
            "notes": ["asked for 5,000 samples; the training documents hold 2,000"],
        },
        "models": [make_model(name, rng) for name in model_types],
    }


def estimate(value: float, spread: float = 0.1) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread}


def make_long(model: str) -> dict[str, Any]:
    """What `new-llm eval long` writes, without what the report does not read."""

    def entry(start: int, end: int | None, perplexity: float) -> dict[str, Any]:
        ways = {"carried": 0.95, "reset": 1.0, "foreign": 1.01, "quick:pythia, segments of 64": 1.02}
        return {
            "start": start,
            "end": end,
            "perplexity": {way: estimate(perplexity * factor) for way, factor in ways.items()},
            "differences": {
                way: {"relative": estimate(0.95 / ways[way] - 1, 0.01)} for way in ways if way != "carried"
            },
        }

    ranges = [entry(0, 1024, 60.0), entry(1024, 2048, 55.0), entry(2048, None, 50.0)]
    result = {"ranges": ranges, "overall": entry(0, None, 55.0), "num_documents": 3, "confidence": 0.95}
    return {
        "record_version": 1,
        "kind": "long",
        "status": "complete",
        "created": "2026-02-01T09:00:00+00:00",
        "command": f"new-llm eval long --run runs/quick --model {model}",
        "subject": {"model": model},
        "text": {"source": "books/war.txt"},
        "result": result,
    }


def write_run(folder: Path, results: dict[str, Any], *records: dict[str, Any]) -> Path:
    """A run folder with what the report reads of it."""
    (folder / "evaluations").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    for index, record in enumerate(records):
        (folder / "evaluations" / f"{record['kind']}-{index}.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def make_seed(seed: int, factors: dict[str, float]) -> dict[str, Any]:
    """One run of a comparison over seeds: each model's perplexities times a factor."""
    results = make_results(*factors)
    results["config"]["seed"], results["name"] = seed, f"seed-{seed}"
    for entry, factor in zip(results["models"], factors.values(), strict=True):
        for protocol in ("sliding", "streaming"):
            found = entry["evaluation"][protocol]
            found["perplexity"] *= factor
            shifts = [count * math.log(factor) for count in found["documents"]["num_tokens"]]
            totals = zip(found["documents"]["total_nll"], shifts, strict=True)
            found["documents"]["total_nll"] = [total + shift for total, shift in totals]
        for line in entry["training"]["epochs_log"]:
            line["validation_perplexity"] *= factor
    return results
