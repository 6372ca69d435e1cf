"""Operations on the disk of which one fails, or is the first that the process does not live to see."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
