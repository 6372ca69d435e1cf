"""The token cache: a folder a split of a source, written whole or not at all, and checked when read."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from new_llm.config import DataConfig, UserError
from new_llm.data.tokenizer import TOKENIZER_FILE, read_tokenizer_file
from new_llm.data.tokens import TokenizedDocument, TokenSplit

FORMAT_VERSION = 1  # of the folder's files and of how documents become tokens; another version is another key
SPLITS = ("train", "validation")
META_FILE = "meta.json"


@dataclass(frozen=True)
class CacheEntry:
    """What a cache folder holds."""

    splits: dict[str, TokenSplit]
    tokenizer: Tokenizer
    meta: dict[str, Any]
    """What the builder noted, and under `files` the size and sha256 of every file."""


def cache_folder(config: DataConfig) -> Path:
    """The folder of the token caches: config.cache_dir, $NEW_LLM_CACHE or ~/.cache/new-llm."""
    return (config.cache_dir or Path(os.environ.get("NEW_LLM_CACHE") or "~/.cache/new-llm")).expanduser()


def cache_key(parts: dict[str, Any]) -> str:
    """A short hash of everything that decides a cache's content."""
    text = json.dumps({"format": FORMAT_VERSION, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load_or_build(root: Path, key: str, build: Callable[[Path, Path], dict[str, Any]]) -> CacheEntry:
    """Load the cache with this key, or build it: absent, torn and damaged ones are built anew.

    Args:
        root: the folder of all caches.
        key: from `cache_key`.
        build: given an empty folder for the files and one for its own temporary files, writes both splits and
            the tokenizer, and returns what `meta` is to hold.

    Raises:
        UserError: the folder can't be written.
    """
    folder = root / key
    entry = _load(folder)
    if entry is not None:
        return entry
    try:
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".building-", dir=root, ignore_cleanup_errors=True) as work:
            made, scratch = Path(work, "made"), Path(work, "scratch")
            made.mkdir()
            scratch.mkdir()
            meta = build(made, scratch)
            meta["files"] = {file.name: _describe(file) for file in sorted(made.iterdir())}
            (made / META_FILE).write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")
            for path in (*made.iterdir(), made):
                _flush(path)
            _put(made, folder, Path(work, "torn"))
            _flush(root)
    except OSError as error:
        raise UserError(f"{root}: the token cache can't be written: {error.strerror or error}") from None
    entry = _load(folder)
    if entry is None:
        raise UserError(f"{folder}: the token cache was damaged while it was written")
    return entry


def write_split(folder: Path, name: str, documents: Iterable[TokenizedDocument], dtype: np.dtype[Any]) -> None:
    """Write one split's tokens and its index, a document at a time."""
    index = list[tuple[int, int, int]]()
    with (folder / f"{name}.tokens").open("wb") as file:
        for document in documents:
            document.ids.astype(dtype.newbyteorder("<")).tofile(file)
            index.append((len(document.ids), document.num_bytes, document.num_words))
    columns = np.array(index, dtype="<i8").reshape(-1, 3)
    np.save(folder / f"{name}.index.npy", columns, allow_pickle=False)


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"num_bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    # Else a power cut could leave the folder in place with empty files. Windows can't open folders.
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(made: Path, folder: Path, torn: Path) -> None:
    try:
        os.replace(made, folder)
    except OSError:
        # Something is there: another process was faster, or a torn cache, which makes way.
        if _load(folder) is None:
            os.replace(folder, torn)
            os.replace(made, folder)


def _load(folder: Path) -> CacheEntry | None:
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        if any(_describe(folder / name) != expected for name, expected in meta["files"].items()):
            return None
        splits = {name: _load_split(folder, name, meta) for name in SPLITS}
        return CacheEntry(splits, read_tokenizer_file(folder / TOKENIZER_FILE), meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _load_split(folder: Path, name: str, meta: dict[str, Any]) -> TokenSplit:
    index = np.load(folder / f"{name}.index.npy", allow_pickle=False)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(index[:, 0], dtype=np.int64)])
    tokens = np.memmap(folder / f"{name}.tokens", dtype=np.dtype(meta["dtype"]), mode="r", shape=(int(offsets[-1]),))
    pinned = meta["num_pinned_documents"] if name == "train" else 0
    return TokenSplit(tokens, offsets, index[:, 1].astype(np.int64), index[:, 2].astype(np.int64), pinned)
