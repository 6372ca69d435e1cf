"""Small text files from elsewhere, read in bounded memory: no device, no endless file, no bad UTF-8."""

import json
import stat
from pathlib import Path
from typing import Any

from new_llm.config.errors import UserError

MAX_JSON_BYTES = 1 << 26
"""Of results, records, structures and index files; those of the largest models and studies have a few megabytes."""
MAX_REASON_CHARACTERS = 200


def check_regular_file(path: Path) -> None:
    """Refuse a folder, a device or a pipe, which could be without end or never answer.

    Raises:
        FileNotFoundError: there is nothing.
        UserError: it is none, or can't be looked at.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: no regular file")


def read_text_file(path: Path, max_bytes: int) -> str:
    """The text of a regular file.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is no regular file, has more than `max_bytes`, is not UTF-8, or can't be read.
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
        raise UserError(f"{path}: more than {max_bytes:,} bytes, which no such file has")
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
        UserError: as `read_text_file`, or it is no JSON.
    """
    text = read_text_file(path, max_bytes)
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{path}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        reason = " ".join(str(error).split())[:MAX_REASON_CHARACTERS]
        raise UserError(f"{path}: not valid JSON: {reason}") from None
