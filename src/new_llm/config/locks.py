"""Locks on files that the system keeps, and drops with the process that holds them, however that ends (`filelock`)."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from new_llm.config.errors import UserError

MAX_HOLDER_BYTES = 1024


@contextmanager
def hold_lock(path: Path, what: str, *, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Inside the block no other process is in such a block with the same path.

    Args:
        path: the lock's own file, which stays; its content says who holds it. Resolve links before, so that two names
            of one thing give one lock.
        what: what it guards, for messages: "runs/base".
        on_wait: told in one line, once, whom this process waits for; None: it does not wait.

    Raises:
        UserError: another process holds it and nobody wants to wait, or the lock's file can't be made.
    """
    lock = FileLock(path, thread_local=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            holder = describe_holder(path)
            if on_wait is None:
                raise UserError(f"{what}: {holder} is using it; try again when it has ended") from None
            on_wait(f"waiting for {holder}, which is using {what}")
            lock.acquire()
    except OSError as error:
        raise UserError(f"{path}: can't make the lock: {error.strerror or error}") from None
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(OSError):  # a full disk: the lock holds all the same
            path.write_text(json.dumps(holder))
        yield
    finally:
        lock.release()


def describe_holder(path: Path) -> str:
    """Who holds a lock: "another process (PID 123 on 'host', since 12:30)"."""
    try:
        with path.open("rb") as file:
            holder = json.loads(file.read(MAX_HOLDER_BYTES))
        place = f"PID {int(holder['pid'])} on {str(holder['host'])[:64]!r}, since {str(holder['since'])[:32]}"
        return f"another process ({place})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"


def try_lock(descriptor: int) -> bool:
    """Lock an open folder for this process; False where another one has it.

    Raises:
        OSError: the disk can't lock it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
