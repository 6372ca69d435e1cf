"""The parallel memory adapter for a GPT-NeoX: adding it to a model, and saving and loading it in a small file.

At one or more layers, the output becomes Base(x) + α · Infini(LN x).

A `.safetensors` file holds the adapter's tensors with string metadata. A `.pt` file holds {"metadata": strings,
"tensors": tensors}, as written by `torch.save`, and is read with `weights_only=True`, so that no code in it is run. The
metadata are the same:

```
format            new-llm-parallel-adapter
format_version    1
base_name         EleutherAI/pythia-70m
base_fingerprint  sha256 of the base's weights
with_base         whether the file contains the base's weights, because they were trained too
segment_length    256
layers            {"0": {"initial_alpha": 0.0, "use_delta_rule": true, ...}}
program_version   0.1.0
created           2026-01-31T12:00:00+00:00
sha256            of all of this and the tensors
```
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from new_llm import __version__
from new_llm.config import PythiaConfig, UserError
from new_llm.config.files import shorten, write_atomically
from new_llm.config.model import Size, check_adapter_suffix
from new_llm.config.sections import section
from new_llm.models.hf.gpt_neox import copy_weights, load_pythia
from new_llm.models.layers import Layer, ParallelInfiniLayer, PythiaLayer
from new_llm.models.layers.base import initialize_weights
from new_llm.models.layers.infini import AdapterConfig, ParallelInfiniOptions
from new_llm.models.model_file import STRUCTURE_FILE, load_model
from new_llm.models.tensor_files import (
    DIGEST,
    check_digest,
    check_finite,
    find_misfit,
    fingerprint_tensors,
    format_record,
    hash_content,
    now,
    parse_record,
    read_header,
    read_safetensors,
    read_torch_file,
    write_safetensors,
)
from new_llm.models.transformer import TransformerLM


def create_pythia_with_parallel_infini(
    model_name: str | Path = "EleutherAI/pythia-70m",
    *,
    segment_length: int | None = None,
    revision: str | None = None,
    **options: Any,
) -> TransformerLM:
    """Load a pretrained GPT-NeoX and add a memory branch to some layers.

    The branch starts with the weights of the base layer's attention, or with `init="random"` with weights drawn from
    torch's global generator. The memory is used like that of any other model; `get_alpha()` returns α.

    Args:
        model_name: a GPT-NeoX's hub name or directory, or a folder written by `save_model`.
        segment_length: number of tokens in a segment; None: the base's.
        revision: branch, tag or commit of a hub repository.
        options: fields of `AdapterConfig`: `layers`, `use_delta_rule`, `use_alibi`, `initial_alpha` (with 0, the
            default, the model starts out bit-identical to its base), `freeze_base_model`, and others.

    Raises:
        ValueError: an option is unknown, a value is out of range, or the base has no such layer.
        UserError: the base can't be found or read (a subclass of ValueError).
    """
    config = AdapterConfig(**options)
    model = load_base(model_name, revision=revision, segment_length=segment_length)
    return add_parallel_infini(model, config, base_name=str(model_name))


def load_base(name: str | Path, *, revision: str | None = None, segment_length: int | None = None) -> TransformerLM:
    """Load a GPT-NeoX by hub name or directory, or a folder of `save_model`; on the CPU, at least in float32.

    Pythia is published in float16, but training in 16 bits loses small updates. The weights are therefore widened, also
    when the model is only used, so that an adapter gets the same base as in training.
    """
    folder = Path(name).expanduser()
    if (folder / STRUCTURE_FILE).is_file():
        model = load_model(folder)
        if segment_length is not None and segment_length < 1:
            raise UserError(f"segment_length: {segment_length} is not positive")
        model.segment_length = segment_length or model.segment_length
    else:
        model = load_pythia(name, revision, segment_length=segment_length)
    return model.to(torch.promote_types(model.embed_in.weight.dtype, torch.float32))


def save_adapter(model: TransformerLM, path: str | Path, *, with_base: bool = False) -> None:
    """Write the adapter's weights and settings, and its base's fingerprint, atomically to a .safetensors or .pt file.

    `with_base` also writes the base's weights, for the case that they were trained, too.
    """
    layers = find_adapters(model)
    if not layers:
        raise UserError("this model has no parallel adapter, so there is nothing to save")
    base, adapter = split_weights(model)
    record = AdapterRecord(
        base_name=next(iter(layers.values())).base_name,
        base_fingerprint=fingerprint_tensors(base),
        with_base=with_base,
        segment_length=model.segment_length,
        layers={index: ParallelInfiniOptions(**choose_options(layer.settings)) for index, layer in layers.items()},
        created=now(),
    )
    path, weights = Path(path), model.state_dict() if with_base else adapter
    check_adapter_suffix(path, "the adapter's file")
    metadata = format_record(record, FORMAT, FORMAT_VERSION)
    if path.suffix == ".safetensors":
        write_safetensors(path, weights, metadata)
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    metadata[DIGEST] = hash_content(metadata, tensors)
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        torch.save({"metadata": metadata, "tensors": tensors}, file)


def load_adapted_model(path: str | Path, base: str | Path | None = None, *, force: bool = False) -> TransformerLM:
    """Load an adapter file with its base (None: the one that the file names), on the CPU; see `attach_adapter`."""
    model = load_base(read_base_name(path) if base is None else base)
    return attach_adapter(model, path, force=force)


def read_base_name(path: str | Path) -> str:
    """The hub name or directory of the base that an adapter was trained on."""
    record, _ = read_adapter_file(Path(path))
    if record.base_name is None:
        raise UserError(f"{path}: does not say which base it belongs to; specify one")
    return record.base_name


def attach_adapter(model: TransformerLM, path: str | Path, *, force: bool = False) -> TransformerLM:
    """Add a saved adapter to its base, or load its weights into a model that already has the same adapter.

    The model is changed in place and returned. It gets the segment length that the adapter was trained with, and its
    held memory is emptied. `force` accepts another base of the same shape. Raises UserError if the file is broken or
    does not fit; the model is then unchanged.
    """
    (record, tensors), where = read_adapter_file(Path(path)), str(path)
    base, present = split_weights(model)[0], find_adapters(model)
    settings = {index: dataclasses.asdict(options) for index, options in record.layers.items()}
    if present and {index: choose_options(layer.settings) for index, layer in present.items()} != settings:
        raise UserError(f"{where}: the model has another parallel adapter, at layers {sorted(present)}")
    try:
        with torch.device("meta"):  # shapes only: a file may ask for more than fits in memory
            planned = {i: make_adapted_layer(model, i, settings[i], record.base_name, is_plan=True) for i in settings}
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise UserError(shorten(f"{where}: does not fit this base: {error}")) from None
    shapes = {
        f"layers.{index}.{name}": value.shape
        for index, layer in planned.items()
        for name, value in layer.state_dict().items()
        if record.with_base or not name.startswith("base_layer.")
    }
    if record.with_base:
        adapted = tuple(f"layers.{index}." for index in settings)
        shapes |= {name: value.shape for name, value in base.items() if not name.startswith(adapted)}
    if misfit := find_misfit(tensors, shapes):
        raise UserError(shorten(f"{where}: does not fit this base: {misfit}"))
    if not record.with_base and not force and record.base_fingerprint != (own := fingerprint_tensors(base)):
        raise UserError(
            f"{where}: trained on another base ({record.base_name}, fingerprint {record.base_fingerprint[:12]}…) than "
            f"this one ({own[:12]}…); force=True loads it anyway"
        )
    if not present:
        made = {i: make_adapted_layer(model, i, settings[i], record.base_name) for i in sorted(settings)}
        replace_layers(model, made)
    model.load_state_dict(tensors, strict=False)
    model.segment_length = record.segment_length
    model.reset_memory()
    return model


# Adding memory branches to layers


BASE = ".base_layer."
"""Part of a base layer's weight names, in place of a dot in the base's own names."""


def choose_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Select the fields of `ParallelInfiniOptions` from a layer's settings."""
    return {name: settings[name] for name in ParallelInfiniOptions.__dataclass_fields__}


def add_parallel_infini(model: TransformerLM, config: AdapterConfig, *, base_name: str | None = None) -> TransformerLM:
    """Add a new memory branch to some Pythia layers of a model, in place; the held memory is emptied.

    `base_name`, the base's hub name or directory, is only recorded.

    Raises:
        ValueError: a layer does not exist or is not a Pythia layer, options do not fit its width, or the model already
            has an adapter.
    """
    if present := find_adapters(model):
        raise UserError(f"the model already has a parallel adapter, at layers {sorted(present)}")
    options = choose_options(vars(config))
    made = {index: make_adapted_layer(model, index, options, base_name) for index in sorted(config.layers)}
    for layer in made.values():
        initialize_weights(layer.attention, PythiaConfig.initializer_range)
        if config.init == "base":  # queries then match keys from the start, and the output projection fits the values
            copy_weights(layer.base_layer, layer)
        if config.zero_init_dense:
            nn.init.zeros_(layer.attention.dense.weight)
            nn.init.zeros_(layer.attention.dense.bias)
    replace_layers(model, made)
    if config.freeze_base_model:
        model.requires_grad_(False)
        for layer in made.values():
            layer.requires_grad_(True).base_layer.requires_grad_(False)
    return model


def find_adapters(model: TransformerLM) -> dict[int, ParallelInfiniLayer]:
    """The adapted layers, by index."""
    return {index: layer for index, layer in enumerate(model.layers) if isinstance(layer, ParallelInfiniLayer)}


def split_weights(model: TransformerLM) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The base's weights, under their names in the base, and the adapter's weights."""
    prefixes = tuple(f"layers.{index}." for index in find_adapters(model))
    weights = model.state_dict()
    adapter = {name: value for name, value in weights.items() if name.startswith(prefixes) and BASE not in name}
    return {name.replace(BASE, "."): weights[name] for name in weights if name not in adapter}, adapter


def make_adapted_layer(
    model: TransformerLM, index: int, options: dict[str, Any], base_name: str | None, *, is_plan: bool = False
) -> ParallelInfiniLayer:
    """The layer that replaces a Pythia layer and contains it.

    With `is_plan`, only the new layer's shapes matter, and its base layer is not the model's.

    Raises:
        UserError: the model has no such layer, or it is not a Pythia layer.
        ValueError: options do not fit the model's width.
    """
    if not 0 <= index < len(model.layers):
        raise UserError(f"adapter.layers: {index}: the base has layers 0 to {len(model.layers) - 1}")
    base: Layer = model.layer_list[index]
    if isinstance(base, ParallelInfiniLayer):
        base = base.base_layer
    if not isinstance(base, PythiaLayer):
        raise UserError(f"adapter.layers: layer {index} is {base.kind}; only a pythia layer can get a memory branch")
    layer = ParallelInfiniLayer(**base.settings, **options, base_name=base_name)
    if not is_plan:
        like = base.input_layernorm.weight
        layer.to(like.device, like.dtype)
        layer.base_layer = base
        layer.train(model.training)
    return layer


def replace_layers(model: TransformerLM, layers: dict[int, ParallelInfiniLayer]) -> None:
    """Replace layers of a model; its held memory is emptied."""
    for index, layer in layers.items():
        model.layers[index] = layer
    model.reset_memory()


# The file


FORMAT = "new-llm-parallel-adapter"
FORMAT_VERSION = 1
ShortText = Annotated[str, Field(max_length=1000)]


@section
class AdapterRecord:
    """An adapter file's metadata."""

    base_name: ShortText | None
    """Hub name or directory of the base; None: unknown."""
    base_fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """SHA-256 of the base's weights."""
    with_base: bool
    """Whether the file also contains the base's weights."""
    segment_length: Size
    """Number of tokens in a segment of the saved model."""
    layers: Annotated[dict[Annotated[int, Field(ge=0)], ParallelInfiniOptions], Field(min_length=1)]
    """The settings of each memory branch, by layer index."""
    program_version: ShortText = __version__
    """Version of the program that wrote the file."""
    created: ShortText = ""
    """Time of writing, UTC, ISO 8601."""


def read_adapter_file(path: Path) -> tuple[AdapterRecord, dict[str, Tensor]]:
    """An adapter file's metadata, and its tensors by their names in the state dict. Raises UserError if broken."""
    where = str(path)
    check_adapter_suffix(path, "the adapter's file")
    metadata: Any
    tensors: Any
    if path.suffix == ".safetensors":
        metadata, tensors = read_header(path).metadata, read_safetensors(path)
    else:
        content = read_torch_file(path)
        content = content if isinstance(content, dict) else {}
        metadata, tensors = content.get("metadata"), content.get("tensors")
    record = parse_record(metadata, AdapterRecord, FORMAT, FORMAT_VERSION, where)
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{where}: broken adapter file: it holds no tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise UserError(shorten(f"{where}: broken adapter file: {name!r} is not a tensor of floats"))
    check_finite(tensors, where)
    check_digest(metadata, tensors, where)
    return record, tensors
