"""The header of a safetensors file that is not trusted, read before anything else of it."""

import json
import os
import stat
from typing import Any, BinaryIO

from new_llm.config import UserError

MAX_HEADER_BYTES = 1 << 22
"""Thousands of tensors need less; a longer header is refused before it is read."""
PICKLE_SIGNATURES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How files begin that torch.save or pickle wrote."""


def read_header(file: BinaryIO, where: str) -> dict[str, Any]:
    """The JSON header: name → dtype, shape and offsets, and `__metadata__`. What it says is not checked here.

    Args:
        file: an open file, at its beginning.
        where: the file's name in errors.

    Raises:
        UserError: no safetensors file, or a header that is too long, cut off or no JSON object.
    """
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{where}: no regular file")
    beginning = file.read(8)
    length = int.from_bytes(beginning, "little")
    if len(beginning) < 8 or length > min(MAX_HEADER_BYTES, status.st_size - 8):
        # Only now: a header of 1,152 bytes begins as a pickle does.
        if beginning.startswith(PICKLE_SIGNATURES):
            raise UserError(
                f"{where}: no safetensors file but a pickle, as torch.save writes: read it by "
                "torch.load(path, weights_only=True) and set_memory_state"
            )
        raise UserError(f"{where}: no safetensors file, or a truncated one")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_refuse_twins)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: no safetensors file: its header is no JSON") from None
    if not isinstance(header, dict):
        raise UserError(f"{where}: no safetensors file: its header is no JSON object")
    return header


def _refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without twin keys, of which another reader might see the other one."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands there twice")
    return dict(pairs)
