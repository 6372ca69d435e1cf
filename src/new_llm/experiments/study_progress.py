"""The progress of all runs of a study: one live view on a terminal, a line per run elsewhere.

Runs may be in other processes or on other machines, so that whatever is shown is read from their `metrics.jsonl`.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from new_llm.experiments.study_jobs import Cell
from new_llm.formats import format_seconds
from new_llm.training.log import METRICS_FILE

TAIL_BYTES = 1 << 16
"""The end of a file of metrics, which holds its last lines."""
MAX_LINES, NAME_COLUMNS, BAR_COLUMNS = 20, 22, 8


class StudyProgress:
    """Shows how far a study is, while its block runs.

    Args:
        folder: the study's folder.
        running: the runs that are under way, as it changes.
        num_cells: all runs.
        num_left: those that were not complete before.
        console: where to show it.
    """

    def __init__(
        self, folder: Path, running: Mapping[Cell, Any], num_cells: int, num_left: int, console: Console
    ) -> None:
        self.folder = folder
        self.running = running
        self.num_cells = num_cells
        self.num_done = num_cells - num_left
        self.console = console
        self.begun: dict[Cell, float] = {}
        """When each run began."""
        self.seconds: list[float] = []
        """How long each took that has ended."""
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.console.file = self.console.file  # stays the terminal while a run's own output goes to its log
            self._live = Live(console=self.console, get_renderable=self.render, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, cell: Cell) -> None:
        """A run begins, or what it has trained is now measured."""
        self.begun.setdefault(cell, time.monotonic())

    def end(self, cell: Cell) -> None:
        """A run is done."""
        self.seconds.append(time.monotonic() - self.begun[cell])
        self.num_done += 1
        self.console.print(f"{cell.name}: done, {self.describe_rest()}", highlight=False)

    def describe_rest(self) -> str:
        """How many runs are done, and how long the others will take if they are like those."""
        text = f"{self.num_done} of {self.num_cells}"
        left = self.num_cells - self.num_done
        if not left or not self.seconds:
            return text
        seconds = sum(self.seconds) / len(self.seconds) * left / (len(self.running) + 1)
        return f"{text}, about {format_seconds(seconds)} left"

    def render(self) -> Group:
        """A line for each run that is under way, and one for all; 60 columns are enough."""
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True, max_width=NAME_COLUMNS)
        for width in (BAR_COLUMNS, 4, None):
            table.add_column(no_wrap=True, width=width)
        for cell in list(self.running)[:MAX_LINES]:
            last = read_last_line(self.folder / cell.name)
            share = last.get("share", 1.0) if last else 0.0
            table.add_row(cell.name, ProgressBar(1.0, share), f"{share:4.0%}", describe_line(last))
        return Group(table, f"runs done: {self.describe_rest()}")


def read_last_line(run: Path) -> dict[str, Any] | None:
    """The newest line of a run's metrics; None: there is none yet."""
    for path in run.glob(f"*/{METRICS_FILE}"):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            for line in reversed(file.read().splitlines()):
                try:
                    found = json.loads(line)
                except ValueError:  # half a line: it is being written, or was cut
                    continue
                if isinstance(found, dict):
                    return found
    return None


def describe_line(line: dict[str, Any] | None) -> str:
    """How far a training is, in a few words."""
    if line is None:
        return "waiting"
    loss = line.get("loss", line.get("validation_loss"))
    return f"epoch {line.get('epoch')}" + (f", loss {loss:.3f}" if isinstance(loss, float) else "")
