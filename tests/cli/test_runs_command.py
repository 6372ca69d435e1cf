"""`new-llm runs`: what is there, how far it got, what is broken."""

import csv
import json
from pathlib import Path

import pytest

from new_llm.cli.main import main
from new_llm.experiments.config import ExperimentConfig
from new_llm.experiments.run_folder import describe_run, list_runs
from tiny import refuse


def make_run(folder: Path, *, begun: str, is_done: bool) -> None:
    folder.mkdir(parents=True)
    config = ExperimentConfig(name=folder.name, models=("pythia", "infini"), runs_dir=str(folder.parent), num_epochs=4)
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "environment.json").write_text(json.dumps({"created": begun}))
    lines = [
        {"event": "train", "step": 1, "tokens": 4000, "loss": 7.0, "gates": {"layers.0": [0.4, 0.7]}},
        {"event": "epoch", "step": 2, "tokens": 8000, "validation_perplexity": 90.5},
        {"event": "epoch", "step": 4, "tokens": 16000, "validation_perplexity": 95.0},
    ]
    for name in ("pythia", "infini") if is_done else ("pythia",):
        (folder / name / "checkpoints" / "step-000000004-epoch-0002").mkdir(parents=True)
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if is_done:
            result = {"evaluation": {"sliding": {"perplexity": 81.25}}, "gates": {"layers.0": [0.3, 0.9]}}
            (folder / name / "result.json").write_text(json.dumps(result))
    if is_done:
        (folder / "results.json").write_text(json.dumps({"status": "complete"}))
        (folder / "report.html").write_text("")
        (folder / "evaluations").mkdir()
        (folder / "evaluations" / "recall-infini-1.json").write_text("{}")


@pytest.fixture
def runs(tmp_path) -> Path:
    folder = tmp_path / "runs"
    make_run(folder / "second", begun="2026-02-02T10:00:00+00:00", is_done=True)
    make_run(folder / "study" / "first", begun="2026-02-01T10:00:00+00:00", is_done=False)
    (folder / "broken").mkdir()
    (folder / "broken" / "config.yaml").write_text("model: [")
    (folder / "no-run").mkdir()
    return folder


def test_runs_are_listed_by_their_beginning(runs):
    found = list_runs(runs)
    assert [run.folder.name for run in found] == ["broken", "first", "second"]
    assert [run.status for run in found] == ["unreadable", "unfinished", "complete"]
    first, second = found[1:]
    pythia, infini = first.models
    assert (pythia.status, pythia.epochs, pythia.num_epochs, pythia.tokens) == ("training", 2, 4, 16000)
    assert pythia.perplexity == 90.5
    assert pythia.gates == (0.4, 0.7)
    assert (infini.status, infini.perplexity, infini.gates) == ("waiting", None, None)
    assert second.models[1].perplexity == 81.25
    assert second.models[1].gates == (0.3, 0.9)
    assert second.evaluations == ("recall-infini-1.json",)


def test_the_table_and_one_run(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no path is too long for its line
    assert main(["runs", "--runs-dir", str(runs)]) == 0
    out = capsys.readouterr().out
    for text in ("second", "complete", "81.25", "90.50", "16.0k", "unreadable: broken", "3 runs in"):
        assert text in out
    assert "step 4" in out
    assert main(["runs", "--format", "json", "--runs-dir", str(runs)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row.get("name") for row in rows] == [None, *("pythia", "infini") * 2]
    assert (rows[0]["run_status"], rows[1]["perplexity"]) == ("unreadable", 90.5)
    assert rows[3]["checkpoints"] == ["step-000000004-epoch-0002"]
    assert main(["runs", "--format", "csv", "--runs-dir", str(runs)]) == 0
    table = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["perplexity"] for row in table] == ["", "90.5", "", "81.25", "81.25"]
    assert (table[1]["greatest_gate"], table[0]["greatest_gate"]) == ("0.7", "")
    assert main(["runs", "show", "second", "--runs-dir", str(runs)]) == 0
    out = capsys.readouterr().out
    for text in (
        "second: complete",
        "train.num_epochs 30 → 4",
        "recall-infini-1.json",
        "report.html",
        "step-00",
    ):
        assert text in out
    assert main(["runs", "show", str(runs / "study" / "first")]) == 0
    assert "--name first --resume" in capsys.readouterr().out


def test_a_broken_run_is_one_line(runs, capsys):
    refuse(capsys, "runs", "show", "broken", "--runs-dir", runs)
    assert describe_run(runs / "broken").fault is not None
