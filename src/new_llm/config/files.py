"""Reading files safely, writing them atomically, manifests, and locks.

Reading rejects devices, endless files and bad UTF-8. In writing, a file or folder gets its name only when it is
complete and on the disk. A manifest holds the size and sha256 of every file in a folder, to detect incomplete and
changed files. The system releases a lock when the process that holds it ends, however it ends.
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
"""Limit for results, records, structures and index files, which have a few megabytes at most."""
MAX_ERROR_CHARACTERS = 300


def check_regular_file(path: Path) -> None:
    """Reject a missing file, a folder, and a device or pipe, which could be endless or never answer."""
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
    """The content of a JSON file; other content is a `UserError`."""
    text = read_text_file(path, MAX_JSON_BYTES)
    try:
        return load_json(text)
    except ValueError as error:
        raise UserError(shorten(f"{path}: not valid JSON: {error}")) from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The object in a JSON file; other content is a `UserError`."""
    values = read_json_file(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping, found {type(values).__name__}")
    return values


def load_json(text: str) -> Any:
    """Parse JSON that another program may have written.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has a duplicate key, of which another reader might take
            the other value.
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
    """Bytes of address space that this process may use (`ulimit -v`); None: no limit."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def shorten(message: str) -> str:
    """One line of bounded length without control characters."""
    line = make_line(message)
    return line if len(line) <= MAX_ERROR_CHARACTERS else line[: MAX_ERROR_CHARACTERS - 1] + "…"


ENDING = ".tmp"
WAYS_ON = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space; then continue a run with --resume"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "choose another folder, or change its permissions"),
    errno.EROFS: "choose a folder on another disk",
    errno.EIO: "the disk may be failing",
}
"""What a user can do about an error of the system, by its number."""
_NUMBER = re.compile(r"\(os error (\d+)\)")


def describe_os_error(error: OSError) -> str:
    """One line for an error of the system: the file, the reason, and what to do about it."""
    place = f"{error.filename}: " if error.filename else ""
    way = f": {WAYS_ON[error.errno]}" if error.errno in WAYS_ON else ""
    return f"{place}{error.strerror or error or type(error).__name__}{way}"


@contextmanager
def name_refusals(path: Path) -> Iterator[None]:
    """While the block writes `path`: turn failures of the system into an `OSError` with its number and this path.

    Errors can come with no path or a temporary one, with the number in words (libraries written in Rust), or behind
    another error (torch.save).
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
    """Yield a temporary path next to `path`; at the end of the block it is flushed to disk and replaces `path`.

    An error in the block leaves `path` unchanged and removes the temporary file. Leftovers of a killed process are
    removed when the same file is written again.
    """
    # In a folder, because some libraries write temporary files of their own next to the file.
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
    """Yield a temporary folder next to `path`; at the end of the block it is flushed to disk and replaces `path`.

    An existing folder is moved away first and deleted last. If the machine dies between the two moves, neither is at
    `path`; write data that must not be lost under a new name instead.
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
    """Remove a folder if it exists, all at once: a process killed meanwhile does not leave half of it."""
    if path.exists():
        with make_temporary_folder(path) as folder:
            path.replace(folder / path.name)


@contextmanager
def make_temporary_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder `.name.….tmp` next to `path`, locked while the block runs, and removed after it.

    Raises:
        OSError: writing there, or in the block, failed; it names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    with name_refusals(path):
        while True:
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=ENDING, dir=path.parent))
            try:
                mark = os.open(folder, os.O_RDONLY)
            except FileNotFoundError:
                continue  # another process took it for a leftover before it was locked
            except OSError:
                folder.rmdir()
                raise
            with suppress(OSError):  # a disk without locks, where leftovers are not removed
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
    """Remove the temporary folders that killed processes left in a folder; returns their paths.

    Only those of the file or folder `name`; None: all. Those of live processes stay.
    """
    start = "." if name is None else f".{name}."
    removed = list[Path]()
    for path in sorted(folder.glob(f"{glob.escape(start)}*{ENDING}")):
        with suppress(OSError):  # a file or link, already gone, or on a disk without locks
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
    """The hash of a file's content in hexadecimal; `digest` as for `hashlib.file_digest`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, digest).hexdigest()


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`, the last file of a folder: the size and sha256 of each file in it."""
    files = {
        path.relative_to(folder).as_posix(): {"num_bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST_FILE
    }
    (folder / MANIFEST_FILE).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def check_manifest(folder: Path) -> list[str]:
    """The faults of a folder that has a manifest, e.g. "a.bin is missing"; empty: everything is as written."""
    if not (folder / MANIFEST_FILE).exists():
        return [f"{MANIFEST_FILE} is missing"]
    try:
        files = read_json_file(folder / MANIFEST_FILE)["files"].items()
        faults = ((name, _find_fault(folder / name, entry["num_bytes"], entry["sha256"])) for name, entry in files)
        return [f"{name} {fault}" for name, fault in faults if fault is not None]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST_FILE} can't be read"]


def _find_fault(path: Path, num_bytes: Any, sha256: Any) -> str | None:
    """A file's fault, as words that follow its name; None: no fault."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return "is not a regular file"
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
    """Hold a lock while the block runs: no other process can be in such a block with the same path.

    Args:
        path: the lock file, which is kept; its content says who holds the lock. Resolve links first, so that two names
            of the same thing share a lock.
        what: what the lock guards, for messages: "runs/base".
        on_wait: called once, with a line that says for whom this process waits; None: don't wait, raise `UserError`.
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
        with suppress(OSError):  # a full disk; the lock works without the note
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
    """Lock an open folder; False if another process holds the lock. Raises OSError on a disk without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
