"""The token cache: a folder for each source, tokenizer and limits, built under a lock and moved into place whole.

<key>/tokenizer.json
      train.tokens         room for the reversal sentences, then the tokens of one document after the other
      train.offsets.npy    where in the tokens each document begins and ends, counted after the room
      train.num_bytes.npy  UTF-8 bytes of each document's text; train.num_words.npy: its words
      validation.*         the same for validation
      meta.json            what the build noted
      manifest.json        size and sha256 of these files, compared whenever the cache is read
.<key>.work/               what an interrupted build has done so far; the next one continues there
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from new_llm.config import DataConfig, UserError
from new_llm.config.files import MANIFEST_FILE, check_manifest, write_folder_atomically, write_manifest
from new_llm.config.locks import hold_lock
from new_llm.config.terminal import print_text
from new_llm.data.tokenizer import TOKENIZER_FILE, read_tokenizer_file
from new_llm.data.tokens import TokenizedDocument, TokenSplit

FORMAT_VERSION = 3  # of the folder's files and of how documents become tokens; another version is another key
META_FILE = "meta.json"
INDEX_COLUMNS = ("offsets", "num_bytes", "num_words")


def cache_folder(config: DataConfig) -> Path:
    """The folder of the token caches: config.cache_dir, $NEW_LLM_CACHE or ~/.cache/new-llm."""
    return (config.cache_dir or Path(os.environ.get("NEW_LLM_CACHE") or "~/.cache/new-llm")).expanduser()


def cache_key(parts: dict[str, Any]) -> str:
    """A short hash of everything that decides a cache's content."""
    text = json.dumps({"format": FORMAT_VERSION, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class TokenCache:
    """A complete cache."""

    folder: Path
    tokenizer: Tokenizer
    meta: dict[str, Any]
    """What the build noted: `dtype`, `room`, `notes`."""
    digests: dict[str, str]
    """sha256 of each file."""

    def load_split(self, name: str, pinned: Sequence[TokenizedDocument] = ()) -> TokenSplit:
        """One split, memory-mapped.

        Args:
            name: train or validation.
            pinned: documents to put before the others, at most `room` tokens in all. They are written into this
                process's own copy of the few pages before the first token, so that the array stays one mapped file.
        """
        room, dtype = self.meta["room"] if name == "train" else 0, np.dtype(self.meta["dtype"])
        tokens = np.memmap(self.folder / f"{name}.tokens", dtype=dtype, mode="c" if pinned else "r")
        offsets, num_bytes, num_words = (
            np.asarray(np.load(self.folder / f"{name}.{column}.npy", mmap_mode="r", allow_pickle=False))
            for column in INDEX_COLUMNS
        )
        if not pinned:
            return TokenSplit(tokens[room:], offsets, num_bytes, num_words)
        ids = np.concatenate([document.ids for document in pinned])
        ends = np.cumsum([0, *(len(document.ids) for document in pinned)], dtype=np.int64)
        tokens[room - len(ids) : room] = ids
        tokens.flags.writeable = False
        return TokenSplit(
            tokens[room - len(ids) :],
            np.concatenate([ends[:-1], offsets + ends[-1]]),
            np.concatenate([[document.num_bytes for document in pinned], num_bytes]),
            np.concatenate([[document.num_words for document in pinned], num_words]),
            num_pinned_documents=len(pinned),
        )


Build = Callable[[Path, Path], dict[str, Any]]
"""Given a folder for unfinished work, perhaps with some from an interrupted build, and the empty folder of the cache:
writes the tokenizer and the splits, and returns what `meta` is to hold."""


def load_or_build(root: Path, key: str, build: Build) -> TokenCache:
    """Load the cache with this key, or build it where it is absent or damaged.

    A second process that wants the same cache waits, says so in a line, and uses what the first has built.

    Args:
        root: the folder of all caches.
        key: from `cache_key`.
        build: see `Build`.

    Raises:
        UserError: the folder can't be written, or the build's own errors.
    """
    folder, work = root / key, root / f".{key}.work"
    if (cache := _load(folder)) is not None:
        return cache
    try:
        root.mkdir(parents=True, exist_ok=True)
        with hold_lock(root / f".{key}.lock", f"the token cache {folder}", on_wait=_say):
            if (cache := _load(folder, say=_say)) is not None:
                return cache
            if work.exists():
                _say(f"{folder}: continuing an interrupted build")
            work.mkdir(exist_ok=True)
            try:
                with write_folder_atomically(folder) as temporary:
                    meta = build(work, temporary)
                    (temporary / META_FILE).write_text(json.dumps(meta, indent=1), encoding="utf-8")
                    write_manifest(temporary)
            except UserError:
                shutil.rmtree(work, ignore_errors=True)  # nothing there is worth continuing
                raise
            shutil.rmtree(work)
            cache = _load(folder, say=_say)
    except OSError as error:
        raise UserError(
            f"{root}: the token cache can't be written: {error.strerror or error} ({error.filename or folder})"
        ) from None
    if cache is None:
        raise UserError(f"{folder}: the token cache was damaged while it was written")
    return cache


def _say(line: str) -> None:
    print_text(f"new-llm: {line}", stderr=True)


def _load(folder: Path, say: Callable[[str], None] | None = None) -> TokenCache | None:
    if not folder.is_dir():
        return None
    if faults := check_manifest(folder):
        if say:
            say(f"{folder}: {faults[0]}: building the token cache again")
        return None
    files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    digests = {name: str(file["sha256"]) for name, file in files.items()}
    return TokenCache(folder, read_tokenizer_file(folder / TOKENIZER_FILE), meta, digests)
