"""A model as a folder: `model.safetensors` (weights) and `model.json` (structure). No code is ever stored or run.

The weights file contains a digest. The structure has none; instead, its settings are validated like a configuration's,
and the shapes that follow from them are compared with those of the weights before any memory is allocated.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from new_llm.config import PythiaConfig, UserError
from new_llm.config.files import read_json_file, shorten, write_text_atomically
from new_llm.config.model import MAX_LAYERS, Size
from new_llm.config.sections import describe_validation_error, section
from new_llm.models.cost import check_fits
from new_llm.models.layers import LAYER_KINDS, Layer
from new_llm.models.tensor_files import (
    TensorHeader,
    check_finite,
    find_misfit,
    fingerprint_tensors,
    read_header,
    read_safetensors,
    write_safetensors,
)
from new_llm.models.transformer import SelectiveOptions, SelectiveOutputLM, TransformerLM

WEIGHTS_FILE = "model.safetensors"
STRUCTURE_FILE = "model.json"
WEIGHT_DTYPES = ("F16", "BF16", "F32", "F64")
"""The dtypes in which weights may be stored."""
FORMAT_VERSION = 1

Epsilon = Annotated[float, Field(gt=0, lt=1)]


@section
class LayerShape:
    """The settings that layers of several kinds share, for validation; a kind's own settings are its options."""

    hidden_size: Size = 1
    num_heads: Size = 1
    intermediate_size: Size = 1
    layer_norm_eps: Epsilon = 1e-5
    rotary_pct: Annotated[float, Field(ge=0, le=1)] = 0.0
    rotary_emb_base: Annotated[float, Field(gt=0)] = 1.0


@section
class ModelStructure:
    """The content of `model.json`."""

    format_version: Literal[1]
    vocab_size: Size
    segment_length: Size
    layer_norm_eps: Epsilon
    initializer_range: Annotated[float, Field(gt=0)] = PythiaConfig.initializer_range
    tie_word_embeddings: bool
    selective: SelectiveOptions | None
    layers: Annotated[tuple[dict[str, Any], ...], Field(min_length=1, max_length=MAX_LAYERS)]


def describe_model(model: TransformerLM) -> dict[str, Any]:
    """A model's structure as plain values, for `build_model`. Raises ValueError if a layer is not registered."""
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
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": model.tie_word_embeddings,
        "selective": dataclasses.asdict(cast(Any, model.selective)) if model.skip_interval else None,
        "layers": [{"kind": layer.kind, **layer.settings} for layer in model.layer_list],
    }


def build_model(structure: Any, where: str, header: TensorHeader | None = None) -> TransformerLM:
    """Build a model with new weights from its structure.

    Args:
        structure: from `describe_model`, perhaps read from a file; nothing in it is trusted.
        header: header of the weights that will be loaded; their shapes are checked before any memory is allocated.
            None: no check.
        where: prefix of error messages.

    Raises:
        UserError: the format version or a layer kind is unknown, a setting has the wrong type or is out of range, or
            the structure does not fit the weights.
    """
    try:
        plan = _validate(ModelStructure, structure)
        with torch.device("meta"):
            planned = [_build_layer(entry) for entry in plan.layers]
        if header is not None:
            _check_layers(plan, planned, header)
        check_fits(planned, plan.vocab_size)
        layers = [_build_layer(entry) for entry in plan.layers]
        names = ("vocab_size", "segment_length", "layer_norm_eps", "initializer_range", "tie_word_embeddings")
        options: dict[str, Any] = {name: getattr(plan, name) for name in names}
        if plan.selective is not None:
            return SelectiveOutputLM(layers, **dataclasses.asdict(cast(Any, plan.selective)), **options)
        return TransformerLM(layers, **options)
    except ValidationError as error:
        message = str(describe_validation_error(error, where))
    except (TypeError, ValueError, AttributeError, OverflowError, RuntimeError, MemoryError) as error:
        message = f"{where}: {error}"
    raise UserError(shorten(message))


def _validate(kind: type, values: dict[str, Any]) -> Any:
    """Convert JSON values to a dataclass; types must match exactly, and NaN and infinity are rejected."""
    return TypeAdapter(kind).validate_json(json.dumps(values), strict=True)


def _build_layer(entry: dict[str, Any]) -> Layer:
    settings = dict(entry)
    kind = settings.pop("kind", None)
    _validate(LayerShape, _pick_fields(LayerShape, settings))
    if kind not in LAYER_KINDS:
        raise ValueError(
            f"unknown layer kind {kind!r}; known are {', '.join(LAYER_KINDS)}; import the module of your own layer "
            "first, as --model my_module:MyLayer does"
        )
    layer_type = LAYER_KINDS[kind]
    _validate(layer_type.options_type, _pick_fields(layer_type.options_type, settings))
    return layer_type(**settings)


def _pick_fields(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    return {field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values}


def _check_layers(plan: ModelStructure, planned: list[Layer], header: TensorHeader) -> None:
    """Compare the shapes that follow from a structure with those of the weights, layer by layer; raise ValueError."""
    if odd := [name for name, dtype in header.dtypes.items() if dtype not in WEIGHT_DTYPES]:
        allowed = ", ".join(WEIGHT_DTYPES)
        raise ValueError(f"{WEIGHTS_FILE}: {odd[0]} has dtype {header.dtypes[odd[0]]}; weights are floats ({allowed})")
    embedding = header.shapes.get("embed_in.weight", ())
    if len(embedding) != 2 or embedding[0] != plan.vocab_size:
        raise ValueError(f"vocab_size is {plan.vocab_size}, but embed_in.weight in {WEIGHTS_FILE} is {list(embedding)}")
    for index, layer in enumerate(planned):
        if layer.hidden_size != embedding[1]:
            raise ValueError(
                f"layer {index} is {layer.hidden_size} wide, but the embedding in {WEIGHTS_FILE} is {embedding[1]} wide"
            )
        prefix = f"layers.{index}."
        found = {name: shape for name, shape in header.shapes.items() if name.startswith(prefix)}
        if misfit := find_misfit(found, {prefix + name: value for name, value in layer.state_dict().items()}):
            raise ValueError(f"weights do not fit {STRUCTURE_FILE}: {misfit}")


def save_model(model: TransformerLM, folder: str | Path) -> None:
    """Write a model's weights and structure; each file is written atomically.

    Raises:
        UserError: the head or embedding is wrapped, or weights are quantized, which a model file can't hold.
    """
    weights = model.state_dict()
    for name in ("embed_in", "embed_out"):
        module = getattr(model, name)
        if (parameters := [key for key, _ in module.named_parameters()]) != ["weight"]:
            raise UserError(
                f"{name} is a {type(module).__module__}.{type(module).__name__} of {', '.join(parameters) or 'nothing'}"
                "; a model file can only hold a plain weight: merge or remove the wrapper, then save the model"
            )
    if odd := [name for name, value in weights.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{odd[0]} is not a tensor: quantized weights can't be saved")
    write_model_files(describe_model(model), weights, Path(folder))


def write_model_files(structure: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> None:
    """Write the files of `save_model`, from the results of `describe_model` and `state_dict`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS_FILE, weights, {"format": "pt"})
    write_text_atomically(folder / STRUCTURE_FILE, json.dumps(structure, indent=2))


def find_model_fault(folder: Path, structure: dict[str, Any], fingerprint: str) -> str | None:
    """Why a folder does not hold a model with this structure and weights fingerprint; None: it does."""
    try:
        if read_structure(folder) != json.loads(json.dumps(structure)):
            return f"{folder / STRUCTURE_FILE}: the structure is different"
        found = fingerprint_tensors(read_safetensors(folder / WEIGHTS_FILE))
    except UserError as error:
        return str(error)
    return None if found == fingerprint else f"{folder / WEIGHTS_FILE}: the weights are different"


def read_structure(folder: Path) -> Any:
    """The content of `model.json` in a folder, not yet validated. Raises UserError if it or the weights are missing."""
    for name in (STRUCTURE_FILE, WEIGHTS_FILE):
        if not (folder / name).exists():
            raise UserError(f"{folder}: no saved model here ({name} is missing)")
    return read_json_file(folder / STRUCTURE_FILE)


def load_model(folder: str | Path) -> TransformerLM:
    """Load a model that `save_model` wrote, on the CPU, in the dtype it was saved in.

    Raises:
        UserError: a file is missing or broken, or the weights do not fit the structure or are not finite.
    """
    folder = Path(folder)
    weights = folder / WEIGHTS_FILE
    model = build_model(read_structure(folder), str(folder / STRUCTURE_FILE), read_header(weights))
    tensors = read_safetensors(weights)
    check_finite(tensors, str(weights))
    model.to(tensors["embed_in.weight"].dtype)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(shorten(f"{weights}: weights do not fit {STRUCTURE_FILE}: {error}")) from None
    return model
