"""What all measurements' commands share: a progress bar, stopping early, and the last lines of their output."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from new_llm.experiments.subject import Subject

INTERRUPTED = 130


@contextmanager
def show_progress(what: str, unit: str = "tokens") -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr where that is a terminal; gives a function of (done, in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def finish(record: dict[str, Any], subject: "Subject", out: Path | None) -> int:
    """Write the record, say where it is, and return the command's exit code: 130 where it was interrupted."""
    from new_llm.experiments.evaluation_record import write_evaluation

    path = write_evaluation(record, subject, out)
    is_partial = record["status"] == "partial"
    if is_partial:
        print("interrupted: the result is partial, and is labelled so", file=sys.stderr)
    print(f"results: {path}")
    return INTERRUPTED if is_partial else 0
