"""`new-llm train-adapter` as a user types it."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from new_llm.cli.main import main
from new_llm.cli.train_adapter import TrainAdapter
from new_llm.config import UserError
from new_llm.experiments.config import AdapterTrainingConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def base(trained_run: dict[str, Any]) -> str:
    return trained_run["folder"]


def read(*arguments: str) -> AdapterTrainingConfig:
    return TrainAdapter.read(list(arguments), "new-llm train-adapter").settings


def list_flags(base: str, addresses: Path) -> list[str]:
    return [
        *("--base", base, "--data.source", str(addresses), "--device", "cpu", "--wikitext", "None", "--name", "one"),
        *("--seq-length", "32", "--segments-per-sample", "2", "--data.validation-fraction", "0.25"),
        *("--num-docs", "2", "--epochs", "1", "--batch-size", "2", "--eval.max-tokens", "200"),
    ]


def test_the_script_trains_an_adapter_from_a_run_which_is_resumed_by_its_name(
    base: str, addresses: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    script = ROOT / "scripts" / "train_parallel_adapter.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(script.parent)
    flags = [*list_flags(base, addresses), "--initial-alpha", "0.25", "--layers", "0", "1"]
    monkeypatch.setattr(sys, "argv", [str(script), *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "long documents with the memory carried" in shown
    assert "α" in shown
    assert (tmp_path / "parallel_adapter.pt").is_file()
    results = json.loads((tmp_path / "runs" / "one" / "results.json").read_text())
    assert results["command"].startswith("python3 scripts/train_parallel_adapter.py --base")
    assert set(results["evaluation"]["held_out"]["overall"]["perplexity"]) == {"base", "carried", "reset", "foreign"}
    settings = read("--name", "one", "--resume")
    assert (settings.base, settings.adapter.layers, settings.adapter.initial_alpha) == (base, (0, 1), 0.25)
    assert main(["train-adapter", "--name", "one", "--resume"]) == 0
    assert main(["train-adapter", *list_flags(base, addresses)]) == 2  # a run of this name exists


def test_a_file_of_settings_is_begun_from(tmp_path: Path) -> None:
    path = tmp_path / "adapter.yaml"
    path.write_text("base: runs/base\nadapter: {layers: [1], initial_alpha: 1e-1}\ntrain: {num_epochs: 3}\n")
    training = read("--config", str(path), "--epochs", "4")
    assert (training.base, training.adapter.layers, training.adapter.initial_alpha) == ("runs/base", (1,), 0.1)
    assert (training.train.num_epochs, training.train.batch_size, training.data.seq_length) == (4, 4, 2048)
    path.write_text("models: [infini]\n")
    with pytest.raises(UserError, match="models"):
        read("--config", str(path))
