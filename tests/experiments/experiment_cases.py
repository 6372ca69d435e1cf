"""Tiny studies, and what a study's processes do in tests, in a module that a fresh process can import."""

import os
import signal
from pathlib import Path

import yaml

from new_llm.experiments.study_jobs import Cell
from tiny import make_settings


def write_study(path: Path, addresses: Path, **changes: object) -> Path:
    base = make_settings(addresses, path.parent)
    del base["runs_dir"]
    base["train"] |= {"num_epochs": 1}
    base["data"] |= {"num_samples": 16, "seq_length": 128}  # segments that hold a question of recall
    values = {
        "name": "tiny-study",
        "question": "Does the memory help?",
        "cpu_minutes": 1,
        "base": base | {"models": ["infini"]},
        "variants": {
            "reference": {},
            "no-delta": {"model": {"use_delta_rule": False}},
            "pythia": {"models": ["pythia"], "eval": {"measures": ["sliding", "streaming", "reversal"]}},
            "whole": {"models": ["pythia"], "data": {"segments_per_sample": 1}},
        },
        "seeds": [0, 1],
        "baselines": ["pythia"],
        "window_baselines": ["whole"],
        "long_documents": {"min_tokens": 64, "edges": [0, 128]},
        "caches": {"sizes": [20], "ngram_orders": [2], "thetas": [8.0]},
        "runs_dir": str(path.parent / "runs"),
    }
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return path


def note_process(folder: Path, cell: Cell) -> None:
    print(f"here is {cell.name}")
    (folder / cell.name).write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}")


def fail_one(error: Exception, cell: Cell) -> None:
    if cell.variant == "no-delta":
        raise error
    print(f"here is {cell.name}")


def stop_one(cell: Cell) -> None:
    if cell.variant == "no-delta":
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
