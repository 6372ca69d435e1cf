"""A model as a folder: `model.safetensors` (weights) and `model.json` (structure). No code is ever stored or run.

Each file carries its own digest, so that a damaged one is not taken for a model: the weights in their metadata, the
structure beside its other keys. Who edits `model.json` by hand removes its `sha256`.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from new_llm.config import UserError
from new_llm.config.atomic import write_atomically, write_text_atomically
from new_llm.config.bounded_files import read_json_file
from new_llm.models.layers import LAYER_KINDS
from new_llm.models.memory_file import fingerprint_tensors
from new_llm.models.memory_record import shorten
from new_llm.models.selective import SelectiveOutputLM
from new_llm.models.tensor_files import check_finite, read_metadata, read_safetensors, read_shapes
from new_llm.models.transformer import TransformerLM
from new_llm.models.write_errors import raise_os_errors

WEIGHTS_FILE = "model.safetensors"
STRUCTURE_FILE = "model.json"
FORMAT_VERSION = 1
MAX_LAYERS = 10_000
MAX_MEMORY_BYTES = 1 << 34
"""Of a model's memory, which the weights' sizes say nothing about."""


def describe_model(model: TransformerLM) -> dict[str, Any]:
    """The structure that `build_model` makes the model from: plain values.

    Raises:
        ValueError: a layer of a class that is not registered.
    """
    for index, layer in enumerate(model.layer_list):
        if LAYER_KINDS.get(layer.kind) is not type(layer):
            raise ValueError(
                f"layer {index}: {type(layer).__name__} is not registered; decorate it with register_layer"
            )
    return {
        "format_version": FORMAT_VERSION,
        "vocab_size": model.vocab_size,
        "segment_length": model.segment_length,
        "layer_norm_eps": model.final_layer_norm.eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        "selective": (
            {"skip_interval": model.skip_interval, "earlier_pass_weight": model.earlier_pass_weight}
            if isinstance(model, SelectiveOutputLM)
            else None
        ),
        "layers": [{"kind": layer.kind, **layer.settings} for layer in model.layer_list],
    }


def build_model(structure: dict[str, Any], where: str) -> TransformerLM:
    """A model with fresh weights of the described structure; `where` names its origin in errors.

    Raises:
        UserError: another format version, an unknown layer kind, or arguments that the layer refuses.
    """
    if not isinstance(structure, dict) or structure.get("format_version") != FORMAT_VERSION:
        found = structure.get("format_version") if isinstance(structure, dict) else type(structure).__name__
        raise UserError(f"{where}: format version {found!r}, this program reads {FORMAT_VERSION}")
    try:
        layers = []
        if len(structure["layers"]) > MAX_LAYERS:
            raise UserError(f"{where}: {len(structure['layers']):,} layers; at most {MAX_LAYERS:,} are allowed")
        for entry in structure["layers"]:
            settings = dict(entry)
            kind = settings.pop("kind")
            if kind not in LAYER_KINDS:
                raise UserError(f"{where}: unknown layer kind {kind!r}; known are {', '.join(LAYER_KINDS)}")
            layers.append(LAYER_KINDS[kind](**settings))
        selective = structure["selective"]
        kind = TransformerLM if selective is None else functools.partial(SelectiveOutputLM, **selective)
        return kind(
            layers,
            vocab_size=structure["vocab_size"],
            segment_length=structure["segment_length"],
            layer_norm_eps=structure["layer_norm_eps"],
            tie_word_embeddings=structure["tie_word_embeddings"],
        )
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError, MemoryError) as error:
        raise UserError(shorten(f"{where}: not a model description: {error}")) from None


def save_model(model: TransformerLM, folder: Path) -> None:
    """Write a model's weights and structure; each file is whole or not there.

    Raises:
        OSError: the disk refuses.
        ValueError: a layer of a class that is not registered.
    """
    write_model_files(describe_model(model), model.state_dict(), folder)


def write_model_files(structure: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> None:
    """Write `save_model`'s files; arguments as `describe_model` and `state_dict` give them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    metadata = {"format": "pt", "sha256": fingerprint_tensors(tensors)}
    path = folder / WEIGHTS_FILE
    with raise_os_errors(path), write_atomically(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    described = structure | {"sha256": _hash_structure(structure)}
    write_text_atomically(folder / STRUCTURE_FILE, json.dumps(described, indent=2))


def find_model_fault(folder: Path, fingerprint: str) -> str | None:
    """What is wrong with a model's folder that should hold the weights of a fingerprint; None: nothing."""
    try:
        read_structure(folder)
        found = fingerprint_tensors(_read_weights(folder))
    except UserError as error:
        return str(error)
    return None if found == fingerprint else f"{folder / WEIGHTS_FILE}: other weights"


def _hash_structure(structure: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(structure, sort_keys=True).encode()).hexdigest()


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    try:
        expected = read_metadata(path).get("sha256")
        tensors = read_safetensors(path)
    except FileNotFoundError:
        raise UserError(f"{folder}: no saved model here ({WEIGHTS_FILE} is missing)") from None
    if expected is not None and fingerprint_tensors(tensors) != expected:
        raise UserError(f"{path}: corrupted: the weights do not match the digest they were written with")
    return tensors


def read_structure(folder: Path) -> Any:
    """What `model.json` in a folder holds, which `build_model` checks.

    Raises:
        UserError: it is missing or no JSON, or has changed since it was written.
    """
    path = folder / STRUCTURE_FILE
    try:
        structure = read_json_file(path)
    except FileNotFoundError:
        raise UserError(f"{folder}: no saved model here ({STRUCTURE_FILE} is missing)") from None
    expected = structure.pop("sha256", None) if isinstance(structure, dict) else None
    if expected is not None and _hash_structure(structure) != expected:
        raise UserError(f"{path}: it has changed since it was written; if that was meant, remove its sha256")
    return structure


def _check_structure(structure: Any, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Refuse a structure that has other weights than the file, before memory is taken for any."""
    layers = structure.get("layers") if isinstance(structure, dict) else None
    if isinstance(layers, list) and len(layers) > len(shapes):
        raise UserError(f"{path}: {len(layers):,} layers, but {WEIGHTS_FILE} holds {len(shapes):,} tensors")
    with torch.device("meta"):
        model = build_model(structure, str(path))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if odd := sorted(name for name in {*expected, *shapes} if expected.get(name) != shapes.get(name)):
        found, wanted = (list(of[odd[0]]) if odd[0] in of else "missing" for of in (shapes, expected))
        raise UserError(
            shorten(
                f"{path.parent / WEIGHTS_FILE}: weights do not fit {STRUCTURE_FILE}: {odd[0]} is {found} in the file, "
                f"{wanted} in the structure"
            )
        )
    if (num_bytes := model.memory_info()["total_bytes"]) > MAX_MEMORY_BYTES:
        raise UserError(f"{path}: its memory would have {num_bytes:,} bytes; at most {MAX_MEMORY_BYTES:,} are allowed")


def load_model(folder: Path) -> TransformerLM:
    """Make a model from `save_model`'s folder, on the CPU, in the dtype it was saved in.

    Raises:
        UserError: a file is missing or broken, or the weights are not the structure's, or not finite.
    """
    path, weights = folder / STRUCTURE_FILE, folder / WEIGHTS_FILE
    structure = read_structure(folder)
    try:
        _check_structure(structure, read_shapes(weights), path)
    except FileNotFoundError:
        raise UserError(f"{folder}: no saved model here ({WEIGHTS_FILE} is missing)") from None
    tensors = _read_weights(folder)
    check_finite(tensors, str(weights))
    if odd := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise UserError(shorten(f"{weights}: {odd[0]} is {tensors[odd[0]].dtype}; weights are floats"))
    model = build_model(structure, str(path))
    if "embed_in.weight" in tensors:
        model.to(tensors["embed_in.weight"].dtype)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        message = " ".join(str(error).split())
        raise UserError(f"{folder / WEIGHTS_FILE}: weights do not fit {STRUCTURE_FILE}: {message}") from None
    return model
