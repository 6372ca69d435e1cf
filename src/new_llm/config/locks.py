"""Locks on files that the system keeps, and drops with the process that holds them, however that ends.

`flock` is advisory: it keeps out those who ask. It is dropped by the kernel, so that a process killed by SIGKILL leaves
no lock behind, and it holds between the machines that share a network disk where that disk supports it.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from new_llm.config.errors import UserError

POLL_SECONDS = 0.2
HELD = (errno.EAGAIN, errno.EACCES)
UNKNOWN = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What disks answer that know no locks: there nothing keeps two processes apart."""
MAX_HOLDER_BYTES = 1024


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder for this process; False where another one has it.

    Raises:
        OSError: the disk can't lock it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        raise
    return True


@contextmanager
def hold_lock(path: Path, what: str, *, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Inside the block no other process is in such a block with the same path.

    Args:
        path: the lock's own file, which is made and removed; never the file that is guarded.
        what: what it guards, for messages: "runs/base".
        on_wait: told in one line, once, whom this process waits for; None: it does not wait.

    Raises:
        UserError: another process holds it and nobody wants to wait, or the lock's file can't be made.
    """
    descriptor = _take(path, what, on_wait)
    try:
        yield
    finally:
        # Removed while it is held: whoever has opened the file by now sees that it has lost its name.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def describe_holder(path: Path) -> str:
    """Who holds a lock: "process 123 on host since 12:30"."""
    try:
        with path.open("rb") as file:
            holder = json.loads(file.read(MAX_HOLDER_BYTES))
        return f"process {int(holder['pid'])} on {str(holder['host'])[:64]!r} since {str(holder['since'])[:32]}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"


def _take(path: Path, what: str, on_wait: Callable[[str], None] | None) -> int:
    told = False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise UserError(f"{path}: the lock can't be made: {error.strerror}") from None
        is_ours = False
        try:
            if is_ours := _has_taken(descriptor, path):
                return descriptor
        finally:
            if not is_ours:
                os.close(descriptor)
        if on_wait is None:
            raise UserError(f"{what}: {describe_holder(path)} is at work on it; try again when it has ended")
        if not told:
            on_wait(f"waiting for {describe_holder(path)}, which is at work on {what}")
            told = True
        time.sleep(POLL_SECONDS)


def _has_taken(descriptor: int, path: Path) -> bool:
    """Lock, see that the file has not been removed in between, and write down who holds it."""
    try:
        if not try_lock(descriptor):
            return False
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise
    try:
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return False
    except FileNotFoundError:
        return False
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    return True
