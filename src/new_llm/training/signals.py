"""Being asked to stop, at a place of one's own choosing."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def catch_stop_signals(*, repeats_end: bool = True) -> Iterator[Callable[[], bool]]:
    """Inside the block Ctrl-C and SIGTERM only set a flag, which the loop asks for.

    Args:
        repeats_end: a second one ends the block at once. Not so under a launcher, which passes on what the terminal has
            sent already.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1 and repeats_end:
            raise KeyboardInterrupt

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where signals do not arrive anyway
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
