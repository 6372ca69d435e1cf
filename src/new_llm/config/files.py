"""Files that are whole or not there at all, files from elsewhere read in bounded memory, and locks.

First reading: no device, no endless file, no bad UTF-8; `shorten` makes one plain line of what an error quotes. Then
writing: a file or folder takes its name only when it is complete and on the disk. Then manifests, the size and sha256
of every file of a folder, by which torn and changed files are found. Last locks, which the system drops with the
process that holds them, however that ends.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import resource
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from new_llm.config.errors import UserError
from new_llm.config.terminal import make_line

MAX_JSON_BYTES = 1 << 26
"""Of results, records, structures and index files; those of the largest models and studies have a few megabytes."""
MAX_ERROR_CHARACTERS = 300


def check_regular_file(path: Path) -> None:
    """Refuse a folder, a device or a pipe, which could be without end or never answer, and what isn't there."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(shorten(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}")) from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: not a regular file")


def read_text_file(path: Path, max_bytes: int) -> str:
    """The text of a regular file."""
    check_regular_file(path)
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror or error}") from None
    if len(raw) > max_bytes:
        raise UserError(f"{path}: more than {max_bytes:,} bytes; such files are smaller")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: can't be read as text: not UTF-8: 0x{raw[error.start]:02x} at byte {error.start}"
        ) from None


def read_json_file(path: Path) -> Any:
    """What a JSON file holds; errors as of `read_text_file`, and where it is not JSON."""
    text = read_text_file(path, MAX_JSON_BYTES)
    try:
        return load_json(text)
    except ValueError as error:
        raise UserError(shorten(f"{path}: not valid JSON: {error}")) from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; errors as of `read_json_file`, and where it holds something else."""
    values = read_json_file(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping, found {type(values).__name__}")
    return values


def load_json(text: str) -> Any:
    """What JSON from elsewhere holds.

    Raises:
        ValueError: it is not JSON, it is nested too deeply, or an object has a key twice, of which another reader
            might see the other value.
    """

    def make(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(values := dict(pairs)) < len(pairs):
            raise ValueError("duplicate key")
        return values

    try:
        return json.loads(text, object_pairs_hook=make)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_address_limit() -> int | None:
    """Bytes of addresses that this process may use (`ulimit -v`); None: no limit."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def shorten(message: str) -> str:
    """One line of bounded length without control characters."""
    line = make_line(message)
    return line if len(line) <= MAX_ERROR_CHARACTERS else line[: MAX_ERROR_CHARACTERS - 1] + "…"


ENDING = ".tmp"
WAYS_ON = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space; a run then continues by --resume"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "choose another folder, or change its permissions"),
    errno.EROFS: "choose a folder on another disk",
    errno.EIO: "the disk may be failing",
}
"""What a user can do about what the system refuses."""
_NUMBER = re.compile(r"\(os error (\d+)\)")


def describe_os_error(error: OSError) -> str:
    """What the system refused, where, and the way on: one line."""
    place = f"{error.filename}: " if error.filename else ""
    way = f": {WAYS_ON[error.errno]}" if error.errno in WAYS_ON else ""
    return f"{place}{error.strerror or error or type(error).__name__}{way}"


@contextmanager
def name_refusals(path: Path) -> Iterator[None]:
    """Around writing: what the system refuses is an OSError that names `path`, whoever raises it.

    Files that are still written know no path or a temporary one, libraries written in Rust give the number in words,
    and torch.save raises an error of its own over that of the file.

    Raises:
        OSError: with the system's number and a path.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        refused = error.__context__ if isinstance(error, RuntimeError) else error
        found = _NUMBER.search(str(error))
        number = refused.errno if isinstance(refused, OSError) else int(found[1]) if found else None
        place = str(getattr(refused, "filename", None) or "")
        if number is None or (ENDING not in place if place else number not in WAYS_ON):
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """A temporary path on `path`'s disk; at the block's end it is flushed to disk and takes `path`'s place.

    An error inside the block leaves `path` as it was and removes the temporary file. What a killed process has left is
    removed by whoever writes the same file next.
    """
    # A folder of its own also takes in the temporary files of the libraries that write, which replace the file.
    with make_temporary_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        os.umask(mask := os.umask(0))  # it can only be read by setting it
        temporary.chmod(0o666 & ~mask)
        sync_to_disk(temporary)
        temporary.replace(path)
        sync_to_disk(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text through `write_atomically`."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def write_folder_atomically(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`; at the block's end its files are flushed and it takes `path`'s place.

    An existing folder is moved aside first and removed last. A machine that dies between the two moves leaves
    none: what must not be lost is not to be replaced, but written under a name of its own.
    """
    with make_temporary_folder(path) as folder:
        temporary = folder / path.name
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            sync_to_disk(file)
        sync_to_disk(temporary)
        if path.exists():
            path.replace(folder / f"{path.name}.aside")
        temporary.replace(path)
        sync_to_disk(path.parent)


def remove_folder_atomically(path: Path) -> None:
    """Remove a folder, if it is there: it is gone whole, so that a process killed meanwhile leaves no half of it."""
    if path.exists():
        with make_temporary_folder(path) as folder:
            path.replace(folder / path.name)


@contextmanager
def make_temporary_folder(path: Path) -> Iterator[Path]:
    """Inside the block: an empty folder `.name.….tmp` beside a path, locked for as long as this process lives.

    Raises:
        OSError: the system refuses to write there, or inside the block; it names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    with name_refusals(path):
        while True:
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=ENDING, dir=path.parent))
            try:
                mark = os.open(folder, os.O_RDONLY)
            except FileNotFoundError:
                continue  # taken for a leftover by another process before it was locked, as below
            except OSError:
                folder.rmdir()
                raise
            with suppress(OSError):  # a disk without locks, where nobody takes it for a leftover
                try_lock(mark)
            if folder.exists():
                break
            os.close(mark)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(mark)


def remove_leftovers(folder: Path, name: str | None = None) -> list[Path]:
    """Remove what killed processes have left of the file or folder of this name (None: of any) in a folder.

    What a live process is writing stays. Returns what was removed.
    """
    start = "." if name is None else f".{name}."
    removed = list[Path]()
    for path in sorted(folder.glob(f"{glob.escape(start)}*{ENDING}")):
        with suppress(OSError):  # a file or a link, gone by now, or on a disk without locks
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if try_lock(descriptor):  # its writer has ended
                    shutil.rmtree(path)
                    removed.append(path)
            finally:
                os.close(descriptor)
    return removed


def sync_to_disk(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


MANIFEST_FILE = "manifest.json"


def hash_file(path: Path, digest: Any = "sha256") -> str:
    """The content of a file as a hash in hexadecimal; `digest` as for `hashlib.file_digest`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, digest).hexdigest()


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`, the last file of a folder: size and sha256 of each that it holds by now."""
    files = {
        path.relative_to(folder).as_posix(): {"num_bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST_FILE
    }
    (folder / MANIFEST_FILE).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def check_manifest(folder: Path) -> list[str]:
    """What is wrong with a folder that `write_manifest` closed, its manifest included; none: all is as written."""
    if not (folder / MANIFEST_FILE).exists():
        return [f"{MANIFEST_FILE} is missing"]
    try:
        files = read_json_file(folder / MANIFEST_FILE)["files"].items()
        faults = ((name, _find_fault(folder / name, entry["num_bytes"], entry["sha256"])) for name, entry in files)
        return [f"{name} {fault}" for name, fault in faults if fault is not None]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST_FILE} can't be read"]


def _find_fault(path: Path, num_bytes: Any, sha256: Any) -> str | None:
    """What is wrong with a file, in a few words that follow its name; None: nothing."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return "is no file"
        if found.st_size != num_bytes:  # without reading it
            return f"has {found.st_size:,} bytes instead of {num_bytes:,}"
        return None if hash_file(path) == sha256 else "has changed since it was written (sha256)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"can't be read: {error.strerror or error}"


# Locks


MAX_HOLDER_BYTES = 1024


@contextmanager
def hold_lock(path: Path, what: str, *, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Inside the block no other process is in such a block with the same path.

    Args:
        path: the lock's own file, which stays; its content says who holds it. Resolve links before, so that two names
            of one thing give one lock.
        what: what it guards, for messages: "runs/base".
        on_wait: called once with one line that says whom this process waits for; None: it does not wait.
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
        raise UserError(f"can't make the lock {describe_os_error(error)}") from None
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
    """Lock an open folder for this process; False where another one has it. A disk without locks raises OSError."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
