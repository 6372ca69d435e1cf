"""How training shows itself: a live view on a terminal, a plain line an epoch elsewhere."""

import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from new_llm.training.metrics import read_memory

BLOCKS = "▁▂▃▄▅▆▇█"
MAX_POINTS = 24  # of the sparkline; when it is full, two points become one
SMOOTHING = 0.9  # share of the old value in a smoothed loss or rate
REFRESH_SECONDS = 0.5  # between two looks at the process's memory


class Sparkline:
    """The whole course of a number in a few characters, however long it gets."""

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        self.max_points = max_points
        self._points: list[float] = []
        self._sum, self._count, self._per_point = 0.0, 0, 1

    def add(self, value: float) -> None:
        """One more value; a point is the mean of as many as fit the width."""
        self._sum += value
        self._count += 1
        if self._count < self._per_point:
            return
        self._points.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._points) > self.max_points:
            pairs = zip(self._points[::2], self._points[1::2], strict=False)
            rest = self._points[-1:] if len(self._points) % 2 else []
            self._points = [(a + b) / 2 for a, b in pairs]
            self._per_point *= 2
            if rest:  # half of the next point
                self._sum, self._count = rest[0] * self._per_point / 2, self._per_point // 2

    def __str__(self) -> str:
        if not self._points:
            return ""
        low, high = min(self._points), max(self._points)
        scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
        return "".join(BLOCKS[round((point - low) * scale)] for point in self._points)


class TrainingProgress:
    """The progress of one model's training.

    Args:
        name: the model's name.
        console: where to draw; to a file or pipe it writes one line an epoch and, in long epochs, one a minute.
        device: whose memory is shown; None: the CPU's.
        line_seconds: seconds between two plain lines inside an epoch.
    """

    def __init__(
        self, name: str, console: Console, *, device: torch.device | None = None, line_seconds: float = 60.0
    ) -> None:
        self.name = name
        self.console = console
        self.device = device or torch.device("cpu")
        self.line_seconds = line_seconds
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._loss: float | None = None
        self._losses = Sparkline()
        self._rate = 0.0
        self._memory_text = ""
        self._last_look = -REFRESH_SECONDS
        self._last_line = time.monotonic()
        self._total_steps = 0

    def begin_epoch(self, epoch: int, num_epochs: int, steps_per_epoch: int, step: int) -> None:
        """An epoch (from 1) begins or goes on at an optimizer step."""
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
        """An optimizer step is done; its loss may not have been read. The loss shown is smoothed."""
        if loss is not None:
            self._loss = loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * loss
            self._losses.add(self._loss)
        rate = num_tokens / max(seconds, 1e-9)
        self._rate = rate if self._rate == 0 else SMOOTHING * self._rate + (1 - SMOOTHING) * rate
        loss_text = "" if self._loss is None else f"loss {self._loss:.3f}  "
        if self._bar is not None:
            self._look_at_memory()
            status = f"{self._losses} {loss_text}{self._rate:,.0f} tokens/s  {self._memory_text}"
            self._bar.update(self._task, completed=step, status=status)
        elif time.monotonic() - self._last_line > self.line_seconds:
            self._print(
                f"{self._epoch_text}  step {step:,}/{self._total_steps:,}  {loss_text}{self._rate:,.0f} tokens/s"
            )

    def end_epoch(self, values: dict[str, Any]) -> None:
        """An epoch has been validated."""
        self.stop()
        best = " (best so far)" if values["is_best"] else ""
        self._print(
            f"{self._epoch_text}  training loss {values['train_loss']:.3f}  validation perplexity "
            f"{values['validation_perplexity']:,.1f}{best}  {self._rate:,.0f} tokens/s"
        )

    def note(self, text: str) -> None:
        """Say something out of the ordinary, in one line."""
        self._print(text)

    def stop(self) -> None:
        """Take the live view away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _look_at_memory(self) -> None:
        if time.monotonic() - self._last_look >= REFRESH_SECONDS:
            self._last_look = time.monotonic()
            self._memory_text = f"{read_memory(self.device) / 2**30:.1f} GiB"

    def _print(self, text: str) -> None:
        self._last_line = time.monotonic()
        self.console.print(f"{self.name:<12} {text}", highlight=False, soft_wrap=True)
