"""Several runs of a study at once, in processes and as jobs."""

import io
import json
import os
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from experiment_cases import crash_one, fail_one, note_process, stop_one, write_study
from rich.console import Console

from new_llm.cli.main import main
from new_llm.config import UserError
from new_llm.config.train import ClusterConfig
from new_llm.experiments.study_jobs import LOGS_FOLDER, Cell, StudyProgress, open_pool
from new_llm.training import TrainingInterrupted

CELLS = [Cell("reference", 0), Cell("no-delta", 0)]


def run(pool, cells=CELLS):
    with closing(pool):
        for cell in cells:
            pool.start(cell)
        return [cell for _ in cells if pool.running for cell in pool.wait()]


def test_each_cell_has_a_process_and_a_log(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert set(run(open_pool(partial(note_process, tmp_path), tmp_path, 2, ClusterConfig()))) == set(CELLS)
    notes = [(tmp_path / cell.name).read_text().split() for cell in CELLS]
    assert len({process for process, _ in notes} | {str(os.getpid())}) == 3
    assert {int(threads) for _, threads in notes} == {max(1, (os.cpu_count() or 1) // 2)}
    assert "OMP_NUM_THREADS" not in os.environ
    assert (tmp_path / LOGS_FOLDER / "no-delta-s0.log").read_text() == "here is no-delta-s0\n"


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (fail_one, UserError, "no-delta-s0: the text is gone; more is in "),
        (stop_one, TrainingInterrupted, "no-delta-s0: interrupted"),
    ],
)
def test_a_cell_that_fails_ends_all_and_is_named(tmp_path, work, error, message):
    with pytest.raises(error, match=message) as raised:
        run(open_pool(partial(work, tmp_path), tmp_path, 2, ClusterConfig()))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("work", "jobs", "executor", "message"),
    [(crash_one, 2, None, "RuntimeError: the GPU is gone"), (fail_one, None, "local", "the text is gone")],
)
def test_what_fails_leaves_the_others(tmp_path, monkeypatch, work, jobs, executor, message):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # for this folder's modules
    pool = open_pool(partial(work, tmp_path), tmp_path, jobs, ClusterConfig(executor=executor))
    assert run(pool) == CELLS[:1]
    assert (tmp_path / LOGS_FOLDER / "reference-s0.log").read_text() == "here is reference-s0\n"
    (line,) = pool.failures
    assert line.startswith(f"no-delta-s0: {message}; more is in ")


@pytest.mark.parametrize(
    ("absent", "cluster", "message"), [(True, "local", "pip install new-llm[cluster]"), (False, "slurm", "slurm")]
)
def test_no_cluster_is_one_line(addresses, tmp_path, monkeypatch, capsys, absent, cluster, message):
    if absent:
        monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setenv("PATH", "")
    assert main(["study", str(write_study(tmp_path / "study.yaml", addresses)), "--cluster", cluster]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("new-llm: --cluster")
    assert message in last


def test_one_view_shows_all_runs_in_60_columns(tmp_path):
    cells = [Cell("reference", 0), Cell("a-variant-whose-name-is-long", 10)]
    progress = StudyProgress(tmp_path, dict.fromkeys(cells), 4, 3, console := Console(width=60, file=io.StringIO()))
    progress.begin(Cell("pythia", 0))
    progress.end(Cell("pythia", 0))
    (model := tmp_path / "reference-s0" / "infini").mkdir(parents=True)
    line = {"event": "train", "epoch": 2, "share": 0.624, "loss": 4.12345}
    (model / "metrics.jsonl").write_text(json.dumps(line) + '\n{"event": "tra')
    console.print(progress.render())
    said, *lines = console.file.getvalue().splitlines()
    assert said.startswith("pythia-s0: done, 2 of 4, about 0.0 s left")
    assert all(len(line) <= 60 for line in lines)
    expected = ["reference-s0 62% epoch 2, loss 4.123", "a-variant-whose-name 0% waiting", "runs done: 2 of 4"]
    assert all(word in shown for shown, words in zip(lines, expected, strict=True) for word in words.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "other", [["--jobs", "2"], ["--jobs", "2", "--cluster", "local"]], ids=["processes", "cluster"]
)
def test_a_study_gives_the_same_however_it_is_run(addresses, tmp_path, monkeypatch, other):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    figures = []
    for number, flags in enumerate(([], other)):
        path = write_study(tmp_path / "study.yaml", addresses, seeds=[0], runs_dir=str(tmp_path / str(number)))
        assert main(["study", str(path), *flags]) == 0
        summary = json.loads(Path(tmp_path / str(number) / "tiny-study/study.json").read_text())
        figures.append({name: entry["figures"] for name, entry in summary["variants"].items()})
    for name, one in figures[0].items():
        for metric, figure in one.items():
            if not metric.endswith((": tokens/s", ": peak memory", ": processor seconds")):
                assert figures[1][name][metric] == figure, (name, metric)
