"""Windows, documents and sentences shared among processes: the numbers of one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from new_llm.config import EvalConfig
from new_llm.data.reversal_pairs import get_reversal_pairs
from new_llm.evaluation import (
    Positions,
    Subject,
    evaluate_independent,
    evaluate_reversal_curse,
    evaluate_rolling,
    evaluate_sliding_window,
    evaluate_streaming,
)
from new_llm.models import create_model
from new_llm.processes import ALONE, Processes
from training_cases import VOCAB, make_config, make_split, run_processes

TIMING = {"seconds", "tokens_per_second"}


def measure_all(processes: Processes) -> dict[str, Any]:
    torch.manual_seed(0)
    model = create_model("infini", make_config().model.shape(VOCAB), segment_length=8).eval()
    split, shared = make_split(), {"batch_size": 3, "processes": processes}
    pairs = get_reversal_pairs()[:6]
    words = sorted({word for pair in pairs for text in (pair.forward, pair.backward) for word in text.split()})
    tokenizer = Tokenizer(WordLevel({word: index % VOCAB for index, word in enumerate(["?", *words])}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    results = {
        "sliding": evaluate_sliding_window(model, split, context=16, stride=4, **shared),
        "rolling": evaluate_rolling(model, split, context=16, prefix_token=0, **shared),
        "independent": evaluate_independent(model, split, max_tokens=300, **shared),
        "streaming": evaluate_streaming(model, split, **shared),
        # One document: all processes but one have nothing to read.
        "one document": evaluate_streaming(model, split, max_tokens=100, **shared),
        "one window": evaluate_sliding_window(model, split, context=64, stride=64, max_tokens=50, **shared),
    }
    found: dict[str, Any] = {name: result.to_dict() for name, result in results.items()}
    settings = EvalConfig(position_edges=(0, 2, 8), batch_size=3)
    ranges = Positions().run(Subject(model, tokenizer, split, settings, seq_length=16, processes=processes))["ranges"]
    found["positions"] = {str(entry["start"]): entry for entry in ranges}
    found["reversal"] = evaluate_reversal_curse(model, tokenizer, pairs, num_resamples=20, **shared).to_dict()
    return found


def write_measured(processes: Processes, folder: Path) -> None:
    (folder / f"{processes.rank}.json").write_text(json.dumps(measure_all(processes)))


def check_equal(expected: Any, found: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert expected.keys() == found.keys(), where
        for key in expected.keys() - TIMING:
            check_equal(expected[key], found[key], f"{where} {key}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9), where
    else:
        assert found == expected, where


def test_every_process_has_the_numbers_of_one(tmp_path):
    expected = json.loads(json.dumps(measure_all(ALONE)))
    run_processes(3, write_measured, tmp_path)
    for rank in range(3):
        check_equal(expected, json.loads((tmp_path / f"{rank}.json").read_text()), f"process {rank}:")
