"""Stop signals: Ctrl-C, SIGTERM and SIGUSR1 stop a training after its step, with a checkpoint."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""Ctrl-C, what systems send before they kill, and what some clusters send some time before that."""


class TrainingInterrupted(KeyboardInterrupt):
    """Training was asked to stop and has saved a checkpoint.

    Attributes:
        folder: the model's folder in the run.
    """

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


@contextmanager
def interrupt_training(folder: Path) -> Iterator[None]:
    """Around the work on one model: an interrupt outside its training can be resumed like one during it.

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
        raise TrainingInterrupted(f"interrupted; finished work is in {folder}", folder) from None


class StopSignals:
    """Whether a signal has asked to stop: call it to find out.

    Args:
        repeats_end: see `catch_stop_signals`.
    """

    def __init__(self, *, repeats_end: bool = True) -> None:
        self.repeats_end = repeats_end
        self._num_received = 0
        self._interrupts = False

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self._num_received > 0

    @contextmanager
    def interrupt(self) -> Iterator[None]:
        """Around work that can simply be repeated: a signal interrupts it at once, even one that came before.

        Raises:
            KeyboardInterrupt: a signal has come.
        """
        self._interrupts = True
        try:
            if self():
                raise KeyboardInterrupt
            yield
        finally:
            self._interrupts = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler."""
        self._num_received += 1
        if self._interrupts or (self._num_received > 1 and self.repeats_end):
            raise KeyboardInterrupt


@contextmanager
def catch_stop_signals(*, repeats_end: bool = True) -> Iterator[StopSignals]:
    """Inside the block `STOP_SIGNALS` only set a flag, which the loop checks.

    Args:
        repeats_end: a second signal ends the block at once. False under a launcher, which forwards to every process
            what the terminal has already sent it.
    """
    stop = StopSignals(repeats_end=repeats_end)
    try:
        before = {number: signal.signal(number, stop.note) for number in STOP_SIGNALS}
    except ValueError:  # not in the main thread, where signals do not arrive anyway
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
