"""A memory as a safetensors file: tensors, facts about who filled it, a digest. Nothing of it is executed.

Tensors are `layers.<index>.<key>` with the keys of `get_memory_state`; what follows from others (whose turn
it is) is not stored. `memory_record` describes the metadata.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from new_llm.config import UserError
from new_llm.config.files import describe_os_error, shorten
from new_llm.models.held_memory import HeldMemory
from new_llm.models.layers.memory_layer import describe_memory_options
from new_llm.models.memory_record import (
    FORMAT,
    FORMAT_VERSION,
    MAX_COUNT,
    MemoryRecord,
    count_seen,
    format_record,
    make_record,
    parse_record,
)
from new_llm.models.state import WHY_NOT_ADDITIVE, MemoryState, merge_memory_states, state_to_dict
from new_llm.models.tensor_files import (
    DIGEST,
    TensorHeader,
    fingerprint_weights,
    read_header,
    read_safetensors,
    write_safetensors,
)

FLOATS, COUNTS = ("F32", "F64"), ("I64",)
OWN_KEYS = ("format", "format_version", DIGEST)
"""Metadata that are not the record's."""


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
    state = model.get_memory_state()
    record = make_record(
        state,
        settings={index: describe_memory_options(layer) for index, layer in model.memory_layers.items()},
        weights_fingerprint=weights_fingerprint or fingerprint_weights(model),
        segment_length=model.segment_length,
    )
    write_memory_file(Path(path), MemoryFile(record, state))


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
