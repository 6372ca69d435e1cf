"""Where a model's checkpoints stand: one folder each, closed by a manifest; the last good one is found."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from new_llm.config import UserError
from new_llm.config.atomic import remove_folder_atomically, remove_leftovers, write_folder_atomically
from new_llm.config.manifest import check_manifest, write_manifest

CHECKPOINTS_FOLDER = "checkpoints"
NAME = re.compile(r"step-(\d+)-epoch-(\d+)")


def name_checkpoint(step: int, epoch: int) -> str:
    """A checkpoint's folder; names sort by time, and no two places of a training have the same.

    Args:
        step: optimizer steps done.
        epoch: epochs finished: after an epoch's last step there is a checkpoint before and one after its validation.
    """
    return f"step-{step:09d}-epoch-{epoch:04d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a model's folder, whole or not, the newest first."""
    found = [path for path in (folder / CHECKPOINTS_FOLDER).glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=_read_place, reverse=True)


@contextmanager
def write_checkpoint_folder(folder: Path, step: int, epoch: int, *, keep: int) -> Iterator[Path]:
    """Inside the block: the folder to write a checkpoint's files into; at its end they are on disk, with a manifest.

    Args:
        folder: the model's folder in the run.
        step, epoch: see `name_checkpoint`.
        keep: checkpoints that are kept, this one included; older ones are removed after it is whole.
    """
    path = folder / CHECKPOINTS_FOLDER / name_checkpoint(step, epoch)
    with write_folder_atomically(path) as temporary:
        yield temporary
        write_manifest(temporary)
    others = [other for other in list_checkpoints(folder) if other != path]
    # What is newer than the place that training has come to was damaged when training went on from an older one.
    newer = [other for other in others if _read_place(other) > (step, epoch)]
    older = others[len(newer) :]
    for outdated in (*newer, *older[keep - 1 :]):
        remove_folder_atomically(outdated)


def find_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint; None where there is none at all.

    Args:
        folder: the model's folder in the run, which no other process writes to. What a killed one has left is removed.
        warn: told in one line of the damaged ones that are passed over.

    Raises:
        UserError: there are checkpoints, and none of them is whole.
    """
    remove_leftovers(folder / CHECKPOINTS_FOLDER)
    damaged = list[str]()
    for path in list_checkpoints(folder):
        faults = check_manifest(path)
        if not faults:
            if damaged:
                warn(f"{'; '.join(damaged)}: going on from {path.name}")
            return path
        damaged.append(f"checkpoint {path.name} is damaged ({'; '.join(faults)})")
    if damaged:
        raise UserError(
            f"{folder / CHECKPOINTS_FOLDER}: no checkpoint is whole: {'; '.join(damaged)}; remove this folder to train "
            "the model anew"
        )
    return None


def remove_checkpoint(folder: Path) -> None:
    """Remove the checkpoints of a finished model, whose best weights stay."""
    remove_folder_atomically(folder / CHECKPOINTS_FOLDER)


def _read_place(path: Path) -> tuple[int, int]:
    found = NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1]), int(found[2])
