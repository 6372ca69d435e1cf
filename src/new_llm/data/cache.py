"""The token cache: a folder of shards for a source, tokenizer and limits, built under a lock and checked when read."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from new_llm.config import DataConfig, UserError
from new_llm.config.atomic import remove_leftovers
from new_llm.config.locks import hold_lock
from new_llm.config.manifest import describe_file
from new_llm.data.sealed import read_sealed, write_sealed
from new_llm.data.shards import INDEX_COLUMNS, SPLITS, load_split, merge_index, read_records, record_path
from new_llm.data.tokenizer import TOKENIZER_FILE, read_tokenizer_file
from new_llm.data.tokens import TokenSplit

FORMAT_VERSION = 2  # of the folder's files and of how documents become tokens; another version is another key
META_FILE = "meta.json"
PLAN_FILE = "plan.json"
VERIFIED_FILE = "verified.json"
"""Size and time of every file whose checksum was found right. Losing it costs only another look."""


@dataclass(frozen=True)
class CacheEntry:
    """What a cache folder holds."""

    splits: dict[str, TokenSplit]
    tokenizer: Tokenizer
    meta: dict[str, Any]
    """What the builder noted, under `shards` what each shard holds, and under `files` the size and sha256 of every
    file."""


Build = Callable[[Path], dict[str, Any]]
"""Given the cache's folder, with the good shards of an earlier attempt in it: writes the tokenizer and the shards that
are missing, and returns what `meta` is to hold."""


def cache_folder(config: DataConfig) -> Path:
    """The folder of the token caches: config.cache_dir, $NEW_LLM_CACHE or ~/.cache/new-llm."""
    return (config.cache_dir or Path(os.environ.get("NEW_LLM_CACHE") or "~/.cache/new-llm")).expanduser()


def cache_key(parts: dict[str, Any]) -> str:
    """A short hash of everything that decides a cache's content."""
    text = json.dumps({"format": FORMAT_VERSION, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load_or_build(root: Path, key: str, build: Build, verify_bytes: int | None) -> CacheEntry:
    """Load the cache with this key, or build what it lacks: absent, torn and damaged files are named and made anew.

    A second process that wants the same cache waits, says so in a line, and uses what the first has built.

    Args:
        root: the folder of all caches.
        key: from `cache_key`.
        build: see `Build`.
        verify_bytes: of a larger cache only changed files are hashed; None: all are.

    Raises:
        UserError: the folder can't be written.
    """
    folder = root / key
    if (entry := _load(folder, verify_bytes, say=None)) is not None:
        return entry
    try:
        root.mkdir(parents=True, exist_ok=True)
        with hold_lock(root / f".{key}.lock", f"the token cache {folder}", on_wait=_say):
            if (entry := _load(folder, verify_bytes, say=_say)) is not None:
                return entry
            _remove_bad_shards(folder, verify_bytes)
            folder.mkdir(exist_ok=True)
            try:
                meta = build(folder)
            except BaseException:
                _remove_bad_shards(folder, verify_bytes)  # of a small source nothing is left behind
                raise
            _close(folder, meta)
            entry = _load(folder, None, say=_say)
    except OSError as error:
        raise UserError(
            f"{root}: the token cache can't be written: {error.strerror or error} ({error.filename or folder})"
        ) from None
    if entry is None:
        raise UserError(f"{folder}: the token cache was damaged while it was written")
    return entry


def _say(line: str) -> None:
    print(f"new-llm: {line}", file=sys.stderr, flush=True)


def _close(folder: Path, meta: dict[str, Any]) -> None:
    """Write the splits' index and the list of all files, which makes the cache complete."""
    records = [record for _, record in sorted(read_records(folder).items())]
    for split in SPLITS:
        merge_index(folder, records, split)
    files = {name: file for record in records for name, file in record["files"].items()}
    own = (TOKENIZER_FILE, *(f"{split}.{name}.npy" for split in SPLITS for name in INDEX_COLUMNS))
    files |= {name: describe_file(folder / name) for name in own}
    meta = meta | {
        "shards": [{"index": record["index"], "splits": record["splits"]} for record in records],
        "files": files,
    }
    write_sealed(folder / META_FILE, meta)


def _load(folder: Path, verify_bytes: int | None, say: Callable[[str], None] | None) -> CacheEntry | None:
    meta = read_sealed(folder / META_FILE)
    if meta is None:
        if say and (folder / META_FILE).exists():
            say(f"{folder / META_FILE}: torn or changed: made anew")
        return None
    try:
        faults = find_bad_files(folder, meta["files"], verify_bytes)
        for name, fault in faults.items():
            if say:
                say(f"{folder / name}: {fault}: made anew")
        if faults:
            return None
        splits = {
            name: load_split(
                folder, meta["shards"], name, meta["dtype"], meta["num_pinned_documents"] if name == "train" else 0
            )
            for name in SPLITS
        }
        return CacheEntry(splits, read_tokenizer_file(folder / TOKENIZER_FILE), meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def find_bad_files(folder: Path, files: dict[str, dict[str, Any]], verify_bytes: int | None) -> dict[str, str]:
    """The files that are not as they were written, and what is wrong with each.

    Sizes are always compared. Checksums are, too, where the files have at most `verify_bytes` in all, where it is None,
    and for each file whose size or time is not that of its last good check.
    """
    verified = read_sealed(folder / VERIFIED_FILE) or {}
    check_all = verify_bytes is None or sum(file["num_bytes"] for file in files.values()) <= verify_bytes
    faults, good = dict[str, str](), dict[str, list[int]]()
    for name, expected in files.items():
        fault, stamp = _check_file(folder / name, expected, None if check_all else verified.get(name))
        if fault:
            faults[name] = fault
        else:
            good[name] = stamp
    if verified | good != verified:
        with suppress(OSError):  # a cache that can only be read is checked again next time
            write_sealed(folder / VERIFIED_FILE, verified | good)
    return faults


def _check_file(path: Path, expected: dict[str, Any], verified: list[int] | None) -> tuple[str, list[int]]:
    try:
        found = path.stat()
        stamp = [found.st_size, found.st_mtime_ns]
        if found.st_size != expected["num_bytes"]:
            return f"torn: {found.st_size:,} bytes in place of {expected['num_bytes']:,}", stamp
        if stamp != verified and describe_file(path) != expected:
            return "damaged: its checksum is another one", stamp
    except FileNotFoundError:
        return "missing", []
    except OSError as error:
        return f"can't be read ({error.strerror})", []
    return "", stamp


def _remove_bad_shards(folder: Path, verify_bytes: int | None) -> None:
    """Leave in the folder only what a build may go on from: shards that are whole, under a plan to go on."""
    if not folder.exists():
        return
    plan = read_sealed(folder / PLAN_FILE)
    if plan is None or not plan["streamed"] or find_bad_files(folder, plan["files"], None):
        shutil.rmtree(folder)
        return
    records = read_records(folder)
    expected = {name: file for record in records.values() for name, file in record["files"].items()}
    faults = find_bad_files(folder, expected, verify_bytes)
    for index, record in records.items():
        if record["files"].keys() & faults.keys():
            record_path(folder, index).unlink()
    remove_leftovers(folder)
    for path in folder.glob(".*.tmp"):  # a killed process's shard; the lock says that no other one is at work
        if path.is_file():
            path.unlink()


def remember_hashes(root: Path, files: Iterable[Path], hash_file: Callable[[Path], str], least_bytes: int) -> list[str]:
    """The sha256 of files, large ones read again only after their size or time has changed.

    Args:
        root: the folder of all caches, which keeps what is known.
        files: the files.
        hash_file: reads one.
        least_bytes: of a file that is remembered.
    """
    memory = root / "sources.json"
    known = read_sealed(memory) or {}
    digests, new = list[str](), dict[str, list[Any]]()
    for file in files:
        found = file.stat()
        stamp = [found.st_size, found.st_mtime_ns]
        name = str(file.resolve())
        entry = known.get(name)
        digest = entry[2] if entry and entry[:2] == stamp else hash_file(file)
        digests.append(digest)
        if found.st_size >= least_bytes and not (entry and entry[:2] == stamp):
            new[name] = [*stamp, digest]
    if new:
        with suppress(OSError):
            write_sealed(memory, known | new)
    return digests
