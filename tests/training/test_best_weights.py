"""The best weights of a training that goes on, whenever it was killed and whatever became of their files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from new_llm.config import UserError
from new_llm.models import TransformerLM, load_model
from new_llm.training import checkpoint, loop
from new_llm.training.checkpoint import BEST_FOLDER, list_checkpoints
from training_cases import make_trainer, read_curve


class KilledError(BaseException):
    pass


def train(folder: Path, losses: list[float], *, resume: bool = False, epochs: int = 4) -> list[str]:
    """Train with these validation losses, one an epoch that is still to come; returns what was said."""
    trainer = make_trainer(folder, num_epochs=epochs, checkpoint_every_steps=5)
    values, lines = iter(losses), list[str]()
    trainer.validate = lambda model: next(values)
    trainer.progress.note = lines.append
    trainer.run(resume=resume)
    return lines


def read_best(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder / BEST_FOLDER).state_dict()


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def test_killed_between_the_checkpoint_and_its_best_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "whole", [3.0, 2.0, 4.0, 5.0])
    saved: list[Path] = []

    def kill(model: TransformerLM, folder: Path) -> None:
        saved.append(folder)
        if len(saved) == 2:
            raise KilledError
        original(model, folder)

    original = loop.save_model
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_model", kill)
        with pytest.raises(KilledError):
            train(tmp_path / "killed", [3.0, 2.0])
    lines = train(tmp_path / "killed", [4.0, 5.0], resume=True)
    assert len(lines) == 1
    assert lines[0].startswith("the best weights (epoch 2) are written again from step-")
    assert same(read_best(tmp_path / "whole"), read_best(tmp_path / "killed"))
    assert read_curve(tmp_path / "whole") == read_curve(tmp_path / "killed")


def flip_weights(best: Path) -> None:
    content = bytearray((best / "model.safetensors").read_bytes())
    content[-9] ^= 1
    (best / "model.safetensors").write_bytes(content)


def cut_weights(best: Path) -> None:
    content = (best / "model.safetensors").read_bytes()
    (best / "model.safetensors").write_bytes(content[: len(content) // 2])


def change_structure(best: Path) -> None:
    text = (best / "model.json").read_text()
    assert '"segment_length": 8' in text
    (best / "model.json").write_text(text.replace('"segment_length": 8', '"segment_length": 9'))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_weights, "model.safetensors: corrupted: the content does not match the digest"),
        (cut_weights, "model.safetensors: truncated"),
        (change_structure, "model.json: another structure"),
        (shutil.rmtree, "no saved model here"),
    ],
)
def test_damaged_best_weights_come_back_from_a_checkpoint(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    train(tmp_path, [3.0, 2.0], epochs=2)
    expected = read_best(tmp_path)
    damage(tmp_path / BEST_FOLDER)
    if damage is not change_structure:  # which is a model too, but another one
        with pytest.raises(UserError, match=words):
            read_best(tmp_path)
    lines = train(tmp_path, [4.0], resume=True, epochs=3)
    assert len(lines) == 1
    assert words in lines[0]
    assert same(read_best(tmp_path), expected)


def test_best_weights_that_no_checkpoint_has_are_said_to_be_lost(tmp_path: Path) -> None:
    train(tmp_path, [3.0, 2.0, 2.5, 2.6])
    flip_weights(tmp_path / BEST_FOLDER)
    lines = train(tmp_path, [2.7], resume=True, epochs=5)
    assert len(lines) == 1
    assert lines[0].startswith("the best weights (epoch 2) are lost: ")
    state = json.loads((list_checkpoints(tmp_path)[0] / checkpoint.STATE_FILE).read_text())
    assert (state["best_epoch"], state["best_loss"]) == (5, 2.7)
    assert read_best(tmp_path)
