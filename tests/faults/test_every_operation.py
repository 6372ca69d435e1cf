"""Every single operation on the disk while a checkpoint is written: it fails, or the process dies before it."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from disk_faults import stop_at
from new_llm.training.checkpoint import find_checkpoint, list_checkpoints, write_checkpoint_folder


def write(folder: Path, step: int) -> None:
    with write_checkpoint_folder(folder, step, 0, keep=2) as temporary:
        (temporary / "weights").write_bytes(step.to_bytes(64, "big"))
        (temporary / "state").write_text(str(step))


@pytest.mark.parametrize("dies", [False, True])
def test_there_is_always_a_whole_checkpoint_and_training_goes_on_from_it(tmp_path, monkeypatch, dies):
    for step in (1, 2):
        write(tmp_path, step)
    number, step, is_whole = 0, 2, False
    while not is_whole:
        number += 1
        if dies and (child := os.fork()):
            is_whole = os.waitpid(child, 0)[1] == 0
        else:
            with stop_at(number, monkeypatch, dies=dies) as done, suppress(OSError):
                write(tmp_path, step + 1)
            if dies:
                os._exit(0)
            is_whole = len(done) < number
        found = find_checkpoint(tmp_path, pytest.fail)
        assert found is not None
        assert int((found / "state").read_text()) in (step, step + 1), number
        assert all(path.name.startswith("step-") for path in found.parent.iterdir()), number
        write(tmp_path, step + 1)
        assert len(list_checkpoints(tmp_path)) == 2
        step += 1
    assert number > 20
