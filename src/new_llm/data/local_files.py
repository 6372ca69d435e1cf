"""Documents in local files: plain text, WikiText, JSON lines (plain or zstd) and Parquet."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from new_llm.config import UserError
from new_llm.config.bounded_files import check_regular_file
from new_llm.config.limits import ReadLimits
from new_llm.data.byte_lines import UnpackingBudget, read_chunks, read_zstd, split_lines
from new_llm.data.hub import describe_failure

Document = tuple[str, str]
"""(name, text)"""

PARQUET_ROWS = 256  # at once
PARQUET_BUFFER = 1 << 20  # bytes
ROW_BYTES = 64  # that a Parquet row counts as beside its text: a small file could hold billions of empty ones
MAX_PARQUET_STRING, MAX_PARQUET_ITEMS = 1 << 24, 1 << 20  # of its metadata
MAX_SHOWN_FIELDS, MAX_SHOWN_CHARACTERS = 8, 40  # of a file's own names inside our one line


Reader = Callable[[Path, str, ReadLimits], Iterator[Document]]


def read_file(
    path: Path, text_field: str, *, whole: bool = False, limits: ReadLimits | None = None
) -> Iterator[Document]:
    """The documents of one file; those without a visible character are left out.

    Args:
        path: the file.
        text_field: the field of a record that holds the text.
        whole: the file's text is one document, also where its format has articles.
        limits: what the file may ask for; None: the defaults.

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
        check_regular_file(path)
        for name, text in reader(path, text_field, limits or ReadLimits()):
            if text and not text.isspace():
                yield name, text
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror or error}") from None


def find_reader(path: Path) -> Reader | None:
    """The reader for a file's extension."""
    name = path.name.lower()
    return next((reader for extension, reader in READERS.items() if name.endswith(extension)), None)


def split_articles(lines: Iterable[str]) -> Iterator[Document]:
    """Cut WikiText's lines, each with its line end, into articles.

    An article begins at a level-1 heading, ` = Title = ` between two blank lines; without the blank lines
    some rows of broken tables would count. WikiText-2 gives 600, 60 and 60 articles, as its authors state.
    """
    title, article = "", list[str]()
    before, line = "", None  # one line behind, because a heading is told by the line after it
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


def _read_txt(path: Path, text_field: str, limits: ReadLimits) -> Iterator[Document]:
    num_bytes = path.stat().st_size
    if num_bytes > limits.max_text_bytes:
        raise UserError(
            f"{path}: one document of {num_bytes:,} bytes; at most {limits.max_text_bytes:,} "
            f"(limits.max_text_bytes); cut it into files, or into lines of JSON"
        )
    with path.open("rb") as file:
        raw = file.read(limits.max_text_bytes)
    yield path.name, _decode(raw, f"{path}", 0).removeprefix("\ufeff").replace("\r\n", "\n")


def _read_wikitext(path: Path, text_field: str, limits: ReadLimits) -> Iterator[Document]:
    for title, text in split_articles(_read_text_lines(path, limits)):
        yield f"{path.name}: {title}", text


def _read_text_lines(path: Path, limits: ReadLimits) -> Iterator[str]:
    """The file's lines with their ends; those of one article, which are held together, are counted."""
    offset, article_bytes = 0, 0
    raws = split_lines(read_chunks(path), f"{path}", limits)
    raw = next(raws)
    for following in chain(raws, [None]):
        line = _decode(raw, f"{path}", offset)
        is_last = following is None
        line = line if is_last else line.removesuffix("\r") + "\n"
        if not offset:
            line = line.removeprefix("\ufeff")
        offset += len(raw) + 1
        article_bytes = 0 if line.strip()[:2] == "= " and line.strip()[2:3] != "=" else article_bytes + len(raw) + 1
        if article_bytes > limits.max_text_bytes:
            raise UserError(
                f"{path}: an article of more than {limits.max_text_bytes:,} bytes at byte {offset - article_bytes} "
                f"(limits.max_text_bytes)"
            )
        if line:
            yield line
        raw = following or b""


def _decode(raw: bytes, where: str, offset: int) -> str:
    if (at := raw.find(b"\0")) >= 0:
        raise UserError(f"{where}: binary (a NUL at byte {offset + at}); UTF-8 text is expected")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(where, raw, error.start, offset) from None


def _not_utf8(where: str, raw: bytes, start: int, offset: int) -> UserError:
    return UserError(f"{where}: not UTF-8 text: 0x{raw[start]:02x} at byte {offset + start}")


def _read_jsonl(path: Path, text_field: str, limits: ReadLimits) -> Iterator[Document]:
    chunks = read_zstd(path, limits) if path.name.lower().endswith(".zst") else read_chunks(path)
    offset = 0
    for number, line in enumerate(split_lines(chunks, f"{path}", limits), start=1):
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
    shown = [name if len(name) <= MAX_SHOWN_CHARACTERS else name[: MAX_SHOWN_CHARACTERS - 1] + "…" for name in found]
    more = f" and {len(found) - MAX_SHOWN_FIELDS:,} more" if len(found) > MAX_SHOWN_FIELDS else ""
    fields = (", ".join(shown[:MAX_SHOWN_FIELDS]) or "none") + more
    return f"field {text_field!r} (found: {fields}); --data.text-field names the one that holds the text"


def _read_parquet(path: Path, text_field: str, limits: ReadLimits) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    budget = UnpackingBudget(path, limits)
    # Streamed page by page; repeated texts stay numbers until they are asked for, else one page could fill the memory.
    options: dict[str, Any] = {
        "buffer_size": PARQUET_BUFFER,
        "pre_buffer": False,
        "thrift_string_size_limit": MAX_PARQUET_STRING,
        "thrift_container_size_limit": MAX_PARQUET_ITEMS,
    }
    try:
        with pq.ParquetFile(path, **options) as file:
            columns: Any = file.schema_arrow
            if text_field not in columns.names:
                raise UserError(f"{path} has no {_field(text_field, columns.names)}")
            kind = columns.field(text_field).type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(f"{path}: the field {text_field!r} holds {kind}, not strings")
        with pq.ParquetFile(path, **options, read_dictionary=[text_field]) as file:
            row = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field], use_threads=False):
                for value in batch.column(0):
                    row += 1
                    text = value.as_py()
                    if text is None:
                        raise UserError(f"{path}: row {row}: the field {text_field!r} is null")
                    num_bytes = len(text.encode("utf-8"))
                    budget.take(num_bytes + ROW_BYTES)
                    if num_bytes > limits.max_line_bytes:
                        raise UserError(
                            f"{path}: row {row} holds {num_bytes:,} bytes; at most {limits.max_line_bytes:,} "
                            f"(limits.max_line_bytes)"
                        )
                    yield f"{path.name}:{row}", text
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, MemoryError) as error:
        raise UserError(f"{path}: corrupt or no Parquet file: {describe_failure(error)}") from None


READERS: dict[str, Reader] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".parquet": _read_parquet,
    ".raw": _read_wikitext,
    ".tokens": _read_wikitext,
}
"""Reader by extension."""
