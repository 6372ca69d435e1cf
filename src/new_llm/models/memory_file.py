"""A memory as a safetensors file: tensors, facts about who filled it, a digest. Nothing of it is executed.

Tensors are `layers.<index>.<key>` with the keys of `get_memory_state`; what follows from others (whose turn
it is) is not stored. The facts are the file's string metadata:

```
format               new-llm-memory
format_version       1
weights_fingerprint  sha256 of the weights that filled the memory
segment_length       64
tokens_seen          1048576
segments_seen        16384
rows                 shared, or the number of rows that have a memory each
program_version      0.1.0
created              2026-01-31T12:00:00+00:00
layers               [{"layer": 0, "kind": "infini", "version": 1, "num_memories": 1, ...}]
sha256               of all of this and the tensors
```
"""

import dataclasses
import datetime
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from new_llm import __version__
from new_llm.config import UserError
from new_llm.config.files import describe_os_error, shorten
from new_llm.config.sections import describe_validation_error, section
from new_llm.models.held_memory import HeldMemory
from new_llm.models.layers import LAYER_KINDS, MemoryLayer
from new_llm.models.layers.memory_layer import describe_memory_options
from new_llm.models.state import (
    STATE_VERSION,
    WHY_NOT_ADDITIVE,
    MemoryFacts,
    MemoryState,
    entry_is_per_row,
    merge_memory_states,
    state_to_dict,
)
from new_llm.models.tensor_files import (
    DIGEST,
    TensorHeader,
    fingerprint_weights,
    read_header,
    read_safetensors,
    write_safetensors,
)

FORMAT = "new-llm-memory"
FORMAT_VERSION = 1
SHARED = "shared"
"""What `rows` says where all rows share one memory."""
MAX_COUNT = 2**53
"""Sizes and counts beyond this are nonsense."""

Size = Annotated[int, Field(gt=0, lt=MAX_COUNT)]
Count = Annotated[int, Field(ge=0, lt=MAX_COUNT)]
ShortText = Annotated[str, Field(max_length=100)]
FLOATS, COUNTS = ("F32", "F64"), ("I64",)
OWN_KEYS = ("format", "format_version", DIGEST)
"""Metadata that are not the record's."""


@section
class LayerRecord:
    """One layer's memory: its kind, shape and the settings that wrote it."""

    layer: Count
    """Index in the model."""
    kind: ShortText
    """The layer kind."""
    version: Count
    """Version of the layer's state."""
    num_memories: Size
    """N."""
    num_memory_heads: Size
    """H."""
    head_size: Size
    """K."""
    value_size: Size
    """V."""
    segments_per_memory: Size
    """Segments written into one memory before the next."""
    use_delta_rule: bool
    """Whether writes subtract what the memory holds."""
    decay: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None
    """w of each head, fixed or learned: what a segment's write leaves of the memory; None: all of it."""

    def __post_init__(self) -> None:
        if self.decay is not None and len(self.decay) != self.num_memory_heads:
            raise UserError(f"layer {self.layer}: decay has {len(self.decay)} entries, not {self.num_memory_heads}")
        if self.version != STATE_VERSION:
            raise UserError(f"layer {self.layer}: state version {self.version}, this program reads {STATE_VERSION}")
        kind = LAYER_KINDS.get(self.kind)
        if kind is None or not issubclass(kind, MemoryLayer):
            known = ", ".join(sorted(name for name, layer in LAYER_KINDS.items() if issubclass(layer, MemoryLayer)))
            raise UserError(f"layer {self.layer}: unknown kind of memory layer {self.kind!r}; known are {known}")

    @property
    def facts(self) -> MemoryFacts:
        """What the layer's state dictionary repeats of this."""
        layer_type: Any = LAYER_KINDS[self.kind]
        return layer_type.make_facts(
            use_delta_rule=self.use_delta_rule,
            has_decay=self.decay is not None,
            segments_per_memory=self.segments_per_memory,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """As `describe_memory_options` gives them."""
        names = (
            "num_memories",
            "num_memory_heads",
            "head_size",
            "value_size",
            "segments_per_memory",
            "use_delta_rule",
        )
        decay = None if self.decay is None else list(self.decay)
        return {name: getattr(self, name) for name in names} | {"decay": decay}

    def tensor_shapes(self, rows: int | None) -> dict[str, tuple[int, ...]]:
        """The tensors of this layer in the state dictionary: name → shape."""
        lead = () if rows is None else (rows,)
        shape = (self.num_memories, self.num_memory_heads, self.head_size)
        facts = self.facts
        return {
            facts.key("memories"): (*lead, *shape, self.value_size),
            facts.key("norms"): (*lead, *shape),
            "token_counts": (*lead, self.num_memories),
            "segment_counter": lead,
            "segments_seen": lead,
        }


@section
class MemoryRecord:
    """A memory file's metadata."""

    program_version: ShortText
    """The program that wrote the file."""
    created: ShortText
    """When, UTC, ISO 8601."""
    weights_fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Sha256 of the weights that filled the memory."""
    segment_length: Size
    """Tokens in a segment of the model that filled it."""
    rows: Size | None
    """Rows that have a memory each; None: all share one."""
    tokens_seen: Count
    """Tokens in the memory, all rows together."""
    segments_seen: Count
    """Segments in the memory, all rows and merged files together."""
    layers: Annotated[tuple[LayerRecord, ...], Field(min_length=1)]
    """The memory layers, by their index."""

    def __post_init__(self) -> None:
        indices = [layer.layer for layer in self.layers]
        if indices != sorted(set(indices)):
            raise UserError(f"layers {indices} are not in order, each once")


def make_record(
    state: dict[int, dict[str, Any]],
    *,
    settings: dict[int, dict[str, Any]],
    weights_fingerprint: str,
    segment_length: int,
) -> MemoryRecord:
    """Describe a state of `get_memory_state` whose layers have the settings of `describe_memory_options`."""
    per_row = [entry["segment_counter"].shape[0] for entry in state.values() if entry_is_per_row(entry)]
    tokens, segments = count_seen(state)
    return MemoryRecord(
        program_version=__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        weights_fingerprint=weights_fingerprint,
        segment_length=segment_length,
        rows=per_row[0] if per_row else None,
        tokens_seen=tokens,
        segments_seen=segments,
        layers=tuple(
            LayerRecord(
                layer=index,
                kind=entry["layer_kind"],
                version=entry["version"],
                **settings[index],
            )
            for index, entry in sorted(state.items())
        ),
    )


def count_seen(state: dict[int, dict[str, Any]]) -> tuple[int, int]:
    """Tokens and segments in the memory, all rows and merged files together, of the layer that has seen most."""
    # Python's integers: a broken file's counts can't overflow here.
    tokens = max(sum(entry["token_counts"].flatten().tolist()) for entry in state.values())
    segments = max(sum(entry["segments_seen"].flatten().tolist()) for entry in state.values())
    return tokens, segments


def format_record(record: MemoryRecord) -> dict[str, str]:
    """The record as metadata."""
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    layers = [dataclasses.asdict(layer) for layer in values.pop("layers")]
    values["rows"] = SHARED if record.rows is None else record.rows
    return {name: str(value) for name, value in values.items()} | {
        "layers": json.dumps(layers, separators=(",", ":"), allow_nan=False)
    }


_RECORD = TypeAdapter(MemoryRecord)
_LAYERS = TypeAdapter(tuple[LayerRecord, ...])


def parse_record(metadata: dict[str, str], where: str) -> MemoryRecord:
    """Read what `format_record` wrote; nothing in it is trusted.

    Raises:
        UserError: a key is missing, unknown or of the wrong form, or a version or layer kind is unknown here.
    """
    values: dict[str, Any] = dict(metadata)
    try:
        values["layers"] = _LAYERS.validate_json(values.get("layers", ""), strict=True)
        if values.get("rows") == SHARED:
            values["rows"] = None
        return _RECORD.validate_python(values)
    except ValidationError as error:
        message = str(describe_validation_error(error, where))
    except UserError as error:
        message = f"{where}: {error}"
    raise UserError(shorten(message))


# Files


@dataclass(frozen=True)
class MemoryFile:
    """What a memory file holds.

    Attributes:
        record: its metadata.
        state: its memory, as `get_memory_state` gives it and `set_memory_state` takes it.
    """

    record: MemoryRecord
    state: dict[int, dict[str, Any]]

    @property
    def settings(self) -> dict[int, dict[str, Any]]:
        """Each layer's settings, as `describe_memory_options` gives them."""
        return {layer.layer: layer.settings for layer in self.record.layers}


def save_memory_file(model: HeldMemory, path: str | Path, *, weights_fingerprint: str | None = None) -> None:
    """Write the memory that a model holds; the file is whole, or what was there before.

    Args:
        model: the model.
        path: the file.
        weights_fingerprint: of the model, where many files are written; None: computed.

    Raises:
        UserError: the model has no memory layer, or the file can't be written.
    """
    if not model.memory_layers:
        raise UserError("this model has no memory layer: there is no memory to save")
    check_kinds(model)
    state = model.get_memory_state()
    record = make_record(
        state,
        settings={index: describe_memory_options(layer) for index, layer in model.memory_layers.items()},
        weights_fingerprint=weights_fingerprint or fingerprint_weights(model),
        segment_length=model.segment_length,
    )
    write_memory_file(Path(path), MemoryFile(record, state))


def check_kinds(model: HeldMemory) -> None:
    """Raise UserError if a layer's memory is not one of associative memories, which alone have a form of file."""
    odd = {layer.kind for layer in model.memory_layers.values() if not isinstance(layer, MemoryLayer)}
    if odd:
        raise UserError(
            f"memory files hold associative memories, and not what {', '.join(sorted(odd))} carries; "
            "torch.save(model.get_memory_state(), ...) keeps any memory"
        )


def load_memory_file(model: HeldMemory, path: str | Path, *, force: bool = False) -> None:
    """Hold the memory of a file. All of it is held, or after an error none.

    Args:
        model: of the layers and the weights that filled the memory.
        path: what `save_memory_file` or `merge_memory_files` wrote.
        force: take a memory that other weights have filled, if its shapes fit.

    Raises:
        UserError: the file is broken or no memory file, or other layers or (unless forced) weights filled it.
    """
    content = read_memory_file(Path(path), check=lambda record: _check_fits(record, model, str(path), force))
    try:
        model.set_memory_state(content.state)
    except ValueError as error:
        raise UserError(shorten(f"{path}: {error}")) from None


def _check_fits(record: MemoryRecord, model: HeldMemory, where: str, force: bool) -> None:
    check_kinds(model)
    layers = model.memory_layers
    if [layer.layer for layer in record.layers] != list(layers):
        found = [layer.layer for layer in record.layers]
        raise UserError(shorten(f"{where}: memory of layers {found}, this model has memory in {list(layers)}"))
    for entry in record.layers:
        layer = layers[entry.layer]
        expected = {"layer kind": layer.kind, **describe_memory_options(layer)}
        for name, value in ({"layer kind": entry.kind} | entry.settings).items():
            is_learned = name == "decay" and layer.attention.decay is None  # then it is part of the weights
            if value != expected[name] and not (force and is_learned and None not in (value, expected[name])):
                raise UserError(
                    shorten(f"{where}: layer {entry.layer}: {name} {value}, this model has {expected[name]}")
                )
    if not force and record.weights_fingerprint != (own := fingerprint_weights(model)):
        raise UserError(
            f"{where}: filled by other weights (fingerprint {record.weights_fingerprint[:12]}…) than this "
            f"model's ({own[:12]}…); force=True takes it all the same"
        )


def write_memory_file(path: Path, content: MemoryFile) -> None:
    """Write a memory file atomically.

    Raises:
        UserError: the file can't be written.
    """
    tensors = {
        f"layers.{layer.layer}.{key}": content.state[layer.layer][key]
        for layer in content.record.layers
        for key in layer.tensor_shapes(content.record.rows)
    }
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION)} | format_record(content.record)
    try:
        write_safetensors(path, tensors, metadata)
    except OSError as error:
        raise UserError(describe_os_error(error)) from None


def read_memory_file(path: Path, check: Callable[[MemoryRecord], None] | None = None) -> MemoryFile:
    """Read and validate a memory file; needs no model.

    Args:
        path: the file.
        check: given the record before any tensor is read; raises to refuse the file.

    Raises:
        UserError: no readable memory file of this version, or broken: one line says what.
    """
    where = str(path)
    try:
        header = read_header(path)
        metadata = _check_metadata(header.metadata, where)
        record = parse_record({k: v for k, v in metadata.items() if k not in OWN_KEYS}, where)
        _check_tensors(header, record, where)
        if check is not None:
            check(record)
        tensors = read_safetensors(path)
    except FileNotFoundError as error:
        raise UserError(f"{where}: can't be read: {error.strerror}") from None
    state = {layer.layer: _restore_layer(layer, tensors, record.rows, where) for layer in record.layers}
    if count_seen(state) != (record.tokens_seen, record.segments_seen):
        raise UserError(f"{where}: corrupted: tokens_seen or segments_seen do not match the tensors")
    return MemoryFile(record, state)


def merge_memory_files(paths: Sequence[Path], out: Path, *, force: bool = False) -> MemoryFile:
    """Add memories that one model filled from different texts, and write the sum; see `merge_memory_states`.

    Args:
        paths: at least two memory files.
        out: the file to write; may be one of `paths`.
        force: add memories that different weights or segment lengths have filled, if their shapes fit.

    Raises:
        UserError: a file is broken, memories that do not add, or of different models.
    """
    if len(paths) < 2:
        raise UserError("merge: at least two memory files are needed")
    contents = [read_memory_file(path) for path in paths]
    first = contents[0].record
    for path, content in zip(paths, contents, strict=True):
        for layer in content.record.layers:
            if not layer.facts.additive:
                raise UserError(f"{path}: layer {layer.layer} {WHY_NOT_ADDITIVE}")
        for name in ("weights_fingerprint", "segment_length"):
            if not force and getattr(content.record, name) != getattr(first, name):
                what = "other weights" if name == "weights_fingerprint" else "segments of another length"
                raise UserError(
                    f"{path}: filled by {what} than {paths[0]}; --force (force=True) adds them all the same"
                )
    try:
        state = merge_memory_states([content.state for content in contents])
    except ValueError as error:
        message = re.sub(r"\bstate (\d+)", lambda match: str(paths[int(match[1])]), str(error))
        raise UserError(shorten(message)) from None
    record = make_record(
        state,
        settings=contents[0].settings,
        weights_fingerprint=first.weights_fingerprint,
        segment_length=first.segment_length,
    )
    merged = MemoryFile(record, state)
    write_memory_file(out, merged)
    return merged


def _check_metadata(metadata: dict[str, str], where: str) -> dict[str, str]:
    """The metadata of a memory file of this version."""
    if metadata.get("format") != FORMAT:
        raise UserError(f"{where}: a safetensors file, but not a memory file (its format is not {FORMAT!r})")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        found = metadata.get("format_version")
        raise UserError(shorten(f"{where}: format version {found}, this program reads {FORMAT_VERSION}"))
    return metadata


def _check_tensors(header: TensorHeader, record: MemoryRecord, where: str) -> None:
    """Refuse other tensors, shapes or dtypes than the record's, before any is read."""
    expected = {
        f"layers.{layer.layer}.{key}": (shape, FLOATS if key.endswith(("memories", "memory_norms")) else COUNTS)
        for layer in record.layers
        for key, shape in layer.tensor_shapes(record.rows).items()
    }
    if odd := sorted(set(header.shapes) ^ set(expected)):
        raise UserError(shorten(f"{where}: missing or unknown tensors: {', '.join(odd)}"))
    for name, (shape, dtypes) in expected.items():
        found = header.shapes[name], header.dtypes[name]
        if found[0] != shape or found[1] not in dtypes:
            raise UserError(
                shorten(
                    f"{where}: {name} has shape {list(found[0])} of {found[1]}, "
                    f"{list(shape)} of {' or '.join(dtypes)} is expected"
                )
            )


def _restore_layer(layer: Any, tensors: dict[str, Tensor], rows: int | None, where: str) -> dict[str, Any]:
    """One layer's entry of the state, with finite values and possible counts."""
    values = [tensors[f"layers.{layer.layer}.{key}"] for key in layer.tensor_shapes(rows)]
    if rows is None:
        values = [tensor.unsqueeze(0) for tensor in values]
    memories, norms, num_tokens, num_segments, segments_seen = values
    if not bool(torch.isfinite(memories).all() and torch.isfinite(norms).all()):
        raise UserError(f"{where}: layer {layer.layer} holds NaN or infinite values")
    for counts in (num_tokens, num_segments, segments_seen):
        if not bool(((counts >= 0) & (counts < MAX_COUNT)).all()):
            raise UserError(f"{where}: layer {layer.layer} holds impossible token or segment counts")
    state = MemoryState(memories, norms, num_tokens, num_segments, segments_seen)
    return state_to_dict(state, layer.facts, per_row=rows is not None)


# Comparing


class MemoryTensors(NamedTuple):
    """One memory of one layer (and row; None: all rows share it): M [H, K, V], z [H, K], and the tokens it has seen."""

    layer: int
    row: int | None
    memory: int
    memories: Tensor
    norms: Tensor
    num_tokens: int


class Distance(NamedTuple):
    """Two tensors side by side: Frobenius norms, ‖A − B‖ / ‖A‖ (0 where both are zero), ⟨A, B⟩ / (‖A‖ ‖B‖)."""

    norm_a: float
    norm_b: float
    relative: float
    cosine: float


def list_memories(content: MemoryFile) -> list[MemoryTensors]:
    """Every memory of every layer and row of a file."""
    listed: list[MemoryTensors] = []
    for layer in content.record.layers:
        entry = content.state[layer.layer]
        tensors = [entry[layer.facts.key("memories")], entry[layer.facts.key("norms")], entry["token_counts"]]
        for row in [None] if content.record.rows is None else range(content.record.rows):
            memories, norms, counts = tensors if row is None else [tensor[row] for tensor in tensors]
            listed += [
                MemoryTensors(layer.layer, row, n, memories[n], norms[n], int(counts[n]))
                for n in range(layer.num_memories)
            ]
    return listed


def pair_memories(a: MemoryFile, b: MemoryFile) -> list[tuple[MemoryTensors, MemoryTensors]]:
    """The memories of two files side by side.

    Raises:
        ValueError: they hold memories of other layers, rows or shapes.
    """
    one, other = list_memories(a), list_memories(b)
    places = [[(*memory[:3], list(memory.memories.shape)) for memory in memories] for memories in (one, other)]
    if places[0] != places[1]:
        found = (f"{len(p)} memories, the first of layer {p[0][0]} with shape {p[0][3]}" for p in places)
        raise ValueError(f"other layers, rows or shapes: {' against '.join(found)}")
    return list(zip(one, other, strict=True))


def measure_distance(a: Tensor, b: Tensor) -> Distance:
    """The distance of two tensors of one shape, in float64."""
    a, b = a.double(), b.double()
    norm_a, norm_b, apart = float(a.norm()), float(b.norm()), float((a - b).norm())
    relative = apart / norm_a if norm_a else (math.inf if apart else 0.0)
    cosine = float((a * b).sum()) / (norm_a * norm_b) if norm_a and norm_b else math.nan
    return Distance(norm_a, norm_b, relative, cosine)
