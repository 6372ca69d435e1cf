"""How training shows itself: a live bar on a terminal, a plain line an epoch elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """The progress of one model's training.

    Args:
        name: the model's name.
        console: where to draw; to a file or pipe it writes one line an epoch and, in long epochs, one a minute.
        line_seconds: seconds between two plain lines inside an epoch.
    """

    def __init__(self, name: str, console: Console, *, line_seconds: float = 60.0) -> None:
        self.name = name
        self.console = console
        self.line_seconds = line_seconds
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._loss: float | None = None
        self._rate = 0.0
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
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        done = step - (epoch - 1) * steps_per_epoch
        self._task = self._bar.add_task("", total=steps_per_epoch, completed=done, status="")
        self._bar.start()

    def step(self, step: int, loss: float, num_tokens: int, seconds: float) -> None:
        """An optimizer step is done. The loss shown is smoothed."""
        self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        rate = num_tokens / max(seconds, 1e-9)
        self._rate = rate if self._rate == 0 else 0.9 * self._rate + 0.1 * rate
        status = f"loss {self._loss:.3f}  {self._rate:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, advance=1, status=status)
        elif time.monotonic() - self._last_line > self.line_seconds:
            self._print(f"{self._epoch_text}  step {step:,}/{self._total_steps:,}  {status}")

    def end_epoch(self, values: dict[str, Any]) -> None:
        """An epoch has been validated."""
        self.stop()
        best = " (best so far)" if values["is_best"] else ""
        self._print(
            f"{self._epoch_text}  training loss {values['train_loss']:.3f}  validation perplexity "
            f"{values['validation_perplexity']:,.1f}{best}  {self._rate:,.0f} tokens/s"
        )

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str) -> None:
        self._last_line = time.monotonic()
        self.console.print(f"{self.name:<12} {text}", highlight=False, soft_wrap=True)
