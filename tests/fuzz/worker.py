"""Feeds damaged files to readers, in a process of its own whose memory and time are bounded.

    python tests/fuzz/worker.py FOLDER COUNT SEED     damaged files, as many for each reader
    python tests/fuzz/worker.py FOLDER hostile        the files of `hostile.py`

Prints a line of JSON for every input that did not end well, and the counts for each reader at the end. An input ends
well where the reader comes back or raises a UserError of one line. What it may not do: raise anything else, take more
than 4 GB of memory or 10 s, write outside the folder that it reads, start a program, open a connection.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
from targets import Read, Target, build_targets, damage

from new_llm.config import UserError

MEMORY_BYTES = 4 << 30
SECONDS, CLOCK_SECONDS = 10.0, 60.0
"""Of the processor and, for a reader that waits for ever, of the clock: the machine may be busy with other work."""
MAX_LINE_CHARACTERS = 4000
FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "ctypes.dlopen")
WRITING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")


class TookTooLong(BaseException):
    """Raised by the alarm; nothing catches it."""


def raise_alarm(number: int, frame: object) -> None:
    raise TookTooLong


class Watch:
    """Notes what a reader does that it may not do; a hook stays for the rest of the process."""

    def __init__(self, *, hook: bool = True) -> None:
        self.allowed: str | None = None
        self.seen: list[str] = []
        self.message = ""
        if hook:
            sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple) -> None:
        if self.allowed is None:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments!r}"[:300])
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            if (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or set(arguments[1] or "") & set("wxa+"):
                self._check(event, arguments[0])
        elif event in WRITING:
            self._check(event, arguments[0])

    def _check(self, event: str, path: str | bytes | os.PathLike) -> None:
        real = os.path.realpath(os.fsdecode(path))
        if not f"{real}/".startswith((f"{self.allowed}/", "/dev/null/")):
            self.seen.append(f"{event} {real}")


def feed(read: Read, folder: Path, watch: Watch) -> str | None:
    """Let a reader read; what went wrong, or None. The second line on is the traceback."""
    watch.seen, watch.message, watch.allowed = [], "", str(folder.resolve())
    for number, clock, seconds in (
        (signal.SIGPROF, signal.ITIMER_PROF, SECONDS),
        (signal.SIGALRM, signal.ITIMER_REAL, CLOCK_SECONDS),
    ):
        signal.signal(number, raise_alarm)
        signal.setitimer(clock, seconds)
    try:
        read(folder)
    except UserError as error:
        message = watch.message = str(error)
        if "\n" in message or not message.strip() or len(message) > MAX_LINE_CHARACTERS:
            return f"its message is not one line: {message[:300]!r}"
    except TookTooLong:
        return f"took more than {SECONDS} s\n{traceback.format_exc()}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}\n{traceback.format_exc()}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        watch.allowed = None
    return f"did what it may not do: {watch.seen[0]}" if watch.seen else None


def limit_memory(target: str) -> None:
    """Of a report only what is written counts: the engine that draws its charts reserves 32 GB of addresses at once."""
    kind, other = (resource.RLIMIT_AS, resource.RLIMIT_DATA)[:: -1 if target == "report" else 1]
    resource.setrlimit(kind, (MEMORY_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(other, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, raw in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)


def print_json(**values: object) -> None:
    print(json.dumps(values), flush=True)


def check_hostile(place: Path, watch: Watch, targets: dict[str, Target]) -> None:
    """Read every file of `hostile`; a line of JSON for each, with its message."""
    from hostile import build_hostile_files

    limit_memory("")
    for name, hostile in build_hostile_files(targets).items():
        folder, began = place / "hostile", time.process_time()
        write_files(folder, {})
        hostile.make(folder)
        fault = feed(hostile.read, folder, watch)
        if not fault and (folder / "ran").exists():
            fault = "code was executed"
        if not fault and not re.search(hostile.message, watch.message or "read without complaint"):
            fault = f"expected {hostile.message!r}: {watch.message}"
        print_json(name=name, fault=fault, seconds=round(time.process_time() - began, 2), message=watch.message)


def check_damaged(place: Path, watch: Watch, targets: dict[str, Target], count: int, seed: str) -> None:
    """Read `count` damaged inputs, as many of each reader."""
    done: Counter[str] = Counter()
    folder = place / "input"
    for name, target in targets.items():
        write_files(folder, target.files)
        limit_memory(name)
        target.read(folder)  # what is valid, which loads what the reader needs
        for number in range(-(-count // len(targets))):
            file, raw = damage(target, random.Random(f"{seed} {name} {number}"))
            (folder / file).write_bytes(raw)
            if fault := feed(target.read, folder, watch):
                saved = place / "faults" / re.sub(r"\W+", "-", f"{name}-{number}") / Path(file).name
                saved.parent.mkdir(parents=True, exist_ok=True)
                saved.write_bytes(raw)
                print_json(target=name, number=number, file=str(saved), fault=fault)
            done[name] += 1
            names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
            if names != target.files.keys():  # a reader that writes a page, or cleans up as that of checkpoints does
                write_files(folder, target.files)
            (folder / file).write_bytes(target.files[file])
    print_json(done=done, total=sum(done.values()))


def main(place: Path, what: str, seed: str = "0") -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    targets, watch = build_targets(place / "build"), Watch()
    if what == "hostile":
        check_hostile(place, watch, targets)
    else:
        check_damaged(place, watch, targets, int(what), seed)
    print_json(peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
