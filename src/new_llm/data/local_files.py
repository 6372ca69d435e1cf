"""Documents in local files: plain text, WikiText, JSON lines and Parquet; also packed as .gz, .zst or .xz.

The readers are our own because an error must name the file and the line. Those of `datasets` report a broken line as
"row 2" of some block, and pass over a text that is null. Every read is bounded: a
line or a document beyond `max_bytes` is rejected before it is held.
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

Document = tuple[str, str]
"""(name, text)"""

MAX_DOCUMENT_BYTES = 1 << 27
PACKED = (".gz", ".zst", ".xz")
PARQUET_ROWS = 64  # at once
ROW_BYTES = 64  # that a row counts as beside its text: a small file could hold billions of empty ones
MAX_RATIO, FREE_BYTES = 200, 1 << 24  # unpacked bytes for each byte of a file, and beyond: no text is packed so well
MAX_SHOWN_FIELDS, MAX_SHOWN_CHARACTERS = 8, 40  # of a file's own names inside our one line


class BadRows:
    """What to do with a record that holds no text: stop with one line that names it, or skip and count it."""

    def __init__(self, *, skip: bool = False) -> None:
        self._skip, self._count, self._first = skip, 0, ""

    def report(self, message: str) -> None:
        """Take note of a bad record; a `UserError` if it is not to be skipped."""
        if not self._skip:
            raise UserError(f"{message} (data.on_bad_row: skip leaves such rows out)")
        self._first = self._first or message
        self._count += 1

    def describe(self) -> list[str]:
        """One line about what was skipped; none where nothing was."""
        return [f"skipped {self._count:,} bad rows; the first: {self._first}"] if self._count else []


class _Unpacked:
    """Counts what a file unpacks to, so that a small one made to do harm does not keep us busy for hours."""

    def __init__(self, path: Path) -> None:
        self._path, self._left = path, path.stat().st_size * MAX_RATIO + FREE_BYTES

    def add(self, num_bytes: int) -> None:
        self._left -= num_bytes
        if self._left < 0:
            raise UserError(
                f"{self._path}: unpacks to more than {MAX_RATIO} times its size: no text compresses so well"
            )


Reader = Callable[[Path, str, int, BadRows], Iterator[Document]]


def read_file(
    path: Path,
    text_field: str = "text",
    whole: bool = False,
    max_bytes: int = MAX_DOCUMENT_BYTES,
    bad_rows: BadRows | None = None,
) -> Iterator[Document]:
    """The documents of one file; those without a visible character are left out.

    With `whole` the file's text is one document, also where its format has articles. `max_bytes` is that of a document.
    """
    reader = choose_reader(path)
    if whole:
        if reader not in (_read_txt, _read_wikitext):
            raise UserError(f"{path}: holds records, which can't be read as one text; .txt, .raw and .tokens can")
        reader = _read_txt
    try:
        check_regular_file(path)
        for name, text in reader(path, text_field, max_bytes, bad_rows or BadRows()):
            if text and not text.isspace():
                yield name, text
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path}: corrupt or truncated: {describe_failure(error)}") from None
    except OSError as error:  # pyarrow's have no number where the content is to blame
        reason = f"can't be read: {error.strerror}" if error.strerror else f"corrupt or truncated: {error}"
        raise UserError(f"{path}: {reason}") from None


def find_reader(path: Path) -> Reader | None:
    """The reader for a file's extension; None: the extension is unknown."""
    packed = path.suffix.lower() in PACKED
    extension = Path(path.stem if packed else path.name).suffix.lower()
    return None if packed and extension == ".parquet" else READERS.get(extension)


def choose_reader(path: Path) -> Reader:
    """The reader for a file's extension; an unknown one is a `UserError`."""
    if (reader := find_reader(path)) is None:
        raise UserError(f"{path}: unknown extension; known are {KNOWN}")
    return reader


def open_file(path: Path) -> Any:
    """The bytes of a file, unpacked where its extension says that it is packed."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(cast(Any, pyarrow.input_stream(str(path), compression="zstd")))
    return {".gz": gzip.open, ".xz": lzma.open}.get(suffix, open)(path, "rb")


def split_articles(lines: Iterable[str]) -> Iterator[Document]:
    """Cut WikiText's lines, each with its line end, into articles.

    An article begins at a level-1 heading, ` = Title = ` between two blank lines; without the blank lines
    some rows of broken tables would count. WikiText-2 gives 600, 60 and 60 articles, as its authors state.
    """
    title, article = "", list[str]()
    before, line = "", None  # one line behind, because the next line shows whether a line is a heading
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
    """The text with \\n for every line end, the bare \\r of old files included."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_txt(path: Path, text_field: str, max_bytes: int, bad_rows: BadRows) -> Iterator[Document]:
    with open_file(path) as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise UserError(
            f"{path}: one document of more than {max_bytes:,} bytes (data.max_document_bytes); cut it into files, or "
            f"into lines of JSON"
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
                    f"{path}: line {number}: an article of more than {max_bytes:,} bytes (data.max_document_bytes)"
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
    """The lines with their ends, numbered from 1."""
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
        raise ValueError(f"binary (a NUL at byte {at}); UTF-8 text is expected")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: 0x{raw[error.start]:02x} at byte {error.start}") from None


def _parse_record(raw: bytes, text_field: str) -> str:
    """The text of a line of JSON; a ValueError says why there is none."""
    line = _decode(raw).removeprefix("\ufeff").strip()
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object: {line[:MAX_SHOWN_CHARACTERS]!r}")
    return take_text(record, text_field)


def take_text(record: dict[str, Any], text_field: str) -> str:
    """The text of a record; a ValueError says why there is none."""
    if text_field not in record:
        raise ValueError(describe_missing(text_field, list(record)))
    text = record[text_field]
    if not isinstance(text, str):
        shown = "null" if text is None else f"a {type(text).__name__}"
        raise ValueError(f"the field {text_field!r} holds {shown}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair at character {error.start} of the text: not UTF-8") from None
    return text


def describe_missing(text_field: str, found: list[str]) -> str:
    """That the field is missing, and which there are."""
    shown = [name[:MAX_SHOWN_CHARACTERS] for name in found[:MAX_SHOWN_FIELDS]]
    more = f" and {len(found) - MAX_SHOWN_FIELDS:,} more" if len(found) > MAX_SHOWN_FIELDS else ""
    return (
        f"no field {text_field!r} (found: {', '.join(shown) or 'none'}{more}); data.text_field names the text's field"
    )


def _read_parquet(path: Path, text_field: str, max_bytes: int, bad_rows: BadRows) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Streamed page by page, so that a row group need not fit into memory.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise UserError(f"{path}: {describe_missing(text_field, names)}")
            kind: Any = file.schema_arrow.field(text_field).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(f"{path}: the field {text_field!r} holds {kind}, not strings")
            row, unpacked = 0, _Unpacked(path)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field], use_threads=False):
                for value in batch.column(0):
                    row += 1
                    text = value.as_py()
                    unpacked.add(len(text or "") + ROW_BYTES)
                    if text is None:
                        bad_rows.report(f"{path}: row {row}: the field {text_field!r} holds null, not a string")
                    elif len(text) > max_bytes:
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
"""Reader by extension."""
KNOWN = f"{', '.join(READERS)}, also with {', '.join(PACKED)}"
"""The extensions, for messages."""
