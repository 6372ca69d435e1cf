"""Being asked to stop, at a place of one's own choosing."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""Ctrl-C, what systems send before they kill, and what some clusters send some time before that."""


class StopSignals:
    """Whether Ctrl-C, SIGTERM or SIGUSR1 has asked to stop: call it to know.

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
        """Inside the block, where nothing is lost by it, a signal interrupts at once; so does one that has come before.

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
    """Inside the block `STOP_SIGNALS` only set a flag, which the loop asks for.

    Args:
        repeats_end: a second one ends the block at once. Not so under a launcher, which passes on what the terminal has
            sent already.
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
