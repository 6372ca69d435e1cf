"""Documents in local files: plain text, WikiText, JSON Lines and Parquet, optionally compressed (.gz, .zst, .xz).

The readers of `datasets` won't do: they report a broken line as "row 2" of some block and silently skip null texts, but
an error must name the file and the line. Memory is bounded: a line or document over `max_bytes` is rejected before it
is read in full.
"""

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, cast

from new_llm.config import UserError
from new_llm.config.files import check_regular_file
from new_llm.data.hub import describe_failure
from new_llm.formats import format_plural

Document = tuple[str, str]
"""(name, text)"""

MAX_DOCUMENT_BYTES = 1 << 27
PACKED = (".gz", ".zst", ".xz")
PARQUET_ROWS = 64  # rows per batch
ROW_BYTES = 64  # counted per row on top of its text: a small file could hold billions of empty rows
MAX_RATIO, FREE_BYTES = 200, 1 << 24  # a file may unpack to MAX_RATIO times its size plus FREE_BYTES; text stays below
MAX_SHOWN_FIELDS, MAX_SHOWN_CHARACTERS = 8, 40  # of field names quoted in an error message


class BadRows:
    """Handles records without text: either raises an error that names the record, or skips and counts it.

    Args:
        skip: what `data.on_bad_row` asks for; None: raise, without a hint at that option, which the caller lacks.
    """

    def __init__(self, *, skip: bool | None = None) -> None:
        self._skip, self._count, self._first = skip, 0, ""

    def report(self, message: str) -> None:
        """Count a bad record, or raise a `UserError` unless such records are skipped."""
        if not self._skip:
            hint = "" if self._skip is None else " (data.on_bad_row: skip would skip such rows)"
            raise UserError(f"{message}{hint}")
        self._first = self._first or message
        self._count += 1

    def describe(self) -> list[str]:
        """Return one line about the skipped records, or none."""
        return [f"skipped {format_plural(self._count, 'bad row')}; the first: {self._first}"] if self._count else []


class _Unpacked:
    """Counts unpacked bytes, to stop reading a decompression bomb."""

    def __init__(self, path: Path) -> None:
        self._path, self._left = path, path.stat().st_size * MAX_RATIO + FREE_BYTES

    def add(self, num_bytes: int) -> None:
        self._left -= num_bytes
        if self._left < 0:
            raise UserError(
                f"{self._path}: unpacks to more than {MAX_RATIO} times its size: no text compresses that well"
            )


Reader = Callable[[Path, str, int, BadRows], Iterator[Document]]


def read_file(
    path: Path,
    text_field: str = "text",
    whole: bool = False,
    max_bytes: int = MAX_DOCUMENT_BYTES,
    bad_rows: BadRows | None = None,
) -> Iterator[Document]:
    """Yield the documents (name, text) of one file, except blank ones.

    `whole` reads the file as one document, even if its format has articles. `max_bytes` limits lines and documents.
    Records without text are reported to `bad_rows`; None: they raise a `UserError`.

    Raises:
        UserError: the file can't be read, is corrupt or too large, or has records but is to be read whole.
    """
    reader = choose_reader(path)
    if whole:
        if reader not in (_read_txt, _read_wikitext):
            raise UserError(f"{path}: contains records and can't be read as one text; .txt, .raw and .tokens can")
        reader = _read_txt
    try:
        check_regular_file(path)
        for name, text in reader(path, text_field, max_bytes, bad_rows or BadRows()):
            if text and not text.isspace():
                yield name, text
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path}: corrupt or truncated: {describe_failure(error)}") from None
    except OSError as error:  # pyarrow raises it without an errno if the content is corrupt
        reason = f"can't be read: {error.strerror}" if error.strerror else f"corrupt or truncated: {error}"
        raise UserError(f"{path}: {reason}") from None


def find_reader(path: Path) -> Reader | None:
    """Return the reader for a file's extension, or None if the extension is unknown."""
    packed = path.suffix.lower() in PACKED
    extension = Path(path.stem if packed else path.name).suffix.lower()
    return None if packed and extension == ".parquet" else READERS.get(extension)


def choose_reader(path: Path) -> Reader:
    """Return the reader for a file's extension; raise a `UserError` if it is unknown."""
    if (reader := find_reader(path)) is None:
        raise UserError(f"{path}: unknown extension; known extensions are {KNOWN}")
    return reader


def open_file(path: Path) -> Any:
    """Open a file for reading bytes, decompressed if its extension says so."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(cast(Any, pyarrow.input_stream(str(path), compression="zstd")))
    return {".gz": gzip.open, ".xz": lzma.open}.get(suffix, open)(path, "rb")


def split_articles(lines: Iterable[str]) -> Iterator[Document]:
    """Split WikiText's lines, each with its line end, into articles (title, text).

    An article begins at a level-1 heading, ` = Title = ` between two blank lines. Without the condition on blank lines,
    rows of broken tables would count as headings. WikiText-2 gives 600, 60 and 60 articles, as its authors state.
    """
    title, article = "", list[str]()
    before, line = "", None  # one line behind, because a heading is recognised by the line after it
    for after in chain(lines, [""]):
        if line is not None:
            heading = line.strip()
            is_title = heading[:2] == "= " and heading[-2:] == " =" and len(heading) > 4 and heading[2] != "="
            if is_title and not before.strip() and not after.strip():
                if article:
                    yield title, "".join(article)
                title, article = heading[2:-2].strip(), []
            article.append(line)
            before = line
        line = after
    if article:
        yield title, "".join(article)


def join_line_ends(text: str) -> str:
    """Replace every line end, including the bare \\r of old files, by \\n."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_txt(path: Path, text_field: str, max_bytes: int, bad_rows: BadRows) -> Iterator[Document]:
    with open_file(path) as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise UserError(
            f"{path}: one document of more than {max_bytes:,} bytes (data.max_document_bytes); split it into files or "
            f"JSON lines"
        )
    try:
        yield path.name, join_line_ends(_decode(raw).removeprefix("\ufeff"))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _read_wikitext(path: Path, text_field: str, max_bytes: int, bad_rows: BadRows) -> Iterator[Document]:
    def lines() -> Iterator[str]:
        article_bytes = 0
        for number, raw in _read_lines(path, max_bytes):
            try:
                line = _decode(raw)
            except ValueError as error:
                raise UserError(f"{path}: line {number}: {error}") from None
            is_title = line.strip()[:2] == "= " and line.strip()[2:3] != "="
            article_bytes = 0 if is_title else article_bytes + len(raw)
            if article_bytes > max_bytes:
                raise UserError(
                    f"{path}: line {number}: the article is longer than {max_bytes:,} bytes (data.max_document_bytes)"
                )
            yield join_line_ends(line.removeprefix("\ufeff") if number == 1 else line)

    for title, text in split_articles(lines()):
        yield f"{path.name}: {title}", text


def _read_jsonl(path: Path, text_field: str, max_bytes: int, bad_rows: BadRows) -> Iterator[Document]:
    for number, raw in _read_lines(path, max_bytes):
        if raw.strip():
            try:
                yield f"{path.name}:{number}", _parse_record(raw, text_field)
            except ValueError as error:
                bad_rows.report(f"{path}: line {number}: {error}")


def _read_lines(path: Path, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line with its line end)."""
    number, unpacked = 0, _Unpacked(path)
    with open_file(path) as file:
        while raw := file.readline(max_bytes + 1):
            number += 1
            unpacked.add(len(raw) + ROW_BYTES)
            if len(raw) > max_bytes:
                raise UserError(f"{path}: line {number} is longer than {max_bytes:,} bytes (data.max_document_bytes)")
            yield number, raw


def _decode(raw: bytes) -> str:
    if (at := raw.find(b"\0")) >= 0:
        raise ValueError(f"binary data (a NUL at byte {at}); expected UTF-8 text")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: 0x{raw[error.start]:02x} at byte {error.start}") from None


def _parse_record(raw: bytes, text_field: str) -> str:
    """Return the text of a JSON line; raise a ValueError that says why there is none."""
    line = _decode(raw).removeprefix("\ufeff").strip()
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object: {line[:MAX_SHOWN_CHARACTERS]!r}")
    return take_text(record, text_field)


def take_text(record: dict[str, Any], text_field: str) -> str:
    """Return the text of a record; raise a ValueError that says why there is none."""
    if text_field not in record:
        raise ValueError(describe_missing(text_field, list(record)))
    text = record[text_field]
    if not isinstance(text, str):
        shown = "null" if text is None else f"a {type(text).__name__}"
        raise ValueError(f"the field {text_field!r} holds {shown}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"a lone surrogate at character {error.start} of the text: not valid UTF-8") from None
    return text


def describe_missing(text_field: str, found: list[str]) -> str:
    """Say that the field is missing, and which fields there are."""
    shown = [name[:MAX_SHOWN_CHARACTERS] for name in found[:MAX_SHOWN_FIELDS]]
    more = f" and {len(found) - MAX_SHOWN_FIELDS:,} more" if len(found) > MAX_SHOWN_FIELDS else ""
    return (
        f"no field {text_field!r} (found: {', '.join(shown) or 'none'}{more}); data.text_field names the field to read"
    )


def _read_parquet(path: Path, text_field: str, max_bytes: int, bad_rows: BadRows) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Streamed page by page: a row group may not fit into memory.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise UserError(f"{path}: {describe_missing(text_field, names)}")
            kind: Any = file.schema_arrow.field(text_field).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise UserError(f"{path}: the field {text_field!r} holds {kind}, not strings")
            row, unpacked = 0, _Unpacked(path)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field], use_threads=False):
                for value in batch.column(0):
                    row += 1
                    text = value.as_py()
                    size = len((text or "").encode())
                    unpacked.add(size + ROW_BYTES)
                    if text is None:
                        bad_rows.report(f"{path}: row {row}: the field {text_field!r} holds null, not a string")
                    elif size > max_bytes:
                        raise UserError(
                            f"{path}: row {row} is longer than {max_bytes:,} bytes (data.max_document_bytes)"
                        )
                    else:
                        yield f"{path.name}:{row}", text
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, MemoryError) as error:
        raise UserError(f"{path}: corrupt or not a Parquet file: {describe_failure(error)}") from None


READERS: dict[str, Reader] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".raw": _read_wikitext,
    ".tokens": _read_wikitext,
}
"""Readers by file extension."""
KNOWN = f"{', '.join(READERS)}, also with {', '.join(PACKED)}"
"""The known extensions, for error messages."""
