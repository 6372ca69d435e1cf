"""Operations on the disk of which one fails, or is the first that the process does not live to see."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

OPERATIONS = ("replace", "fsync", "mkdir", "chmod", "open", "rmdir", "unlink")


@contextmanager
def stop_at(number: int, monkeypatch: pytest.MonkeyPatch, *, dies: bool) -> Iterator[list[str]]:
    """Let the operation of this number fail, as on a full disk, or end the process at once before it."""
    done: list[str] = []

    def wrap(name: str) -> Callable:
        original = getattr(os, name)

        def operate(*args, **options):
            done.append(name)
            if len(done) == number:
                if dies:
                    os._exit(9)
                raise OSError(28, "No space left on device")
            return original(*args, **options)

        return operate

    with monkeypatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, wrap(name))
        yield done


def stop_everywhere(act: Callable[[], object], monkeypatch: pytest.MonkeyPatch, *, dies: bool) -> Iterator[int]:
    """Act once for each operation, which is stopped there, until nothing is left to stop; the number after each time.

    With `dies` a child process acts each time, and dies.
    """
    number, is_whole = 0, False
    while not is_whole:
        number += 1
        if dies and (child := os.fork()):
            is_whole = os.waitpid(child, 0)[1] == 0
        else:
            with stop_at(number, monkeypatch, dies=dies) as done, suppress(OSError):
                act()
            if dies:
                os._exit(0)
            is_whole = len(done) < number
        yield number
