"""Text and JSON files from elsewhere, read in bounded memory: no device, no endless file, no bad UTF-8.

What such a file holds may be quoted in an error or on the terminal: `shorten` makes one plain line of it.
"""

import json
import stat
from pathlib import Path
from typing import Any

from new_llm.config.errors import UserError

MAX_JSON_BYTES = 1 << 26
"""Of results, records, structures and index files; those of the largest models and studies have a few megabytes."""
MAX_ERROR_CHARACTERS = 300


def check_regular_file(path: Path) -> None:
    """Refuse a folder, a device or a pipe, which could be without end or never answer.

    Raises:
        FileNotFoundError: there is nothing.
        UserError: it is not a regular file, or can't be looked at.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: not a regular file")


def read_text_file(path: Path, max_bytes: int) -> str:
    """The text of a regular file.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is not a regular file, has more than `max_bytes`, is not UTF-8, or can't be read.
    """
    try:
        check_regular_file(path)
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror or error}") from None
    if len(raw) > max_bytes:
        raise UserError(f"{path}: more than {max_bytes:,} bytes; such files are smaller")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: can't be read as text: not UTF-8: 0x{raw[error.start]:02x} at byte {error.start}"
        ) from None


def read_json_file(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: there is none.
        UserError: as `read_text_file`, or it is not JSON.
    """
    text = read_text_file(path, max_bytes)
    try:
        return load_json(text)
    except ValueError as error:
        raise UserError(shorten(f"{path}: not valid JSON: {error}")) from None


def load_json(text: str) -> Any:
    """What JSON from elsewhere holds.

    Raises:
        ValueError: it is not JSON, it is nested too deeply, or an object has a key twice, of which another reader
            might see the other value.
    """
    try:
        return json.loads(text, object_pairs_hook=_refuse_duplicates)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("duplicate key")
    return values


def shorten(message: str) -> str:
    """One line of bounded length without control characters."""
    line = " ".join(message.split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    return line if len(line) <= MAX_ERROR_CHARACTERS else line[: MAX_ERROR_CHARACTERS - 1] + "…"
