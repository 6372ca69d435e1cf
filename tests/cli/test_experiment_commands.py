"""Commands that train an experiment or an adapter, and `runs` and `report` of what is there."""

import csv
import json
import runpy
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml

from new_llm.cli.experiment import Experiment, ExperimentSelective, TrainAdapter
from new_llm.cli.main import main
from new_llm.config import UserError
from new_llm.experiments import ExperimentConfig
from new_llm.models import load_model
from tiny import COMMAND, ENVIRONMENT, ROOT, make_settings, refuse, wait_until
from training_cases import read_curve


def test_a_killed_run_resumes_to_the_curve_of_an_uninterrupted_one(tmp_path, untrained_run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(make_settings(untrained_run / "0.txt", tmp_path / "runs")))
    flags = ["--config", "tiny.yaml", "--models", "infini", "--eval.measures", "sliding", "--train.patience", "0"]
    flags += ["--train.log-every-steps", "1", "--train.checkpoint-every-steps", "4"]

    infini = {name: tmp_path / "runs" / name / "infini" for name in ("whole", "SIGKILL", "SIGTERM")}
    assert main(["experiment", *flags, "--name", "whole"]) == 0
    for sent, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)):
        name = sent.name
        command = [*COMMAND, "experiment", *flags, "--name", name]
        killed = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        metrics = infini[name] / "metrics.jsonl"
        wait_until(lambda metrics=metrics: metrics.exists() and metrics.read_text().count("\n") >= 7, killed)
        killed.send_signal(sent)
        _, err = killed.communicate()
        assert killed.returncode == code, err
        assert read_curve(infini[name]) != read_curve(infini["whole"])
        assert main(["experiment", "--name", name, "--resume"]) == 0
        assert read_curve(infini[name]) == read_curve(infini["whole"])
        weights = [load_model(infini[one] / "best").state_dict() for one in ("whole", name)]
        assert all(map(torch.equal, *(one.values() for one in weights)))


@pytest.mark.parametrize("name", ["ünï -(1).yaml", "-x.yaml"])
def test_flags_override_a_configuration_of_any_name(name, tmp_path):
    """Words are those of YAML or Python, and a list without values empties the one of the file."""

    def read_settings(*flags: str) -> ExperimentConfig:
        return Experiment.read([f"--config={tmp_path / name}", *flags], "new-llm experiment").settings

    (tmp_path / name).write_text("models: [infini]\nseed: 3\ndata: {order: shuffled, segment_curriculum: [1, 4]}\n")
    for word, value in (("true", True), ("False", False), ("none", None)):
        assert read_settings("--train.compile", word).train.compile is value
    config = read_settings("--data.segment-curriculum")
    assert (config.models, config.seed, config.data.segment_curriculum) == (("infini",), 3, ())
    assert config.name


@pytest.mark.parametrize(
    "text",
    [
        "that comes with New-LLM, e.g. quick; other flags override its settings. None:",
        "Width D of the residual stream. Default: 512, or the size's.  ",
        "The model section of an experiment: one shape",
        "Samples per batch (rows), over all processes together. (default: 8)",
    ],
)
def test_a_help_text_is_one_paragraph_that_names_a_default_once(text, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main(["experiment", "--help"])
    out = capsys.readouterr().out
    assert text in out
    assert "(default: )" not in out


@pytest.mark.parametrize("flags", ["--skip-interval 2", "--models baseline selective"])
def test_the_selective_experiment_compares_both_baselines(flags):
    config = ExperimentSelective.read(flags.split(), "new-llm experiment-selective").settings
    assert [str(kind) for kind in config.models] == ["pythia", "deep_pythia", "selective"]
    assert config.model.skip_interval == (2 if "2" in flags else None)


# `new-llm train-adapter` as a user types it


def read(*arguments: str):
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


# `new-llm runs` and `report`: what is there, how far it got, what is broken, and pages of it


def test_the_table_and_one_run(trained_run, tmp_path, capsys, monkeypatch):
    """A finished run, one whose second model is being trained, a broken one, and no run."""
    runs = tmp_path / "runs"
    shutil.copytree(trained_run["folder"], runs / "second")
    unwritten = shutil.ignore_patterns("result.json", "results.json", "report.html", "infini")
    shutil.copytree(trained_run["folder"], runs / "study" / "first", ignore=unwritten)
    (runs / "study" / "first" / "environment.json").write_text('{"created": "2026-02-01T10:00:00+00:00"}')
    for path in ("second/evaluations/recall-infini-1.json", "broken/config.yaml", "no-run/notes"):
        (runs / path).parent.mkdir()
        (runs / path).write_text("model: [" if "broken" in path else "{}")
    monkeypatch.setenv("COLUMNS", "200")  # no path is too long for its line
    infini, pythia = trained_run["models"]
    best = min(line["validation_perplexity"] for line in pythia["training"]["epochs_log"])
    sliding = [entry["evaluation"]["sliding"]["perplexity"] for entry in (infini, pythia)]
    assert main(["runs", "--runs-dir", str(runs)]) == 0
    out = capsys.readouterr().out
    shown = [f"{value:.2f}" for value in (best, *sliding)]
    for text in ("second", "complete", *shown, "unreadable: broken", "3 runs in"):
        assert text in out
    assert f"step {pythia['training']['steps']}" in out
    assert main(["runs", "--format", "json", "--runs-dir", str(runs)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row.get("name") for row in rows] == [None, *("infini", "pythia") * 2]
    assert [row["run_status"] for row in rows[:4:2]] == ["unreadable", "unfinished"]
    assert [row["perplexity"] for row in rows[1:]] == [None, best, *sliding]
    assert rows[3]["checkpoints"][0].startswith("step-")
    assert main(["runs", "--format", "csv", "--runs-dir", str(runs)]) == 0
    table = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["perplexity"] for row in table] == ["", "", *map(str, (best, *sliding))]
    assert (table[3]["greatest_gate"], table[0]["greatest_gate"]) == (str(max(infini["gates"]["layers.0"])), "")
    assert main(["runs", "show", "second", "--runs-dir", str(runs)]) == 0
    out = capsys.readouterr().out
    for text in ("second: complete", "train.num_epochs 30 → 2", "recall-infini-1.json", "report.html", "step-00"):
        assert text in out
    assert main(["runs", "show", str(runs / "study" / "first")]) == 0
    assert "--name first --resume" in capsys.readouterr().out
    assert "config.yaml: not valid YAML" in refuse(capsys, "runs", "show", "broken", "--runs-dir", runs)


def write_run(folder, perplexity: float, seed: int = 0, model: str = "infini"):
    nothing = dict.fromkeys(("standard_error", "word_perplexity", "bits_per_byte"))
    verdict = {"level": "normal", "text": "normal"}
    sliding = nothing | {"perplexity": perplexity, "unigram_perplexity": 600.0, "verdict": verdict}
    entry = {"model_type": model, "evaluation": {"sliding": sliding}}
    results = {"schema_version": 1, "name": folder.name, "status": "complete", "config": {"seed": seed}}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results | {"models": [entry]}))
    return folder


def test_a_run_s_report_is_written_again_with_new_evaluations_and_runs_are_compared(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "runs" / "a", 80.0)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    first = (run / "report.html").read_text()
    record = {"record_version": 1, "kind": "perplexity", "created": "2026-02-01T09:00:00+00:00", "command": ""}
    record |= {"status": "complete", "subject": {"model": "infini"}, "text": {"source": "a/book.txt"}}
    record["result"] = {"perplexity": 123.456, "protocol": "streaming", "verdict": {"text": "normal"}}
    (run / "evaluations").mkdir()
    (run / "evaluations" / "perplexity-1.json").write_text(json.dumps(record))
    assert main(["report", str(run / "results.json")]) == 0
    second = (run / "report.html").read_text()
    assert "streaming perplexity 123.46: normal" not in first
    assert "streaming perplexity 123.46: normal" in second
    assert "book.txt" in second

    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / f"i{seed}", 80.0 + seed, seed) for seed in range(2)]
    runs += [write_run(tmp_path / f"p{seed}", 90.0 + seed, seed, "pythia") for seed in range(2)]
    assert main(["report", *map(str, runs), "--out", "new/all.html"]) == 0
    text = (tmp_path / "new" / "all.html").read_text()
    assert "infini has the lowest sliding-window perplexity: 80.50, 11.0% below pythia (90.50)." in text
    assert "Figures are means over 2 seeds per model." in text
    assert main(["report", *map(str, runs)]) == 0
    assert (tmp_path / "report.html").read_text() == text
