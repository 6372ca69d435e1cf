"""Where a run stands: its folder is found or made, and held so that no second process works in it."""

import dataclasses
import datetime
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from new_llm.config import UserError
from new_llm.config.atomic import remove_leftovers, write_folder_atomically
from new_llm.config.locks import hold_lock
from new_llm.config.run_settings import RunSettings, Settings
from new_llm.experiments.record import MAY_CHANGE, list_differences, read_begun
from new_llm.processes import ALONE, Processes

UNNAMED = "experiment"


@contextmanager
def hold_run(config: Settings, *, resume: bool, processes: Processes = ALONE) -> Iterator[tuple[Settings, Path]]:
    """Inside the block: a run that is to begin or to go on, and that no other process can work in.

    Of the run nothing is written but its lock, which stands beside the folder and goes at the block's end.

    Args:
        config: the run's, perhaps without a name.
        resume: whether it goes on.
        processes: those that work in it together: the main one holds it for all.

    Returns:
        The configuration with its name filled in, and the folder.

    Raises:
        UserError: another process is at work in it; the folder exists already, or there is nothing to resume, or it
            began with other settings.
        OtherProcessError: on the others, likewise.
    """
    with ExitStack() as held:
        yield processes.run_on_main(lambda: held.enter_context(_hold_alone(config, resume)))


@contextmanager
def _hold_alone(config: Settings, resume: bool) -> Iterator[tuple[Settings, Path]]:
    if config.name is None:
        if resume:
            raise UserError("--resume needs --name NAME, the run to go on with")
        name = f"{UNNAMED}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        config = dataclasses.replace(cast(Any, config), name=name)
    folder = config.runs_dir / str(config.name)
    made = [parent for parent in (config.runs_dir, *config.runs_dir.parents) if not parent.exists()]
    try:
        with hold_lock(folder.with_name(f".{folder.name}.lock"), str(folder)):
            yield find_run(config, folder, resume=resume), folder
    finally:
        for parent in made:  # bad input leaves nothing behind
            with suppress(OSError):
                parent.rmdir()


def find_run(config: Settings, folder: Path, *, resume: bool) -> Settings:
    """The configuration of a run that can begin or go on in a folder. Leftovers of a killed process are removed.

    Raises:
        UserError: see `hold_run`.
    """
    if not resume:
        if folder.exists():
            raise UserError(
                f"{folder}: a run of this name exists; choose another --name, or go on with it by "
                f"--name {config.name} --resume"
            )
        return config
    begun = read_begun(folder, type(config))
    changed = list_differences(begun, config, but=MAY_CHANGE)
    if changed:
        raise UserError(f"{folder}: a run goes on with the settings it began with; different now: {'; '.join(changed)}")
    for place, _, _ in os.walk(folder):
        remove_leftovers(Path(place))
    return dataclasses.replace(cast(Any, config), runs_dir=begun.runs_dir)


def create_run(config: RunSettings, folder: Path) -> None:
    """Make the folder of a new run, with its configuration in it from the start.

    Raises:
        UserError: it exists by now, or can't be made.
    """
    if folder.exists():
        raise UserError(f"{folder}: a run of this name has been made meanwhile; choose another --name")
    try:
        with write_folder_atomically(folder) as temporary:
            (temporary / config.file_name).write_text(config.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: can't make the run's folder: {error.strerror}") from None
