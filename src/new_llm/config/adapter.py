"""The endings of an adapter's file."""

from pathlib import Path

from new_llm.config.errors import UserError

ADAPTER_SUFFIXES = (".safetensors", ".pt")
"""Endings of an adapter's file, which say its format."""


def check_adapter_suffix(path: Path, what: str) -> None:
    """Refuse a file name whose ending says no format.

    Raises:
        UserError: names the endings that do.
    """
    if path.suffix not in ADAPTER_SUFFIXES:
        raise UserError(f"{what}: {path} must end with {' or '.join(ADAPTER_SUFFIXES)}")
