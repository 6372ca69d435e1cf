"""What all measurements' commands share: a progress bar, stopping early, and the last lines of their output."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from new_llm.config.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from new_llm.experiments.subject import Subject

INTERRUPTED = 130
PICTURE_ENDINGS = (".svg", ".png")


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


def finish(
    record: dict[str, Any],
    subject: "Subject",
    out: Path | None,
    draw: Callable[[dict[str, Any]], "Figure"] | None = None,
    picture: Path | None = None,
) -> int:
    """Write a record, and its picture where there is one, and say where they are.

    Args:
        record: of `describe_evaluation`.
        subject: the model.
        out: the JSON file; None: as `write_evaluation` says.
        draw: draws the record's result; None: there is no picture.
        picture: the picture's file; None: beside the JSON file, .svg.

    Returns:
        The command's exit code: 130 where the measurement was interrupted.
    """
    from new_llm.experiments.evaluation_record import write_evaluation

    path = write_evaluation(record, subject, out)
    if draw is not None:
        from new_llm.report.picture import save_picture

        picture = picture or path.with_suffix(".svg")
        save_picture(draw(record["result"]), picture)
        print(f"picture: {picture}")
    is_partial = record["status"] == "partial"
    if is_partial:
        print("interrupted: the result is partial, and is labelled so", file=sys.stderr)
    print(f"results: {path}")
    return INTERRUPTED if is_partial else 0


def check_picture(path: Path | None) -> None:
    """Refuse a picture's name before anything is measured.

    Raises:
        UserError: its ending is none that can be drawn.
    """
    if path is not None and path.suffix not in PICTURE_ENDINGS:
        raise UserError(f"--picture: {path} must end with {' or '.join(PICTURE_ENDINGS)}")
