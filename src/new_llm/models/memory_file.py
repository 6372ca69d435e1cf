"""A memory as a safetensors file: tensors, a record of what filled it, and a digest. Nothing in it is executed.

Each layer's memory is written as in `get_memory_state`: tensors as `layers.<index>.<key>`, plain values in the record.
The record is the file's string metadata:

```
format               new-llm-memory
format_version       2
weights_fingerprint  sha256 of the weights that filled the memory
segment_length       64
rows                 "shared", or the number of rows, each with its own memory
program_version      0.1.0
created              2026-01-31T12:00:00+00:00
layers               [{"layer": 0, "kind": "infini", "version": 3, "additive": false, "settings": {...}}]
sha256               of all of this and the tensors
```
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from new_llm import __version__
from new_llm.config import UserError
from new_llm.config.files import shorten
from new_llm.config.sections import section
from new_llm.formats import format_plural
from new_llm.models.held_memory import HeldMemory
from new_llm.models.state import MAX_COUNT, STATE_VERSION, check_values, merge_memory_states
from new_llm.models.tensor_files import (
    DTYPE_NAMES,
    fingerprint_weights,
    format_record,
    now,
    parse_record,
    read_header,
    read_safetensors,
    write_safetensors,
)

FORMAT = "new-llm-memory"
FORMAT_VERSION = 2
MAX_DIMENSIONS = 8
SHARED = "shared"
"""The value of `rows` if all rows share one memory."""
LAYER_FIELDS = {"layer_kind": "kind", "version": "version", "additive": "additive"}
"""The fields of a `LayerRecord`, by their keys in a layer's state."""

Size = Annotated[int, Field(gt=0, lt=MAX_COUNT)]
Count = Annotated[int, Field(ge=0, lt=MAX_COUNT)]
ShortText = Annotated[str, Field(max_length=100)]
State = dict[int, dict[str, Any]]
"""The result of `get_memory_state`."""


@section
class LayerRecord:
    """The plain values of one layer's memory."""

    layer: Count
    """Index in the model."""
    kind: ShortText
    """The layer kind."""
    version: Count
    """Version of the layer's state."""
    additive: bool
    """Whether memories of different texts can be added."""
    settings: dict[ShortText, bool | int | float | ShortText | None]
    """Settings that must be the same in a model that loads the memory."""

    def __post_init__(self) -> None:
        if self.version != STATE_VERSION:
            raise UserError(f"layer {self.layer}: state version {self.version}; this program reads {STATE_VERSION}")


@section
class MemoryRecord:
    """A memory file's metadata."""

    program_version: ShortText
    """Version of the program that wrote the file."""
    created: ShortText
    """Time of writing, UTC, ISO 8601."""
    weights_fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """SHA-256 of the weights that filled the memory."""
    segment_length: Size
    """Number of tokens in a segment of the model that filled it."""
    rows: Size | None
    """Number of rows, each with its own memory; None: all share one."""
    layers: Annotated[tuple[LayerRecord, ...], Field(min_length=1)]
    """The memory layers, in order of their index."""

    def __post_init__(self) -> None:
        indices = [layer.layer for layer in self.layers]
        if indices != sorted(set(indices)):
            raise UserError(f"layers {indices} are not in ascending order without duplicates")


# Files


@dataclass(frozen=True)
class MemoryFile:
    """The content of a memory file: its record, and its memory in the form of `get_memory_state`."""

    record: MemoryRecord
    state: State

    @property
    def tokens_seen(self) -> int | None:
        """Number of tokens in the memory, over all rows and merged files; None: no layer counts them."""
        counts = (entry.get("token_counts") for entry in self.state.values())
        return max((sum(count.flatten().tolist()) for count in counts if isinstance(count, Tensor)), default=None)


def save_memory_file(model: HeldMemory, path: str | Path) -> None:
    """Write the memory that a model holds, atomically. Raises UserError if the model has no memory layer."""
    if not model.memory_layers:
        raise UserError("this model has no memory layer, so there is no memory to save")
    write_memory_file(Path(path), model.get_memory_state(), fingerprint_weights(model), model.segment_length)


def load_memory_file(model: HeldMemory, path: str | Path, *, force: bool = False) -> None:
    """Load a memory file into a model. After an error the model's memory is unchanged.

    Args:
        model: must have the layers and weights that filled the memory.
        force: accept a memory that other weights have filled, if its shapes fit.

    Raises:
        UserError: the file is broken or not a memory file, or other layers or (without `force`) other weights filled
            it.
    """
    content, before = read_memory_file(Path(path)), model.keep_memory()
    try:
        model.set_memory_state(content.state)
    except ValueError as error:
        raise UserError(shorten(f"{path}: {error}")) from None
    filled_by = content.record.weights_fingerprint
    if not force and filled_by != (own := fingerprint_weights(model)):
        model.restore_memory(before)
        raise UserError(
            f"{path}: filled by other weights (fingerprint {filled_by[:12]}…) than this model's ({own[:12]}…); --force "
            "(force=True) loads it anyway"
        )


def write_memory_file(path: Path, state: State, weights_fingerprint: str, segment_length: int) -> MemoryFile:
    """Write a state from `get_memory_state` atomically; returns the file's content. Raises OSError if that fails."""
    layers: list[LayerRecord] = []
    tensors: dict[str, Tensor] = {}
    rows: int | None = None
    for index, entry in sorted(state.items()):
        own = {key: value for key, value in entry.items() if isinstance(value, Tensor)}
        tensors |= {f"layers.{index}.{key}": value for key, value in own.items()}
        rows = len(next(iter(own.values()))) if entry["per_row"] else None
        settings = {key: value for key, value in entry.items() if key not in {*own, *LAYER_FIELDS, "per_row"}}
        named = {field: entry[key] for key, field in LAYER_FIELDS.items()}
        layers.append(LayerRecord(layer=index, settings=settings, **named))
    record = MemoryRecord(
        program_version=__version__,
        created=now(),
        weights_fingerprint=weights_fingerprint,
        segment_length=segment_length,
        rows=rows,
        layers=tuple(layers),
    )
    metadata = format_record(record, FORMAT, FORMAT_VERSION) | ({"rows": SHARED} if rows is None else {})
    write_safetensors(path, tensors, metadata)
    return MemoryFile(record, state)


def read_memory_file(path: Path) -> MemoryFile:
    """Read and validate a memory file, without a model. Raises UserError if it is broken or of another version."""
    header, num_bytes = read_header(path), path.stat().st_size
    is_shared = header.metadata.get("rows") == SHARED
    metadata = header.metadata | ({"rows": "null"} if is_shared else {})
    record = parse_record(metadata, MemoryRecord, FORMAT, FORMAT_VERSION, str(path))
    for name, shape in header.shapes.items():
        # If one size is 0, the file can claim anything for the others; huge sizes would cost time but take no bytes.
        is_possible = len(shape) <= MAX_DIMENSIONS and max(shape, default=0) <= num_bytes
        if header.dtypes[name] not in DTYPE_NAMES.values() or not is_possible:
            found = f"has shape {list(shape)} of {header.dtypes[name]}"
            raise UserError(shorten(f"{path}: {name} {found}, which is impossible in a memory"))
    try:
        return MemoryFile(record, _fill_state(record, read_safetensors(path)))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(shorten(f"{path}: {error}")) from None


def merge_memory_files(paths: Sequence[Path], out: Path, *, force: bool = False) -> MemoryFile:
    """Add memories that one model filled from different texts, and write the sum; see `merge_memory_states`.

    Args:
        out: the file to write; may be one of `paths`.
        force: allow memories filled with different weights or segment lengths, if their shapes fit.

    Raises:
        UserError: a file is broken, memories can't be added, or (without `force`) different models filled them.
    """
    if len(paths) < 2:
        raise UserError("merge: at least two memory files are needed")
    contents = [read_memory_file(path) for path in paths]
    try:
        state = merge_memory_states([content.state for content in contents])
    except ValueError as error:
        message = re.sub(r"\bstate (\d+)", lambda match: str(paths[int(match[1])]), str(error))
        raise UserError(shorten(message)) from None
    first = contents[0].record
    facts = {"weights_fingerprint": "other weights", "segment_length": "segments of another length"}
    for path, content in zip(paths, contents, strict=True):
        odd = [what for name, what in facts.items() if getattr(content.record, name) != getattr(first, name)]
        if odd and not force:
            raise UserError(f"{path}: filled by {odd[0]} than {paths[0]}; --force (force=True) adds them anyway")
    return write_memory_file(out, state, first.weights_fingerprint, first.segment_length)


def _fill_state(record: MemoryRecord, tensors: dict[str, Tensor]) -> State:
    """The memory state from a record and the file's tensors; raises ValueError if they do not fit together."""
    state: State = {
        layer.layer: layer.settings
        | {key: getattr(layer, field) for key, field in LAYER_FIELDS.items()}
        | {"per_row": record.rows is not None}
        for layer in record.layers
    }
    by_prefix = {f"layers.{index}": entry for index, entry in state.items()}
    for name, tensor in tensors.items():
        prefix, _, key = name.rpartition(".")
        if prefix not in by_prefix or key in by_prefix[prefix]:
            raise ValueError(f"unknown tensor {name}")
        if record.rows is not None and tensor.shape[:1] != (record.rows,):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, not {format_plural(record.rows, 'row')}")
        by_prefix[prefix][key] = tensor
    for index, entry in state.items():
        if not any(isinstance(value, Tensor) for value in entry.values()):
            raise ValueError(f"no tensors for layers.{index}")
        check_values(entry, f"layer {index}")
    return state


# Comparing


def list_tensors(content: MemoryFile) -> dict[str, Tensor]:
    """The tensors of every layer and row, by a description of their place; tensors of several memories are split."""
    listed: dict[str, Tensor] = {}
    for index, entry in content.state.items():
        for row in [None] if content.record.rows is None else range(content.record.rows):
            place = f"layer {index}" if row is None else f"layer {index}, row {row}"
            for key, value in entry.items():
                if not isinstance(value, Tensor):
                    continue
                own = value if row is None else value[row]
                if own.dim() and len(own) == entry.get("num_memories"):
                    listed |= {f"{place}: {key} {number}": part for number, part in enumerate(own)}
                else:
                    listed[f"{place}: {key}"] = own
    return listed


def compare_memories(a: MemoryFile, b: MemoryFile) -> dict[str, tuple[float, float, float, float]]:
    """‖A‖, ‖B‖, ‖A − B‖ / ‖A‖ (0 if both are zero) and the cosine ⟨A, B⟩ / (‖A‖ ‖B‖) of two files' tensors.

    Computed in float64; the keys are those of `list_tensors`.

    Raises:
        ValueError: the layers, rows or shapes of the two memories differ.
    """
    one, other = list_tensors(a), list_tensors(b)
    for place in one | other:
        shapes = [list(listed[place].shape) if place in listed else "nothing" for listed in (one, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"layers, rows or shapes differ: {place}: {shapes[0]} and {shapes[1]}")
    figures: dict[str, tuple[float, float, float, float]] = {}
    for place, tensor in one.items():
        x, y = tensor.double(), other[place].double()
        norm_x, norm_y, apart = float(x.norm()), float(y.norm()), float((x - y).norm())
        relative = apart / norm_x if norm_x else (math.inf if apart else 0.0)
        cosine = float((x * y).sum()) / (norm_x * norm_y) if norm_x and norm_y else math.nan
        figures[place] = norm_x, norm_y, relative, cosine
    return figures
