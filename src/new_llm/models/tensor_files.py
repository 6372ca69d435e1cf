"""Reading and writing files of tensors, with checks for files that can't be trusted.

A file can't make its reader allocate more than its own length. For safetensors, the library checks that the header
describes exactly the bytes that follow, before any tensor is read. A `torch.save` file may contain only plain values,
and tensors no larger than the file; no code in it is run. Safetensors files written here contain a digest, `sha256`
over metadata and tensors, which every reader checks. Equal content gives equal bytes.
"""

import datetime
import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from new_llm.config import UserError
from new_llm.config.files import check_regular_file, shorten, write_atomically
from new_llm.config.sections import describe_validation_error

MAX_ARCHIVE_ENTRIES = 1 << 16
"""Limit for a `torch.save` file, which has one entry per tensor and a few more."""
DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""The dtypes that can be written."""
DIGEST = "sha256"
PICKLE_SIGNATURES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""The first bytes of files written by torch.save or pickle."""
Record = TypeVar("Record")


@dataclass(frozen=True)
class TensorHeader:
    """A safetensors file's metadata, and its tensors' shapes and dtypes (`F32`, …), checked against its length."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]


# Reading safetensors


def read_header(path: Path) -> TensorHeader:
    """The header of a safetensors file; the rest of the file is not read.

    Raises:
        UserError: the file is missing, truncated or not a safetensors file, or its header disagrees with its length.
    """
    check_regular_file(path)
    is_pickle = False
    try:
        with path.open("rb") as file:
            is_pickle = file.read(8).startswith(PICKLE_SIGNATURES)
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
            return TensorHeader(shapes, {name: part.get_dtype() for name, part in parts.items()}, file.metadata() or {})
    except (OSError, MemoryError) as error:  # the file is memory-mapped, which a process limit may forbid
        fault = f"can't be read: {getattr(error, 'strerror', None) or error}"
    except SafetensorError as error:
        fault = f"truncated, or not a safetensors file: {error}"
        if is_pickle:
            fault = (
                "not a safetensors file but a pickle, as written by torch.save: read it with "
                "torch.load(path, weights_only=True) and set_memory_state"
            )
    raise UserError(shorten(f"{path}: {fault}"))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError like `read_header`, or if they do not match its digest."""
    metadata = read_header(path).metadata
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, MemoryError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise UserError(shorten(f"{path}: not a readable safetensors file: {error}")) from None
    check_digest(metadata, tensors, str(path))
    return tensors


def check_digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise a UserError if the metadata contain a digest that does not match the content."""
    if DIGEST in metadata and metadata[DIGEST] != hash_content(metadata, tensors):
        raise UserError(f"{where}: corrupted: the content does not match the digest it was written with")


def find_misfit(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Describe the first tensor, by name, that is missing, unknown or has the wrong shape; None: all fit.

    The arguments are tensors or their shapes.
    """
    here, there = ({name: list(getattr(one, "shape", one)) for name, one in part.items()} for part in (found, wanted))
    for name in sorted(here | there):
        if name not in here or name not in there:
            return f"missing or unknown tensors: {name}"
        if here[name] != there[name]:
            return f"{name} has shape {here[name]}, not {there[name]}"
    return None


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise a UserError that names the first tensor with NaN or infinite values, if there is one."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(shorten(f"{where}: {name} holds NaN or infinite values"))


# Reading files of torch.save


def read_torch_file(path: Path) -> Any:
    """Read a file of torch.save: tensors and plain values in dictionaries, lists and tuples.

    Raises:
        OSError: the file can't be opened.
        UserError: it is not such a file, or it holds compressed entries, other objects, or tensors larger than the
            file. An expanded tensor, which repeats one number, would take that much memory when copied.
    """
    check_regular_file(path)
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries, fault = archive.infolist(), None
        if len(entries) > MAX_ARCHIVE_ENTRIES:
            fault = f"it holds {len(entries):,} entries"
        elif any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):  # these could expand to any size
            fault = "it holds compressed entries"
        elif sum(entry.file_size for entry in entries) > size:
            fault = "its entries are larger than the file"
        if fault:
            raise UserError(f"{path}: not a file of torch.save: {fault}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (UserError, OSError):
        raise
    except zipfile.BadZipFile:
        raise UserError(f"{path}: not a file of torch.save, or a truncated one") from None
    except Exception as error:  # a broken file can make the readers raise anything
        raise UserError(shorten(f"{path}: not readable as plain tensors: {type(error).__name__}: {error}")) from None
    if sum(tensor.numel() * tensor.element_size() for tensor in _list_tensors(content, str(path))) > size:
        raise UserError(f"{path}: its tensors are larger than the file")
    return content


def _list_tensors(value: Any, where: str) -> Iterator[Tensor]:
    """Iterate over the tensors in nested plain values; raise a UserError at anything but dense CPU tensors."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise UserError(f"{where}: holds a tensor that is not a dense one on the CPU")
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _list_tensors(part, where)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _list_tensors(part, where)
    elif not isinstance(value, str | int | float | bool | None):
        raise UserError(f"{where}: holds a {type(value).__name__}; only tensors and plain values are read")


# Writing


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with its digest, atomically."""
    if odd := sorted(name for name, tensor in tensors.items() if tensor.dtype not in DTYPE_NAMES):
        raise UserError(f"{path}: {odd[0]} is {tensors[odd[0]].dtype}; files hold {', '.join(DTYPE_NAMES.values())}")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    names = sorted(plain, key=lambda name: (-plain[name].element_size(), name))  # widest first keeps all aligned
    facts = {**metadata, DIGEST: hash_content(metadata, plain)}
    header: dict[str, Any] = {"__metadata__": dict(sorted(facts.items()))}
    end = 0
    for name in names:
        begin, end = end, end + plain[name].numel() * plain[name].element_size()
        dtype, shape = DTYPE_NAMES[plain[name].dtype], list(plain[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    beginning = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    beginning += b" " * (-len(beginning) % 8)
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        file.write(len(beginning).to_bytes(8, "little") + beginning)
        for name in names:
            file.write(_list_bytes(plain[name]))


# Records: a file's metadata as a dataclass


def format_record(record: Any, file_format: str, version: int) -> dict[str, str]:
    """A record as string metadata: text unchanged, everything else as JSON."""
    values = TypeAdapter(type(record)).dump_python(record, mode="json")
    plain = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return {"format": file_format, "format_version": str(version), **plain}


def parse_record(metadata: Any, record_type: type[Record], file_format: str, version: int, where: str) -> Record:
    """The inverse of `format_record`; the metadata are not trusted.

    Raises:
        UserError: the format or version is wrong, or a key is missing, unknown or malformed.
    """
    values: dict[str, Any] = dict(metadata) if isinstance(metadata, dict) else {}
    if values.pop("format", None) != file_format:
        kind = file_format.removeprefix("new-llm-").replace("-", " ")
        raise UserError(f"{where}: not a {kind} file (its format is not {file_format!r})")
    if (found := values.pop("format_version", None)) != str(version):
        raise UserError(shorten(f"{where}: format version {found}; this program reads {version}"))
    values.pop(DIGEST, None)
    try:
        for name, hint in get_type_hints(record_type).items():
            if name in values and hint is not str and (values[name] == "null" or hint != str | None):
                values[name] = json.loads(values[name])
        return TypeAdapter(record_type).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        message = str(describe_validation_error(error, where))
    except (ValueError, TypeError, RecursionError) as error:
        message = f"{where}: broken metadata: {error}"
    raise UserError(shorten(message))


def now() -> str:
    """The current time for a record, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# Digests


def fingerprint_weights(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of a model's weights, the same on every device."""
    return fingerprint_tensors(model.state_dict())


def fingerprint_tensors(tensors: Mapping[str, Tensor], beginning: bytes = b"") -> str:
    """SHA-256 of `beginning` and the tensors' names, dtypes, shapes and bytes; see `fingerprint_weights`."""
    digest = hashlib.sha256(beginning)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_list_bytes(tensor))
    return digest.hexdigest()


def hash_content(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """The digest of a file: SHA-256 of its metadata, without the digest itself, and its tensors."""
    rest = {name: value for name, value in metadata.items() if name != DIGEST}
    return fingerprint_tensors(tensors, json.dumps(rest, sort_keys=True).encode())


def _list_bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()
