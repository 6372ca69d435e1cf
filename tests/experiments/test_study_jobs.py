"""Several runs of a study at once, in processes."""

import json
import os
from pathlib import Path

import pytest
from experiment_cases import fail_one, note_process, stop_one, write_study
from rich.console import Console

from new_llm.cli.main import main
from new_llm.config import UserError
from new_llm.config.loading import read_settings
from new_llm.experiments.config import StudyConfig
from new_llm.experiments.study import LOGS_FOLDER, Cell, run_in_processes
from new_llm.training import TrainingInterrupted

CELLS = [Cell("reference", 0), Cell("no-delta", 0)]


@pytest.fixture
def study(addresses, tmp_path) -> StudyConfig:
    return read_settings(write_study(tmp_path / "study.yaml", addresses), StudyConfig)


def test_each_cell_has_a_process_and_a_log(study, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run_in_processes(note_process, study, CELLS, 2, Console(stderr=True))
    notes = [(study.folder / cell.name).read_text().split() for cell in CELLS]
    assert len({process for process, _ in notes} | {str(os.getpid())}) == 3
    assert {int(threads) for _, threads in notes} == {max(1, (os.cpu_count() or 1) // 2)}
    assert "OMP_NUM_THREADS" not in os.environ
    assert (study.folder / LOGS_FOLDER / "no-delta-s0.log").read_text() == "here is no-delta-s0\n"


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (fail_one, UserError, "no-delta-s0: the text is gone; more is in "),
        (stop_one, TrainingInterrupted, "no-delta-s0: interrupted"),
    ],
)
def test_a_cell_that_fails_ends_all_and_is_named(study, work, error, message):
    with pytest.raises(error, match=message) as raised:
        run_in_processes(work, study, CELLS, 2, Console(stderr=True))
    assert "\n" not in str(raised.value)


def test_no_jobs_are_refused(addresses, tmp_path, capsys):
    assert main(["study", str(write_study(tmp_path / "study.yaml", addresses)), "--jobs", "0"]) == 2
    assert capsys.readouterr().err == "new-llm: --jobs: 0; 1 is the least\n"


@pytest.mark.slow
def test_a_study_in_processes_gives_what_it_gives_in_one(addresses, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    figures = []
    for jobs in ("1", "2"):
        path = write_study(tmp_path / "study.yaml", addresses, seeds=[0], runs_dir=str(tmp_path / f"jobs-{jobs}"))
        assert main(["study", str(path), "--jobs", jobs]) == 0
        summary = json.loads(Path(tmp_path / f"jobs-{jobs}/tiny-study/study.json").read_text())
        figures.append({name: entry["figures"] for name, entry in summary["variants"].items()})
    for name, one in figures[0].items():
        for metric, figure in one.items():
            if not metric.endswith((": tokens/s", ": peak memory")):
                assert figures[1][name][metric] == figure, (name, metric)
