"""Giving a reader one input, and seeing what it does."""

import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from targets import Target

from new_llm.config import UserError

SECONDS = 10.0
MAX_LINE_CHARACTERS = 4000
FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "ctypes.dlopen")
WRITING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")


class TookTooLong(BaseException):
    """Raised by the alarm; nothing catches it."""


def raise_alarm(number: int, frame: object) -> None:
    """What the clock does to a reader that takes too long."""
    raise TookTooLong


class Watch:
    """Notes what a reader does that it may not do."""

    def __init__(self) -> None:
        self.allowed: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple) -> None:
        if self.allowed is None:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments!r}"[:300])
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            mode, flags = arguments[1], arguments[2]
            if (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or (mode and set(mode) & set("wxa+")):
                self._check(event, arguments[0])
        elif event in WRITING:
            self._check(event, arguments[0])

    def _check(self, event: str, path: str | bytes | os.PathLike) -> None:
        real = os.path.realpath(os.fsdecode(path))
        if self.allowed is not None and not f"{real}/".startswith((self.allowed + "/", "/dev/null/")):
            self.seen.append(f"{event} {real}")


def feed(target: Target, folder: Path, watch: Watch) -> str | None:
    """Let the target read; what went wrong, or None. The second line on is the traceback."""
    watch.seen, watch.allowed = [], str(folder.resolve())
    began = time.perf_counter()
    signal.signal(signal.SIGALRM, raise_alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        target.read(folder)
    except UserError as error:
        message = str(error)
        if "\n" in message or not message.strip() or len(message) > MAX_LINE_CHARACTERS:
            return f"its message is not one line: {message[:300]!r}"
    except TookTooLong:
        return f"took more than {SECONDS} s\n{traceback.format_exc()}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}\n{traceback.format_exc()}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        watch.allowed = None
    if time.perf_counter() - began > SECONDS:
        return f"took {time.perf_counter() - began:.1f} s"
    return f"did what it may not do: {watch.seen[0]}" if watch.seen else None


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, raw in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)


class Silent(Watch):
    """Watches nothing: a hook can't be taken away again from a process that runs other tests."""

    def __init__(self) -> None:
        self.allowed, self.seen = None, []
