import json
from pathlib import Path
from typing import Any

import pytest

from new_llm.cli.main import main


def write_run(folder: Path, perplexity: float, seed: int = 0, model: str = "infini") -> Path:
    """The least of a run that a report can compare."""
    sliding = {
        "perplexity": perplexity,
        "standard_error": None,
        "word_perplexity": None,
        "bits_per_byte": None,
        "unigram_perplexity": 600.0,
        "verdict": {"level": "normal", "text": "normal"},
    }
    entry: dict[str, Any] = {"model_type": model, "evaluation": {"sliding": sliding}}
    results = {"schema_version": 1, "name": folder.name, "status": "complete", "config": {"seed": seed}}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results | {"models": [entry]}))
    return folder


def test_a_run_s_report_is_written_again_with_evaluations_made_since(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = write_run(tmp_path / "runs" / "a", 80.0)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    first = (run / "report.html").read_text()
    record = {
        "record_version": 1,
        "kind": "perplexity",
        "created": "2026-02-01T09:00:00+00:00",
        "subject": {"model": "infini"},
        "text": {"source": "a/book.txt"},
        "result": {"perplexity": 123.456, "protocol": "streaming", "verdict": {"text": "normal"}},
    }
    (run / "evaluations").mkdir()
    (run / "evaluations" / "perplexity-1.json").write_text(json.dumps(record))
    assert main(["report", str(run / "results.json")]) == 0
    second = (run / "report.html").read_text()
    assert "streaming perplexity 123.46: normal" not in first
    assert "streaming perplexity 123.46: normal" in second
    assert "book.txt" in second


def test_runs_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / f"i{seed}", 80.0 + seed, seed) for seed in range(2)]
    runs += [write_run(tmp_path / f"p{seed}", 90.0 + seed, seed, "pythia") for seed in range(2)]
    assert main(["report", *map(str, runs), "--out", "new/all.html"]) == 0
    text = (tmp_path / "new" / "all.html").read_text()
    assert "infini has the lowest sliding-window perplexity: 80.50, 11.0% below pythia (90.50)." in text
    assert "2 seeds, paired by seed" in text
    assert main(["report", *map(str, runs)]) == 0
    assert (tmp_path / "report.html").read_text() == text


def test_measures_of_one_s_own_are_named_by_the_user_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run = write_run(tmp_path / "runs" / "a", 80.0)
    results = json.loads((run / "results.json").read_text())
    results["config"]["eval"] = {"measures": ["sliding", "stranger:Mine"]}
    results["models"][0]["evaluation"]["mine"] = {"value": 3.25}
    (run / "results.json").write_text(json.dumps(results))
    (tmp_path / "stranger.py").write_text(
        "from new_llm.evaluation import Measure\n"
        "open('ran', 'w').close()\n"
        "class Mine(Measure):\n"
        "    name, title = 'mine', 'my measure'\n"
        "    def run(self, subject): return None\n"
        "    def describe(self, result): return f'found {result[\"value\"]}'\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run)]) == 0
    assert not Path("ran").exists()
    assert "Figures of stranger:Mine are left out" in capsys.readouterr().err
    assert main(["report", str(run), "--measures", "stranger:Mine"]) == 0
    assert Path("ran").exists()
    assert "Figures of" not in capsys.readouterr().err
    assert "found 3.25" in (run / "report.html").read_text()
