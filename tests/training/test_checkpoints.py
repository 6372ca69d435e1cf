"""Checkpoints on disk and the best weights beside them, whatever was killed or damaged."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from disk_faults import edit_json, flip, stop_everywhere
from new_llm.config import UserError
from new_llm.config.files import MANIFEST_FILE
from new_llm.models import TransformerLM, load_model
from new_llm.training import checkpoint, loop
from new_llm.training.checkpoint import find_checkpoint, list_checkpoints
from new_llm.training.devices import read_random_states, seed_generators, set_random_states
from new_llm.training.log import METRICS_FILE, read_last_metrics
from training_cases import equal, list_weights, make_trainer, read_curve


def write(folder: Path, step: int, epoch: int = 0, keep: int = 2) -> Path:
    with checkpoint.write_checkpoint_folder(folder, step, epoch, keep=keep) as temporary:
        (temporary / "weights").write_bytes(step.to_bytes(64, "big"))
        (temporary / "state.json").write_text("{}")
    return folder / checkpoint.CHECKPOINTS_FOLDER / checkpoint.CHECKPOINT_NAME.format(step, epoch)


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_the_newest_are_kept_and_the_last_is_found(tmp_path):
    assert find_checkpoint(tmp_path, pytest.fail) is None
    for step, epoch in ((3, 0), (6, 0), (6, 1), (9, 1), (10**10, 10**5), (10**10 + 1, 10**5)):
        path = write(tmp_path, step, epoch)
        assert find_checkpoint(tmp_path, pytest.fail) == path
    assert names(tmp_path) == ["step-10000000001-epoch-100000", "step-10000000000-epoch-100000"]
    assert [write(tmp_path, 10**11, keep=1)] == list_checkpoints(tmp_path)
    checkpoint.remove_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == []
    # Training that went on from an older one replaces the damaged newer ones.
    before = write(tmp_path, 3)
    flip(write(tmp_path, 6) / "weights")
    assert write(tmp_path, 4) in list_checkpoints(tmp_path)
    assert names(tmp_path) == [checkpoint.CHECKPOINT_NAME.format(4, 0), before.name]
    flip(write(tmp_path, 6) / "weights")
    assert write(tmp_path, 6) == find_checkpoint(tmp_path, pytest.fail)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: flip(path / "weights"), "weights has changed since it was written (sha256)"),
        (lambda path: os.truncate(path / "weights", 10), "weights has 10 bytes instead of 64"),
        (lambda path: (path / "state.json").unlink(), "state.json is missing"),
        (lambda path: (path / MANIFEST_FILE).unlink(), "manifest.json is missing"),
    ],
)
def test_a_damaged_last_one_is_named_and_the_one_before_is_taken(tmp_path, damage, words):
    before, last = write(tmp_path, 3), write(tmp_path, 6)
    damage(last)
    lines: list[str] = []
    assert find_checkpoint(tmp_path, lines.append) == before
    assert lines == [f"checkpoint {last.name} is damaged ({words}): continuing from {before.name}"]
    damage(before)
    with pytest.raises(UserError) as error:
        find_checkpoint(tmp_path, pytest.fail)
    assert str(error.value).startswith(f"{tmp_path / checkpoint.CHECKPOINTS_FOLDER}: every checkpoint is damaged: ")
    assert str(error.value).count(words) == 2


def test_all_random_generators_go_on_where_they_were(tmp_path):
    def draw() -> tuple[float, ...]:
        numbers = [random.random(), random.gauss(), np.random.standard_normal(), torch.rand(()).item()]
        return (*numbers, torch.randn(20).sum().item())

    seed_generators(3)
    draw()
    torch.save(read_random_states(), tmp_path / "states.pt")
    expected = [draw(), draw()]
    seed_generators(4)
    assert draw() not in expected
    set_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert [draw(), draw()] == expected


@pytest.mark.parametrize("dies", [False, True])
def test_whatever_fails_while_one_is_written_a_whole_one_is_there_and_training_goes_on_from_it(
    tmp_path, monkeypatch, dies
):
    """Every single operation on the disk fails once, or the process dies before it."""
    steps = [1, 2]
    for step in steps:
        write(tmp_path, step)
    for number in stop_everywhere(lambda: write(tmp_path, steps[-1] + 1), monkeypatch, dies=dies):
        step = steps[-1]
        found = find_checkpoint(tmp_path, pytest.fail)
        assert int.from_bytes((found / "weights").read_bytes(), "big") in (step, step + 1), number
        assert all(path.name.startswith("step-") for path in found.parent.iterdir()), number
        write(tmp_path, step + 1)
        assert len(list_checkpoints(tmp_path)) == 2
        steps.append(step + 1)
    assert number > 20


# The best weights of a training that goes on, whenever it was killed and whatever became of their files


def train(folder: Path, losses: list[float], *, resume: bool = False, epochs: int = 4) -> list[str]:
    """Train with these validation losses, one an epoch that is still to come; returns what was said."""
    trainer = make_trainer(folder, num_epochs=epochs, checkpoint_every_steps=5)
    values, lines = iter(losses), list[str]()
    trainer.validate = lambda model: next(values)
    trainer.progress.note = lines.append
    trainer.run(resume=resume)
    return lines


def read_best(folder: Path) -> list[torch.Tensor]:
    return list_weights(load_model(folder / checkpoint.BEST_FOLDER))


def test_killed_between_the_checkpoint_and_its_best_weights(tmp_path, monkeypatch):
    train(tmp_path / "whole", [3.0, 2.0, 4.0, 5.0])
    saved: list[Path] = []

    def kill(model: TransformerLM, folder: Path) -> None:
        saved.append(folder)
        if len(saved) == 2:
            raise KeyboardInterrupt
        original(model, folder)

    original = loop.save_model
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_model", kill)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed", [3.0, 2.0])
    (line,) = train(tmp_path / "killed", [4.0, 5.0], resume=True)
    assert line.startswith("the best weights (epoch 2) are restored from step-")
    assert equal(read_best(tmp_path / "whole"), read_best(tmp_path / "killed"))
    assert read_curve(tmp_path / "whole") == read_curve(tmp_path / "killed")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda best: flip(best / "model.safetensors"), "model.safetensors: corrupted: the content does not match the"),
        (edit_json("model.json", segment_length=9), "model.json: the structure is different"),
        (shutil.rmtree, "no saved model here"),
    ],
)
def test_damaged_best_weights_come_back_from_a_checkpoint(tmp_path, damage, words):
    train(tmp_path, [3.0, 2.0], epochs=2)
    expected = read_best(tmp_path)
    damage(tmp_path / checkpoint.BEST_FOLDER)
    if "different" not in words:  # which is a model too
        with pytest.raises(UserError, match=words):
            read_best(tmp_path)
    (line,) = train(tmp_path, [4.0], resume=True, epochs=3)
    assert words in line
    assert equal(read_best(tmp_path), expected)


def test_best_weights_that_no_checkpoint_has_are_said_to_be_lost(tmp_path):
    train(tmp_path, [3.0, 2.0, 2.5, 2.6])
    flip(tmp_path / checkpoint.BEST_FOLDER / "model.safetensors")
    (line,) = train(tmp_path, [2.7], resume=True, epochs=5)
    assert line.startswith("the best weights (epoch 2) are lost: ")
    state = json.loads((list_checkpoints(tmp_path)[0] / checkpoint.STATE_FILE).read_text())
    assert (state["best_epoch"], state["best_loss"]) == (5, 2.7)
    assert read_best(tmp_path)


def test_the_last_line_of_metrics_is_found_at_the_files_end(tmp_path):
    assert read_last_metrics(tmp_path) is None
    lines = [json.dumps({"step": step, "text": "x" * 1000}) for step in range(200)]
    (tmp_path / METRICS_FILE).write_text("\n".join(lines) + '\n{"step": 200, "te')
    assert read_last_metrics(tmp_path)["step"] == 199
