"""Training logs: `metrics.jsonl`, TensorBoard, other trackers, and the live view on a terminal."""

import importlib.util
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from new_llm.config import UserError
from new_llm.config.files import name_refusals, write_text_atomically
from new_llm.config.loading import flatten_settings
from new_llm.training.devices import read_used_bytes

METRICS_FILE = "metrics.jsonl"
MAX_LINE_CHARACTERS = 1 << 24
"""Longer lines count as broken."""
TAIL_BYTES = 1 << 16
"""How much of the end of `metrics.jsonl` `read_last_metrics` reads."""
BOARD_FOLDER = "tensorboard"
TRACKER_PROJECT = "new-llm"
TRACKER_RUN_NAMES = {"wandb": "name", "mlflow": "run_name", "trackio": "name"}
"""The option by which each tracker takes a run's name."""


class MetricsWriter:
    """Appends to `metrics.jsonl` (one JSON object per line), to TensorBoard's event files and to other trackers.

    Args:
        num_lines: how many lines of an existing file to keep. The checkpoint stores this number; an interrupted run
            wrote the later lines after it.
        step: the optimizer step from which training continues.
    """

    def __init__(self, folder: Path, num_lines: int = 0, step: int = 0, accelerator: Accelerator | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import; only training needs it

        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator = accelerator
        self.path = folder / METRICS_FILE
        kept = read_metrics(folder)[:num_lines]
        write_text_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.num_lines = len(kept)
        self._file = self.path.open("a", encoding="utf-8")
        if step == 0:
            shutil.rmtree(folder / BOARD_FOLDER, ignore_errors=True)  # left by an attempt without a checkpoint
        self._thread_hook = threading.excepthook
        threading.excepthook = self._note_thread_error
        with name_refusals(folder / BOARD_FOLDER):
            self._board = SummaryWriter(folder / BOARD_FOLDER, purge_step=step + 1 if step else None)

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Append one line {"event", "step", ...} and log its finite numbers to TensorBoard and the trackers.

        Their tags are e.g. `train/loss`, `gates/layers.0.1` (layer 0, head 1) and `alpha/layers.0`.
        """
        shown: dict[str, Any] = {f"{event}/{name}": value for name, value in values.items()}
        for name, gates in values.get("gates", {}).items():
            shown |= {f"gates/{name}.{head}": gate for head, gate in enumerate(gates)}
        shown |= {f"alpha/layers.{layer}": alpha for layer, alpha in values.get("alpha", {}).items()}
        numbers = {name: n for name, n in shown.items() if isinstance(n, int | float) and math.isfinite(n)}
        with name_refusals(self.path):
            self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
            self._file.flush()
            self.num_lines += 1
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self.accelerator is not None and self.accelerator.trackers:
            self.accelerator.log(numbers, step=step)

    def sync(self) -> None:
        """Flush to disk, before a checkpoint records the number of lines."""
        with name_refusals(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._board.flush()

    def close(self) -> None:
        """Flush and close."""
        try:
            self.sync()
            with name_refusals(self.path):
                self._file.close()
                self._board.close()
        finally:
            threading.excepthook = self._thread_hook

    def _note_thread_error(self, error: threading.ExceptHookArgs) -> None:
        # TensorBoard's writer raises its thread's error again at the next call, where we report it in one line.
        if not type(error.thread).__module__.startswith("tensorboard."):
            self._thread_hook(error)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of `metrics.jsonl` up to the first broken one; a killed process may leave half a line."""
    path = folder / METRICS_FILE
    lines: list[dict[str, Any]] = []
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            while text := file.readline(MAX_LINE_CHARACTERS):
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    line = None
                if not isinstance(line, dict):
                    break
                lines.append(line)
    return lines


def read_last_metrics(folder: Path) -> dict[str, Any] | None:
    """Return the last complete line of `metrics.jsonl`, or None; reads only the end of the file."""
    path = folder / METRICS_FILE
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        for text in reversed(file.read().splitlines()):
            try:
                line = json.loads(text)
            except ValueError:  # half a line, still being written or cut by TAIL_BYTES
                continue
            if isinstance(line, dict):
                return line
    return None


# Trackers: Weights & Biases, MLflow or trackio, through Accelerate


def check_trackers(names: Sequence[str]) -> None:
    """Raise a `UserError` if a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"train.trackers: {name} is not installed: pip install {name}")


@contextmanager
def open_trackers(
    accelerator: Accelerator, names: Sequence[str], run: str, settings: Mapping[str, Any]
) -> Iterator[None]:
    """Open the trackers, if any, for `accelerator.log` inside the block, with this run's name and nested settings."""
    if names:
        options = {name: {TRACKER_RUN_NAMES[name]: run} for name in names}
        flat = flatten_settings(settings)
        config = {key: value if isinstance(value, int | float | str) else str(value) for key, value in flat.items()}
        accelerator.init_trackers(TRACKER_PROJECT, config=config, init_kwargs=options)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


# The live view

SMOOTHING = 0.9
"""Weight of the old value in the moving average of loss and rate."""
REFRESH_SECONDS = 0.5
"""Interval between readings of the process's memory."""


@dataclass(eq=False)
class TrainingProgress:
    """Shows one model's progress: a live view on a terminal; else one line per epoch and every `line_seconds`."""

    name: str
    console: Console
    _: KW_ONLY
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    line_seconds: float = 60.0

    def __post_init__(self) -> None:
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._loss: float | None = None
        self._rate = 0.0
        self._memory_text = ""
        self._last_look = -REFRESH_SECONDS
        self._last_line = time.monotonic()
        self._total_steps = 0

    def begin_epoch(self, epoch: int, num_epochs: int, steps_per_epoch: int, step: int) -> None:
        """Start showing an epoch (from 1), possibly resumed at an optimizer step."""
        self._total_steps = num_epochs * steps_per_epoch
        self._epoch_text = f"epoch {epoch}/{num_epochs}"
        if not self.console.is_terminal:
            return
        self.stop()
        self._bar = Progress(
            TextColumn(f"{self.name:<12} {self._epoch_text}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=self._total_steps, completed=step, status="")
        self._bar.start()

    def step(self, step: int, loss: float | None, num_tokens: int, seconds: float) -> None:
        """Show a finished optimizer step. `loss` is None if it has not been read from the device yet."""
        if loss is not None:
            self._loss = loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * loss
        rate = num_tokens / max(seconds, 1e-9)
        self._rate = rate if self._rate == 0 else SMOOTHING * self._rate + (1 - SMOOTHING) * rate
        text = f"{'' if self._loss is None else f'loss {self._loss:.3f}  '}{self._rate:,.0f} tokens/s"
        if self._bar is not None:
            if time.monotonic() - self._last_look >= REFRESH_SECONDS:
                self._last_look = time.monotonic()
                self._memory_text = f"{read_used_bytes(self.device) / 2**30:.1f} GiB"
            self._bar.update(self._task, completed=step, status=f"{text}  {self._memory_text}")
        elif time.monotonic() - self._last_line > self.line_seconds:
            self._print(f"{self._epoch_text}  step {step:,}/{self._total_steps:,}  {text}")

    def end_epoch(self, values: dict[str, Any]) -> None:
        """Print the results of an epoch after its validation."""
        self.stop()
        best = " (best so far)" if values["is_best"] else ""
        self._print(
            f"{self._epoch_text}  training loss {values['train_loss']:.3f}  validation perplexity "
            f"{values['validation_perplexity']:,.1f}{best}  {self._rate:,.0f} tokens/s"
        )

    def note(self, text: str) -> None:
        """Print a line about something unusual."""
        self._print(text)

    def stop(self) -> None:
        """Remove the live view."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str) -> None:
        self._last_line = time.monotonic()
        self.console.print(f"{self.name:<12} {text}", highlight=False, soft_wrap=True)
