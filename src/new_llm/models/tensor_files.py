"""Files of tensors from elsewhere: headers are checked before they are believed, and no pickled code is run."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from new_llm.config import UserError
from new_llm.config.bounded_files import check_regular_file
from new_llm.models.memory_record import shorten
from new_llm.models.safetensors_header import read_header

MAX_ARCHIVE_ENTRIES = 1 << 16  # of a file of torch.save: one a tensor, and a few


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes that a safetensors file's header claims, by name; nothing else of the file is read.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is none, or its header is broken.
    """
    header = _read_header(path)
    shapes = dict[str, tuple[int, ...]]()
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise UserError(shorten(f"{path}: not a readable safetensors file: {name} has no shape"))
        shapes[name] = tuple(shape)
    return shapes


def read_metadata(path: Path) -> dict[str, Any]:
    """What the header of a safetensors file says beside its tensors; errors as `read_shapes` has them."""
    metadata = _read_header(path).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _read_header(path: Path) -> dict[str, Any]:
    check_regular_file(path)
    try:
        with path.open("rb") as file:
            return read_header(file, str(path))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror or error}") from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is none, truncated, or its header lies about sizes or names a tensor twice.
    """
    read_shapes(path)
    try:
        return load_file(path)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise UserError(shorten(f"{path}: not a readable safetensors file: {error}")) from None


def read_torch_file(path: Path) -> Any:
    """What torch.save wrote: tensors and plain values, and nothing that could run.

    Raises:
        OSError: the file can't be opened.
        UserError: it is none, or holds packed entries, objects, or sizes that are not its own.
    """
    check_regular_file(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save packs nothing: packed entries could be of any size
            entries = archive.infolist()
            if len(entries) > MAX_ARCHIVE_ENTRIES:
                raise UserError(f"{path}: no file of torch.save: it holds {len(entries):,} entries")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UserError(f"{path}: no file of torch.save: it holds packed entries")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise UserError(f"{path}: no file of torch.save: its entries are larger than the file")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UserError, OSError):
        raise
    except zipfile.BadZipFile:
        raise UserError(f"{path}: no file of torch.save, or a truncated one") from None
    except Exception as error:  # the readers raise whatever a broken file provokes in them
        raise UserError(shorten(f"{path}: not readable as plain tensors: {type(error).__name__}: {error}")) from None


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that hold NaN or infinite values.

    Raises:
        UserError: names the first such tensor.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(shorten(f"{where}: {name} holds NaN or infinite values"))
