"""An adapter's weights as a small file: tensors, and what they belong to. Nothing of it is executed.

`.safetensors` holds the tensors with string metadata; `.pt` holds {"metadata": strings, "tensors": tensors} as
`torch.save` writes it, and is read with `weights_only=True`. The metadata are the same:

```
format            new-llm-parallel-adapter
format_version    1
base_name         EleutherAI/pythia-70m
base_fingerprint  sha256 of the base's weights
with_base         whether the base's weights are in the file: they were trained too
segment_length    256
layers            {"0": {"initial_alpha": 0.0, "use_delta_rule": true, ...}}
program_version   0.1.0
created           2026-01-31T12:00:00+00:00
sha256            of all of this and the tensors
```
"""

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from new_llm import __version__
from new_llm.config import UserError
from new_llm.config.files import shorten, write_atomically
from new_llm.config.model import check_adapter_suffix
from new_llm.config.sections import describe_validation_error, section
from new_llm.models.layers.parallel_infini import ParallelInfiniOptions
from new_llm.models.memory_record import Size
from new_llm.models.tensor_files import (
    DIGEST,
    check_digest,
    check_finite,
    hash_content,
    raise_os_errors,
    read_header,
    read_safetensors,
    read_torch_file,
    write_safetensors,
)

FORMAT = "new-llm-parallel-adapter"
FORMAT_VERSION = 1
OWN_KEYS = ("format", "format_version", DIGEST)
"""Metadata that are not the record's."""
ShortText = Annotated[str, Field(max_length=1000)]


@section
class AdapterRecord:
    """An adapter file's metadata."""

    base_name: ShortText | None
    """Hub name or directory of the base; None: it is not known."""
    base_fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Sha256 of the base's weights."""
    with_base: bool
    """Whether the file holds the base's weights too."""
    segment_length: Size
    """Tokens in a segment of the model that was saved."""
    layers: Annotated[dict[Annotated[int, Field(ge=0)], ParallelInfiniOptions], Field(min_length=1)]
    """The settings of each layer's memory, by the layer's index."""
    program_version: ShortText = __version__
    """The program that wrote the file."""
    created: ShortText = ""
    """When, UTC, ISO 8601."""


class AdapterFile(NamedTuple):
    """What an adapter file holds: its metadata, and the tensors by their names in the model's state dict."""

    record: AdapterRecord
    tensors: dict[str, Tensor]


_RECORD = TypeAdapter(AdapterRecord)


def write_adapter_file(path: Path, content: AdapterFile) -> None:
    """Write an adapter file atomically, in the format that its ending says; `created` is filled in.

    Raises:
        UserError: the ending says no format, or the file can't be written.
    """
    check_adapter_suffix(path, "the adapter's file")
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    values = _RECORD.dump_python(dataclasses.replace(content.record, created=created), mode="json")
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
    metadata |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    try:
        if path.suffix == ".safetensors":
            write_safetensors(path, content.tensors, metadata)
            return
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in content.tensors.items()}
        metadata[DIGEST] = hash_content(metadata, tensors)
        with raise_os_errors(path), write_atomically(path) as temporary, temporary.open("wb") as file:
            torch.save({"metadata": metadata, "tensors": tensors}, file)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(shorten(f"{path}: can't be written: {reason}")) from None


def read_adapter_file(path: Path) -> AdapterFile:
    """Read and validate an adapter file; needs no model.

    Raises:
        UserError: no readable adapter file of this version, or broken: one line says what.
    """
    where = str(path)
    check_adapter_suffix(path, "the adapter's file")
    try:
        metadata, tensors = (
            _read_pt(path) if path.suffix == ".pt" else (read_header(path).metadata, read_safetensors(path))
        )
    except OSError as error:
        raise UserError(f"{where}: can't be read: {error.strerror or error}") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise UserError(f"{where}: no adapter file (its format is not {FORMAT!r})")
    if not all(isinstance(value, str) for value in (*metadata, *metadata.values())):
        raise UserError(f"{where}: broken adapter file: its metadata are not all strings")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        found = metadata.get("format_version")
        raise UserError(shorten(f"{where}: format version {found}, this program reads {FORMAT_VERSION}"))
    _check_tensors(tensors, where)
    record = _parse_record(metadata, where)
    check_digest(metadata, tensors, where)
    return AdapterFile(record, tensors)


def _read_pt(path: Path) -> tuple[Any, Any]:
    """What `write_adapter_file` gave to torch.save; nothing but tensors, strings and dictionaries is made of it."""
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: no adapter file (it holds no dictionary)")
    return content.get("metadata"), content.get("tensors")


def _check_tensors(tensors: Any, where: str) -> None:
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{where}: broken adapter file: it holds no tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise UserError(shorten(f"{where}: broken adapter file: {name!r} is not a tensor of floats"))
    check_finite(tensors, where)


def _parse_record(metadata: dict[str, str], where: str) -> AdapterRecord:
    values: dict[str, Any] = {key: value for key, value in metadata.items() if key not in OWN_KEYS}
    try:
        for key in ("base_name", "with_base", "segment_length", "layers"):
            if values.get(key) and (key != "base_name" or values[key] == "null"):
                values[key] = json.loads(values[key])
        return _RECORD.validate_json(json.dumps(values, allow_nan=False), strict=True)
    except ValidationError as error:
        message = str(describe_validation_error(error, where))
    except (ValueError, RecursionError) as error:
        message = f"{where}: broken metadata: {error}"
    raise UserError(shorten(message))
