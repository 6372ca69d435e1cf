"""Training from the command line: `new-llm experiment`, `experiment-selective` and `train-adapter`."""

import json
import runpy
import signal
import subprocess
import sys

import pytest
import torch
import yaml

from new_llm.cli.experiment import Experiment, ExperimentSelective, TrainAdapter
from new_llm.cli.main import main
from new_llm.config import UserError
from new_llm.experiments.config import AdapterTrainingConfig
from new_llm.models import load_model
from new_llm.training.log import read_metrics
from tiny import COMMAND, ENVIRONMENT, ROOT, make_settings, wait_until


def test_a_killed_run_resumes_to_the_curve_of_an_uninterrupted_one(tmp_path, untrained_run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(make_settings(untrained_run / "0.txt", tmp_path / "runs")))
    flags = ["--config", "tiny.yaml", "--models", "infini", "--eval.measures", "sliding", "--train.patience", "0"]
    flags += ["--train.log-every-steps", "1", "--train.checkpoint-every-steps", "4"]

    def read_curve(name: str) -> list[tuple[object, ...]]:
        lines = read_metrics(tmp_path / "runs" / name / "infini")
        return [(line["event"], line["step"], line.get("loss"), line.get("validation_loss")) for line in lines]

    assert main(["experiment", *flags, "--name", "whole"]) == 0
    for sent, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)):
        name = sent.name
        command = [*COMMAND, "experiment", *flags, "--name", name]
        killed = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        metrics = tmp_path / "runs" / name / "infini" / "metrics.jsonl"
        wait_until(lambda metrics=metrics: metrics.exists() and metrics.read_text().count("\n") >= 7, killed)
        killed.send_signal(sent)
        _, err = killed.communicate()
        assert killed.returncode == code, err
        assert read_curve(name) != read_curve("whole")
        assert main(["experiment", "--name", name, "--resume"]) == 0
        assert read_curve(name) == read_curve("whole")
        weights = [load_model(tmp_path / "runs" / one / "infini" / "best").state_dict() for one in ("whole", name)]
        assert all(map(torch.equal, *(one.values() for one in weights)))


@pytest.mark.parametrize(("word", "value"), [("true", True), ("False", False), ("none", None)])
def test_words_of_a_flag_are_those_of_yaml_or_python(word, value):
    flags = ["--models", "pythia", "--data.source", "sotu", "--train.compile", word]
    assert Experiment.read(flags, "new-llm experiment").settings.train.compile is value


@pytest.mark.parametrize("flags", ["--skip-interval 2", "--models baseline selective"])
def test_the_selective_experiment_compares_both_baselines(flags):
    config = ExperimentSelective.read(flags.split(), "new-llm experiment-selective").settings
    assert [str(kind) for kind in config.models] == ["pythia", "deep_pythia", "selective"]
    assert config.model.skip_interval == (2 if "2" in flags else None)


# `new-llm train-adapter` as a user types it


def read(*arguments: str) -> AdapterTrainingConfig:
    return TrainAdapter.read(list(arguments), "new-llm train-adapter").settings


def test_the_script_trains_an_adapter_from_a_run_which_is_resumed_by_its_name(
    trained_run, addresses, tmp_path, monkeypatch, capsys
):
    base = trained_run["folder"]
    plain = [
        *("--base", base, "--data.source", str(addresses), "--device", "cpu", "--wikitext", "None", "--name", "one"),
        *("--seq-length", "32", "--segments-per-sample", "2", "--data.validation-fraction", "0.25"),
        *("--num-docs", "2", "--epochs", "1", "--batch-size", "2", "--eval.max-tokens", "200"),
    ]
    script = ROOT / "scripts" / "train_parallel_adapter.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(script.parent)
    flags = [*plain, "--initial-alpha", "0.25", "--layers", "0", "1"]
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
    assert main(["train-adapter", *plain]) == 2  # a run of this name exists


def test_a_file_of_settings_is_begun_from(tmp_path):
    path = tmp_path / "adapter.yaml"
    path.write_text("base: runs/base\nadapter: {layers: [1], initial_alpha: 1e-1}\ntrain: {num_epochs: 3}\n")
    training = read("--config", str(path), "--epochs", "4")
    assert (training.base, training.adapter.layers, training.adapter.initial_alpha) == ("runs/base", (1,), 0.1)
    assert (training.train.num_epochs, training.train.batch_size, training.data.seq_length) == (4, 4, 2048)
    path.write_text("models: [infini]\n")
    with pytest.raises(UserError, match="models"):
        read("--config", str(path))
