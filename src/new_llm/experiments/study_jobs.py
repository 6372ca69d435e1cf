"""Several trainings of a study at once, each in a process of its own with its share of the cores."""

import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from rich.console import Console

from new_llm.config import UserError
from new_llm.experiments.study_config import StudyConfig
from new_llm.training import TrainingInterrupted

LOGS_FOLDER = "logs"
INTERRUPTED, BAD_INPUT = 130, 2  # exit codes of a process, those of the command


class NamedCell(Protocol):
    """One training of a study, by its name."""

    @property
    def name(self) -> str:
        """The run's name."""
        ...


def run_in_processes(
    work: Callable[..., None], study: StudyConfig, cells: Sequence[NamedCell], jobs: int, console: Console
) -> None:
    """Do work(study, cell, console) for every cell, `jobs` of them at once; what a process says goes to a log file.

    Where one fails, the others are asked to stop; trainings among them write a checkpoint.

    Args:
        work: a function of a module.
        study: the study.
        cells: what to work on, in this order.
        jobs: processes.
        console: where it is said what is done.

    Raises:
        UserError: one of them failed: says which, its last words, and where its log is.
        TrainingInterrupted: one of them was asked to stop.
    """
    context = multiprocessing.get_context("spawn")
    waiting = deque(cells)
    running: dict[int, tuple[NamedCell, BaseProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.popleft()
                process = context.Process(target=_work, args=(work, study, cell, _log_file(study, cell)))
                with share_cores(jobs):
                    process.start()
                running[process.sentinel] = cell, process
            for sentinel in wait(list(running)):
                cell, process = running.pop(int(sentinel))  # pyright: ignore[reportArgumentType]
                process.join()
                _check_end(process.exitcode, cell, _log_file(study, cell))
                console.print(f"{cell.name}: done, {len(waiting)} to begin", highlight=False)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


@contextmanager
def share_cores(jobs: int) -> Iterator[None]:
    """Processes that are started inside the block compute with 1/jobs of the cores; a user's OMP_NUM_THREADS wins."""
    name = "OMP_NUM_THREADS"
    given = os.environ.get(name)
    os.environ[name] = given or str(max(1, (os.cpu_count() or 1) // jobs))
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]


def _log_file(study: StudyConfig, cell: NamedCell) -> Path:
    return study.folder / LOGS_FOLDER / f"{cell.name}.log"


def _work(work: Callable[..., None], study: StudyConfig, cell: NamedCell, log: Path) -> None:
    """What a process does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # outside of training, which catches both
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            work(study, cell, Console(file=file, width=120))
        except (TrainingInterrupted, KeyboardInterrupt):
            sys.exit(INTERRUPTED)
        except UserError as error:
            print(error, file=file)
            sys.exit(BAD_INPUT)
        except Exception:
            traceback.print_exc(file=file)
            sys.exit(1)


def _check_end(code: int | None, cell: NamedCell, log: Path) -> None:
    if code == 0:
        return
    if code == INTERRUPTED:
        raise TrainingInterrupted(f"{cell.name}: interrupted", log.parent.parent / cell.name)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    last = lines[-1].strip() if lines else f"its process ended with {code}"
    raise UserError(f"{cell.name}: {last}; more is in {log}")
