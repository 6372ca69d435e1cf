"""`new-llm runs` and `report`: what is there, how far it got, what is broken, and pages of it."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from new_llm.cli.main import main
from tiny import refuse


@pytest.fixture
def runs(trained_run, tmp_path) -> Path:
    """A finished run, one whose second model is being trained, a broken one, and no run."""
    folder = tmp_path / "runs"
    shutil.copytree(trained_run["folder"], folder / "second")
    unwritten = shutil.ignore_patterns("result.json", "results.json", "report.html", "infini")
    shutil.copytree(trained_run["folder"], folder / "study" / "first", ignore=unwritten)
    (folder / "study" / "first" / "environment.json").write_text('{"created": "2026-02-01T10:00:00+00:00"}')
    for path in ("second/evaluations/recall-infini-1.json", "broken/config.yaml", "no-run/notes"):
        (folder / path).parent.mkdir()
        (folder / path).write_text("model: [" if "broken" in path else "{}")
    return folder


def test_the_table_and_one_run(runs, trained_run, capsys, monkeypatch):
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


def test_a_broken_run_is_one_line(runs, capsys):
    assert "config.yaml: not valid YAML" in refuse(capsys, "runs", "show", "broken", "--runs-dir", runs)


def write_run(folder: Path, perplexity: float, seed: int = 0, model: str = "infini") -> Path:
    nothing = dict.fromkeys(("standard_error", "word_perplexity", "bits_per_byte"))
    verdict = {"level": "normal", "text": "normal"}
    sliding = nothing | {"perplexity": perplexity, "unigram_perplexity": 600.0, "verdict": verdict}
    entry = {"model_type": model, "evaluation": {"sliding": sliding}}
    results = {"schema_version": 1, "name": folder.name, "status": "complete", "config": {"seed": seed}}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results | {"models": [entry]}))
    return folder


def test_a_run_s_report_is_written_again_with_evaluations_made_since(tmp_path, capsys):
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


def test_runs_are_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / f"i{seed}", 80.0 + seed, seed) for seed in range(2)]
    runs += [write_run(tmp_path / f"p{seed}", 90.0 + seed, seed, "pythia") for seed in range(2)]
    assert main(["report", *map(str, runs), "--out", "new/all.html"]) == 0
    text = (tmp_path / "new" / "all.html").read_text()
    assert "infini has the lowest sliding-window perplexity: 80.50, 11.0% below pythia (90.50)." in text
    assert "Figures are means over 2 seeds per model." in text
    assert main(["report", *map(str, runs)]) == 0
    assert (tmp_path / "report.html").read_text() == text
