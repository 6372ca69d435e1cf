"""Metrics to other trackers, and the live view."""

import importlib.util
import io
import threading

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from rich.console import Console

from new_llm.cli.main import main
from new_llm.training.log import MetricsWriter, TrainingProgress, read_metrics
from training_cases import make_trainer


class Recorder(GeneralTracker):
    """A tracker that keeps what it is told."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.config: dict = {}
        self.lines: list[tuple[int, dict]] = []
        self.is_finished = False

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.lines.append((step, values))

    def finish(self):
        self.is_finished = True


def test_a_run_s_metrics_reach_its_tracker(tmp_path, monkeypatch):
    found: list[Recorder] = []

    def accelerate(*, log_with, **options):
        found.extend(Recorder() for _ in log_with)
        return Accelerator(log_with=found[-1:], **options)

    monkeypatch.setattr("new_llm.training.preparation.Accelerator", accelerate)
    trainer = make_trainer(tmp_path, trackers=("mlflow",))
    trainer.settings = {"train": {"learning_rate": 1e-4}}
    trainer.run()
    (recorder,) = found
    assert recorder.is_finished
    assert recorder.config == {"train.learning_rate": 1e-4}
    lines = read_metrics(tmp_path)
    assert [step for step, _ in recorder.lines] == [line["step"] for line in lines]
    for (_, values), line in zip(recorder.lines, lines, strict=True):
        if line["event"] == "train":
            assert values["train/loss"] == line["loss"]
            assert values["gates/layers.0.0"] == line["gates"]["layers.0"][0]
        else:
            assert values["epoch/validation_loss"] == line["validation_loss"]


def test_a_missing_tracker_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    flags = ["--data.source", "sotu", "--train.trackers", "wandb", "--runs-dir", str(tmp_path / "runs")]
    assert main(["experiment", "--name", "x", *flags]) == 2
    error = capsys.readouterr().err
    assert "train.trackers: wandb is not installed: pip install wandb" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_the_live_view_shows_loss_speed_and_memory():
    out = io.StringIO()
    progress = TrainingProgress("infini", Console(file=out, force_terminal=True, width=160), device=torch.device("cpu"))
    progress.begin_epoch(1, 2, 10, 0)
    for step in range(1, 6):
        progress.step(step, 8.0 - step, 1000, 0.5)
    assert progress._bar is not None
    text = str(progress._bar.tasks[0].fields["status"])
    assert "loss" in text
    assert "2,000 tokens/s" in text
    assert "GiB" in text
    progress.end_epoch({"is_best": True, "train_loss": 2.0, "validation_perplexity": 7.4})
    assert "epoch 1/2  training loss 2.000  validation perplexity 7.4 (best so far)" in out.getvalue()


def test_a_disk_that_tensorboard_can_t_write_to_is_an_error_of_the_next_call_and_nothing_else(tmp_path, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    before = threading.excepthook
    metrics = MetricsWriter(tmp_path)

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", fail)
    metrics.write("train", 1, {"loss": 1.0})
    with pytest.raises(OSError, match="No space left"):
        metrics.close()
    assert threading.excepthook == before
    assert told == []
