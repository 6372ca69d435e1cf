"""One process, two with all weights (DDP) and two with a share of them (FSDP): the same curve."""

from pathlib import Path
from typing import Any

import pytest
import torch

from new_llm.models import load_model
from new_llm.processes import ALONE, Processes
from new_llm.training import TrainingInterrupted
from new_llm.training.checkpoint import BEST_FOLDER, list_checkpoints, read_checkpoint
from training_cases import make_trainer, read_curve, run_processes, stop_at

WAYS = ("ddp", "fsdp")
KINDS = ("pythia", "infini", "multi_memory", "hierarchical", "selective", "token_memory")
TOLERANCE = 1e-4


ROWS = {"batch_size": 6, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}


def train(processes: Processes, folder: Path, kind: str, options: dict[str, Any], changes: dict[str, Any]) -> None:
    make_trainer(folder, kind, processes=processes, options=options, **ROWS | changes).run()


def train_all(processes: Processes, root: Path, cases: dict[str, tuple[str, dict[str, Any], dict[str, Any]]]) -> None:
    for name, (kind, options, changes) in cases.items():
        for way in WAYS:
            train(processes, root / way / name, kind, options, {**changes, "sharding": way})


def compare_all(root: Path, cases: dict[str, tuple[str, dict[str, Any], dict[str, Any]]], count: int = 2) -> None:
    """Train every case in one process and in `count`, both ways, and compare curves and best weights."""
    for name, (kind, options, changes) in cases.items():
        train(ALONE, root / "one" / name, kind, options, changes)
    run_processes(count, train_all, root, cases)
    for name in cases:
        expected = read_curve(root / "one" / name)
        best = load_model(root / "one" / name / BEST_FOLDER).state_dict()
        assert len(expected) >= 12
        assert max(expected) - min(expected) > 0.1
        for way in WAYS:
            assert read_curve(root / way / name) == pytest.approx(expected, rel=TOLERANCE), (name, way)
            found = load_model(root / way / name / BEST_FOLDER).state_dict()
            for key, tensor in best.items():
                assert torch.allclose(tensor, found[key], atol=1e-3), (name, way, key)


def test_two_processes_give_the_curve_of_one(tmp_path):
    """Batches of 6 rows, 2 of them in a step, documents of unequal lengths, rows that run empty at the end."""
    compare_all(
        tmp_path,
        {
            "stream": ("infini", {"num_memory_banks": 2, "segments_per_bank": 1}, {"order": "stream"}),
            # The last batch has fewer rows than a process reads: the other's are all empty.
            "shuffled": ("hierarchical", {}, {"order": "shuffled", "num_samples": 14}),
            # What only writes has no gradient in the first half, and one in the second.
            "one segment": ("token_memory", {}, {"order": "shuffled", "segment_curriculum": (1, 2)}),
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_every_model_gives_the_curve_of_one_process(tmp_path, count):
    compare_all(
        tmp_path,
        {f"{kind}-{order}": (kind, {}, {"order": order}) for kind in KINDS for order in ("stream", "shuffled")},
        count,
    )


@pytest.mark.slow
def test_every_way_to_run_a_step_gives_the_curve_of_one_process(tmp_path):
    """Layers run twice, layers called once a pass and segment with memory between, a last batch of few rows."""
    compare_all(
        tmp_path,
        {
            "checkpointing": ("infini", {}, {"gradient_checkpointing": True}),
            "no accumulation": ("infini", {}, {"gradient_accumulation_steps": 1}),
            "all batches in one step": ("multi_memory", {}, {"gradient_accumulation_steps": 100, "num_epochs": 12}),
            "alibi": ("infini", {"use_alibi": True, "use_delta_rule": False}, {}),
            "long samples": ("infini", {}, {"seq_length": 64, "segments_per_sample": 8, "num_epochs": 6}),
            "shifted keys": ("multi_memory", {"use_key_shift": True}, {}),
        },
    )


def test_a_model_without_memory_goes_on_in_the_middle_of_a_stream(tmp_path):
    make_trainer(tmp_path / "whole", "pythia").run()
    trainer = make_trainer(tmp_path / "stopped", "pythia")
    stop_at(trainer, 2)
    with pytest.raises(TrainingInterrupted, match="step 2"):
        trainer.run()
    make_trainer(tmp_path / "stopped", "pythia").run(resume=True)
    assert read_curve(tmp_path / "stopped") == read_curve(tmp_path / "whole")


def resume_all(processes: Processes, root: Path, saved_by: str, ways: tuple[str, ...]) -> None:
    """Stop a training after 4 of its steps, or go on with it."""
    for way in ways:
        folder = root / saved_by.format(way=way)
        trainer = make_trainer(folder, processes=processes, sharding=way, **ROWS)
        if not (folder / "checkpoints").exists():
            stop_at(trainer, 4 if processes.count == 1 else 3, rank=processes.count - 1)
            with pytest.raises(TrainingInterrupted, match="step 4"):
                trainer.run()
        else:
            trainer.run(resume=True)


def test_a_checkpoint_of_two_processes_goes_on_in_one_and_the_other_way(tmp_path):
    """Each training is stopped by SIGTERM to its last process alone, and goes on with other processes."""
    make_trainer(tmp_path / "whole", **ROWS).run()
    expected = read_curve(tmp_path / "whole")
    run_processes(2, resume_all, tmp_path, "two-{way}", WAYS)
    resume_all(ALONE, tmp_path, "one-{way}", WAYS)
    found = read_checkpoint(list_checkpoints(tmp_path / "two-fsdp")[0])
    alone = read_checkpoint(list_checkpoints(tmp_path / "one-ddp")[0])
    assert found.values["memory_rows"] == alone.values["memory_rows"] == 6
    for name, tensor in alone.weights.items():
        assert torch.allclose(tensor, found.weights[name], atol=1e-3), name
    for key, value in alone.values["memory"][0].items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(value, found.values["memory"][0][key], rtol=1e-2, atol=1e-3), key
    assert found.state.step == 4
    resume_all(ALONE, tmp_path, "two-{way}", WAYS)
    run_processes(2, resume_all, tmp_path, "one-{way}", WAYS)
    for name in ("two-ddp", "two-fsdp", "one-ddp", "one-fsdp"):
        assert read_curve(tmp_path / name) == pytest.approx(expected, rel=TOLERANCE), name
