"""Progress of slow steps: a bar in a terminal, one plain line elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from new_llm.config.terminal import open_console, print_text


@contextmanager
def show_progress(description: str, unit: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Report a step on stderr; the value is a function to call with the units done since the last call.

    Args:
        description: what is being done.
        unit: what is counted, in the plural.
        total: units in all; None: unknown.
    """
    console = open_console(stderr=True)
    done = 0
    began = time.perf_counter()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(description, total=total)

        def advance(units: int) -> None:
            nonlocal done
            done += units
            bars.advance(task, units)

        yield advance
    if not console.is_terminal:
        seconds = time.perf_counter() - began
        print_text(f"{description}: {done:,} {unit} in {seconds:.1f} s", stderr=True)
