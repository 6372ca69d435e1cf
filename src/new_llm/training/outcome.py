"""How a training ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class TrainingError(RuntimeError):
    """Training can't go on; the message says at which step and batch, and what to try."""


class TrainingInterrupted(KeyboardInterrupt):
    """Training was asked to stop (Ctrl-C, SIGTERM) and has saved a checkpoint.

    Attributes:
        folder: the model's folder in the run.
    """

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


@contextmanager
def interrupt_training(folder: Path) -> Iterator[None]:
    """Around the work on one model: an interrupt after its training is an interrupt of the training, which goes on.

    Args:
        folder: the model's folder in the run.

    Raises:
        TrainingInterrupted: a signal asked to stop.
    """
    try:
        yield
    except TrainingInterrupted:
        raise
    except KeyboardInterrupt:
        raise TrainingInterrupted(f"interrupted; what is done is in {folder}", folder) from None


@dataclass(frozen=True)
class TrainingResult:
    """How a training went; see `TrainerState` for the counters."""

    epochs: int
    best_epoch: int
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    stopped_early: bool
