"""What processes of a study are given to do in tests; a module of its own, which a fresh process can import."""

import os
import signal

from rich.console import Console

from new_llm.config import UserError
from new_llm.experiments.study import Cell
from new_llm.experiments.study_config import StudyConfig


def note_process(study: StudyConfig, cell: Cell, console: Console) -> None:
    console.print(f"here is {cell.name}")
    (study.folder / cell.name).write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}")


def fail_one(study: StudyConfig, cell: Cell, console: Console) -> None:
    if cell.variant == "no-delta":
        raise UserError("the text is gone")


def break_one(study: StudyConfig, cell: Cell, console: Console) -> None:
    if cell.variant == "no-delta":
        raise ZeroDivisionError("nothing to divide by")


def stop_one(study: StudyConfig, cell: Cell, console: Console) -> None:
    if cell.variant == "no-delta":
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
