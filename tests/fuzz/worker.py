"""Feeds damaged and hostile files to readers, and finds what does not end well.

An input ends well where the reader comes back or raises a UserError of one line. What it may not do: raise anything
else, take more than 4 GB of memory or 10 s, write outside the folder that it reads, start a program, open a connection.
"""

import copy
import gzip
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hostile import HOSTILE
from targets import Read, build_targets

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
    """Notes what a reader does that it may not do, while `allowed` names its folder; for the rest of the process."""

    def __init__(self) -> None:
        self.allowed: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        writes = event in WRITING
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            writes = (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or {*(arguments[1] or "")} & {*"wxa+"}
        real = os.path.realpath(os.fsdecode(arguments[0])) if writes else ""
        if event in FORBIDDEN or (writes and not f"{real}/".startswith((f"{self.allowed}/", "/dev/null/"))):
            self.seen.append(f"{event} {real or arguments!r}"[:300])


def feed(read: Read, folder: Path, expected: str | None = None, watch: Watch | None = None) -> str | None:
    """Let a reader read, which must refuse in `expected` words if there are any; what went wrong and the traceback."""
    signal.signal(signal.SIGPROF, raise_alarm)
    signal.signal(signal.SIGALRM, raise_alarm)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, CLOCK_SECONDS)
    message = "read without complaint"
    if watch is not None:
        watch.seen, watch.allowed = [], str(folder.resolve())
    try:
        read(folder)
    except UserError as error:
        message = str(error)
        if "\n" in message or not message.strip() or len(message) > MAX_LINE_CHARACTERS:
            return f"its message is not one line: {message[:300]!r}"
    except TookTooLong:
        return f"took more than {SECONDS} s\n{traceback.format_exc()}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}\n{traceback.format_exc()}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if watch is not None:
            watch.allowed = None
    if watch is not None and watch.seen:
        return f"did what it may not do: {watch.seen[0]}"
    return None if expected is None or re.search(expected, message) else f"expected {expected!r}: {message}"


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, raw in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)


def check_hostile(place, targets, skipped=(), watch=None) -> Iterator[dict[str, Any]]:
    """What went wrong with each spoiled target, if anything; names with a word of `skipped` are left out."""
    folder = place / "hostile"
    cases = [(f"{target}: {name}", target, *case) for target, found in HOSTILE.items() for name, *case in found]
    for name, target, change, message in cases:
        if target in targets and not any(word in name for word in skipped):
            write_files(folder, targets[target].files)
            change(folder)
            fault = feed(targets[target].read, folder, message, watch)
            if (folder / "ran").exists():
                fault = "code was executed"
            yield {"name": name, "fault": fault}


def check_damaged(place, targets, count, seed, watch=None, prepare=lambda name: None) -> Iterator[dict[str, Any]]:
    """The faults of `count` damaged inputs for each reader; `prepare` is called before each reader."""
    folder = place / "input"
    for name, target in targets.items():
        write_files(folder, target.files)
        prepare(name)
        target.read(folder)  # what is valid, which loads what the reader needs
        for number in range(count):
            rng = random.Random(f"{seed} {name} {number}")
            file = rng.choice(target.changed or tuple(target.files))
            (folder / file).write_bytes(damage(file, target.files[file], rng))
            if fault := feed(target.read, folder, watch=watch):
                yield {"name": f"{name} {number}", "fault": fault}
            names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
            if names != target.files.keys():  # a reader that writes a page, or cleans up as that of checkpoints does
                write_files(folder, target.files)
            (folder / file).write_bytes(target.files[file])


def limit_memory(target: str) -> None:
    """Of a report only what is written counts: the engine that draws its charts reserves 32 GB of addresses at once."""
    kind, other = (resource.RLIMIT_AS, resource.RLIMIT_DATA)[:: -1 if target == "report" else 1]
    resource.setrlimit(kind, (MEMORY_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(other, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def find_faults(place: Path, what: str, seed: str = "0") -> list[dict[str, Any]]:
    """All faults of `hostile` files or of so many damaged ones; limits and watches its process, which ends with it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    targets, watch = build_targets(place / "build"), Watch()
    if what == "hostile":
        limit_memory("")
        return [found for found in check_hostile(place, targets, watch=watch) if found["fault"]]
    return list(check_damaged(place, targets, -(-int(what) // len(targets)), seed, watch, limit_memory))


# Damage done to valid files: to their bytes, to the values of their JSON, to what a header says


EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**53, 2**63 - 1, 2**64 - 1)
WORDS = (b"NaN", b"-Infinity", b"1e999", b"null", b"9" * 400, b"../../etc/passwd", b"/dev/zero", b"\x00", b"\xff\xfe",
         b"\xed\xa0\x80", b"\\ud800", b"\r\n", b"A" * 5000, b"[" * 3000, b'{"a":' * 2000, b"\x1b[2J")  # fmt: skip
VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**9, 10**30, -(10**30), 0.5, 1e308, float("nan"), float("inf"), "",
    "x", "../../x", "\x00", "\ud800", "9" * 50, "a" * 3000, [], {}, [[]], [None] * 50, {"a": 1}, {"": {}},
    [1.5, "x", {}], "NaN", "1e999", [[[[[[[[]]]]]]]], "F32", "I64", [1, -1], [10**12, 10**12])  # fmt: skip


def damage(name: str, raw: bytes, rng: random.Random) -> bytes:
    """A file of this name, damaged: by its form where it has one, as often byte by byte."""
    if rng.random() < 0.5:
        if name.endswith(".json"):
            return damage_json(raw, rng)
        if name.endswith(".jsonl"):
            lines = raw.splitlines()
            place = rng.randrange(len(lines))
            lines[place] = damage_json(lines[place], rng)
            return b"\n".join(lines)
        if name.endswith(".gz"):
            return gzip.compress(damage_bytes(gzip.decompress(raw), rng))
        if name.endswith(".safetensors"):
            # Another header before the same tensors, with the right length or a wrong one.
            length = int.from_bytes(raw[:8], "little")
            text = damage_json(raw[8 : 8 + length], rng)
            claimed = len(text) if rng.random() < 0.9 else rng.choice(EXTREMES)
            return claimed.to_bytes(8, "little") + text + raw[8 + length :]
    return damage_bytes(raw, rng)


def damage_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Some pieces cut out, replaced or inserted: random bytes, harmful words, extreme numbers, repetitions."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        numbers = list(re.finditer(rb"-?\d+(\.\d+)?", raw[:20_000])) if rng.random() < 0.1 else []
        near = min(len(raw), 128)  # headers and footers, which are believed first, more often
        start = rng.choice((rng.randrange(len(raw) + 1), rng.randrange(near + 1), len(raw) - rng.randrange(near + 1)))
        size = rng.choice((0, 1, 1, 2, 4, 8, 100, len(raw)))
        extreme = rng.choice(EXTREMES)
        pieces = (
            b"",
            rng.randbytes(size % 5000),
            rng.choice(WORDS),
            (extreme % (1 << 8 * min(size, 8))).to_bytes(min(size, 8), rng.choice(("little", "big"))),
            raw[start : start + 64] * rng.choice((1, 20)),
        )
        piece = rng.choice(pieces)
        if numbers:
            (start, end), piece = rng.choice(numbers).span(), str(extreme).encode()
            size = end - start
        raw = raw[:start] + piece + raw[start + size :]
    return raw


def damage_json(raw: bytes, rng: random.Random) -> bytes:
    """JSON text with some entries replaced, removed, repeated or renamed, at times with a duplicate key."""
    value = json.loads(raw)
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = rng.choice([*walk(value)] or [([value], 0)])
        kind = rng.random()
        if kind < 0.65:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind < 0.8:
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        else:
            holder[rng.choice(("x", "../x", "", str(key) * 2))] = copy.deepcopy(holder[key])
    text = json.dumps(value).encode("utf-8", "surrogatepass")
    return re.sub(rb'"(\w+)": ', lambda m: m[0] + b"0, " + m[0], text, count=1) if rng.random() < 0.15 else text


def walk(value: Any) -> Iterator[tuple[Any, Any]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(entries):
        yield value, key
        yield from walk(entry)
