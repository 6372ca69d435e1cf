"""Writing files that are whole or not there at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from new_llm.config.locks import try_lock

ENDING = ".tmp"


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
        temporary.chmod(0o666 & ~_read_umask())
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

    A folder that stands there is moved aside first and removed last. A machine that dies between the two moves leaves
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
    """Inside the block: an empty folder `.name.….tmp` beside a path, locked for as long as this process lives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
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
    """Remove what killed processes have left of files and folders they were writing; never what a live one writes.

    Args:
        folder: where to look.
        name: of the file or folder that was being written; None: of any.

    Returns:
        What was removed.
    """
    start = "." if name is None else f".{name}."
    removed = list[Path]()
    for entry in _list_entries(folder):
        if entry.name.startswith(start) and entry.name.endswith(ENDING) and entry.is_dir(follow_symlinks=False):
            with suppress(OSError):  # gone by now, or on a disk without locks
                descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    if try_lock(descriptor):  # its writer has ended
                        shutil.rmtree(entry.path)
                        removed.append(Path(entry.path))
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


def _list_entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
