"""Documents in local files: plain text, WikiText, JSON lines (plain or zstd) and Parquet."""

import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from new_llm.config import UserError

Document = tuple[str, str]
"""(name, text)"""

READ_BYTES = 1 << 20  # of a file at once
PARQUET_ROWS = 256  # at once
MAX_ZSTD_WINDOW = 1 << 31  # bytes; files packed with zstd --long need it


def read_file(path: Path, text_field: str, *, whole: bool = False) -> Iterator[Document]:
    """The documents of one file; those without a visible character are left out.

    Args:
        path: the file.
        text_field: the field of a record that holds the text.
        whole: the file's text is one document, also where its format has articles.

    Raises:
        UserError: the file can't be read in the format that its extension names, or holds records and not one text.
    """
    reader = find_reader(path)
    if reader is None:
        raise UserError(f"{path}: unknown extension; known are {', '.join(READERS)}")
    if whole:
        if reader not in (_read_txt, _read_wikitext):
            raise UserError(f"{path}: holds records, which can't be read as one text; .txt, .raw and .tokens can")
        reader = _read_txt
    try:
        for name, text in reader(path, text_field):
            if text and not text.isspace():
                yield name, text
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror or error}") from None


def find_reader(path: Path) -> Callable[[Path, str], Iterator[Document]] | None:
    """The reader for a file's extension."""
    name = path.name.lower()
    return next((reader for extension, reader in READERS.items() if name.endswith(extension)), None)


def split_articles(lines: Iterable[str]) -> Iterator[Document]:
    """Cut WikiText's lines, each with its line end, into articles.

    An article begins at a level-1 heading, ` = Title = ` between two blank lines; without the blank lines
    some rows of broken tables would count. WikiText-2 gives 600, 60 and 60 articles, as its authors state.
    """
    title, article = "", list[str]()
    window = ["", *lines, ""]
    for i, line in enumerate(window[1:-1], start=1):
        heading = line.strip()
        is_title = heading[:2] == "= " and heading[-2:] == " =" and len(heading) > 4 and heading[2] != "="
        if is_title and not window[i - 1].strip() and not window[i + 1].strip():
            if article:
                yield title, "".join(article)
            title, article = heading[2:-2].strip(), []
        article.append(line)
    if article:
        yield title, "".join(article)


def _read_txt(path: Path, text_field: str) -> Iterator[Document]:
    yield path.name, _read_text(path)


def _read_wikitext(path: Path, text_field: str) -> Iterator[Document]:
    for title, text in split_articles(io.StringIO(_read_text(path), newline="\n")):
        yield f"{path.name}: {title}", text


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    if (at := raw.find(b"\0")) >= 0:
        raise UserError(f"{path}: binary (a NUL at byte {at}); UTF-8 text is expected")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{path}", raw, error.start, 0) from None


def _not_utf8(where: str, raw: bytes, start: int, offset: int) -> UserError:
    return UserError(f"{where}: not UTF-8 text: 0x{raw[start]:02x} at byte {offset + start}")


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    chunks = _read_zstd(path) if path.name.lower().endswith(".zst") else _read_chunks(path)
    offset = 0
    for number, line in enumerate(_split_lines(chunks), start=1):
        where = f"{path}: line {number}"
        if line.strip():
            yield f"{path.name}:{number}", _text_of_line(line, text_field, where, offset)
        offset += len(line) + 1


def _text_of_line(line: bytes, text_field: str, where: str, offset: int) -> str:
    if (at := line.find(b"\0")) >= 0:
        raise UserError(f"{where}: binary (a NUL at byte {offset + at}); JSON lines are expected")
    try:
        record = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, line, error.start, offset) from None
    except (ValueError, RecursionError):
        raise UserError(f"{where} is no JSON object: {_preview(line)}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} is no JSON object: {_preview(line)}")
    if text_field not in record:
        raise UserError(f"{where} has no {_field(text_field, list(record))}")
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(f"{where}: the field {text_field!r} holds no string but {json.dumps(text)[:40]}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: half a surrogate pair at character {error.start} of the text: no UTF-8") from None
    return text


def _preview(line: bytes) -> str:
    text = line.strip().decode("utf-8", errors="replace")
    return repr(text if len(text) <= 40 else text[:39] + "…")


def _field(text_field: str, found: list[str]) -> str:
    fields = ", ".join(found) or "none"
    return f"field {text_field!r} (found: {fields}); --data.text-field names the one that holds the text"


def _read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            yield chunk


def _read_zstd(path: Path) -> Iterator[bytes]:
    import zstandard

    # Not stream_reader: it takes the end of a truncated file for the end of the data.
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
    frame = decompressor.decompressobj()
    try:
        for chunk in _read_chunks(path):
            while chunk:
                if frame.eof:
                    frame = decompressor.decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: corrupt or no zstd file: {' '.join(str(error).split())}") from None
    if not frame.eof:
        raise UserError(f"{path}: truncated: the file ends inside a zstd frame")


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    pieces = list[bytes]()  # of a line that is longer than a chunk
    for chunk in chunks:
        *lines, rest = chunk.split(b"\n")
        if lines:
            yield b"".join([*pieces, lines[0]])
            yield from lines[1:]
            pieces = []
        pieces.append(rest)
    yield b"".join(pieces)


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns: Any = file.schema_arrow
            if text_field not in columns.names:
                raise UserError(f"{path} has no {_field(text_field, columns.names)}")
            kind = columns.field(text_field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(f"{path}: the field {text_field!r} holds {kind}, not strings")
            row = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is None:
                        raise UserError(f"{path}: row {row}: the field {text_field!r} is null")
                    yield f"{path.name}:{row}", text
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: corrupt or no Parquet file: {' '.join(str(error).split())}") from None


READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".parquet": _read_parquet,
    ".raw": _read_wikitext,
    ".tokens": _read_wikitext,
}
"""Reader by extension."""
