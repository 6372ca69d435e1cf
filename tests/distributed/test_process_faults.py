"""A fault in the rows of one process is a fault of the step, on all of them."""

import json
from pathlib import Path

import pytest
import torch

from new_llm.processes import ALONE, Processes
from new_llm.training import Trainer, TrainingError
from new_llm.training.log import read_metrics
from training_cases import make_trainer, read_curve, run_processes


def poison(trainer: Trainer, step: int) -> None:
    """Make the last row's loss of a step's batches NaN: it is read by one process alone."""
    forward = trainer._forward
    is_last = trainer.processes.rank + 1 == trainer.processes.count

    def compute(batch) -> torch.Tensor:
        return forward(batch) * (float("nan") if trainer.state.step + 1 == step and is_last else 1.0)

    trainer._forward = compute


def train(processes: Processes, root: Path) -> None:
    for way in ("ddp", "fsdp"):
        for on_nonfinite in ("skip", "stop"):
            folder = root / f"{way}-{on_nonfinite}"
            changes = {"sharding": way, "on_nonfinite": on_nonfinite, "batch_size": 6, "learning_rate": 1e-2}
            trainer = make_trainer(folder, processes=processes, **changes)
            poison(trainer, 3)
            if on_nonfinite == "skip":
                trainer.run()
                continue
            with pytest.raises(TrainingError, match="loss is nan at step 3") as caught:
                trainer.run()
            if processes.is_main:
                (root / f"{way}.json").write_text(json.dumps(str(caught.value).replace(str(root), "")))


@pytest.mark.slow
def test_a_fault_in_one_process_is_skipped_or_stops_all(tmp_path):
    train(ALONE, tmp_path / "one")
    run_processes(2, train, tmp_path / "two")
    for way in ("ddp", "fsdp"):
        expected = read_curve(tmp_path / "one" / f"{way}-skip")
        assert len(expected) > 20
        assert read_curve(tmp_path / "two" / f"{way}-skip") == pytest.approx(expected, rel=1e-4)
        events = [line["event"] for line in read_metrics(tmp_path / "two" / f"{way}-skip")]
        assert events == [line["event"] for line in read_metrics(tmp_path / "one" / f"{way}-skip")]
        assert (tmp_path / "one" / f"{way}.json").read_text() == (tmp_path / "two" / f"{way}.json").read_text()
