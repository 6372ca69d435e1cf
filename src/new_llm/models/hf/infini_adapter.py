"""The parallel memory adapter on a GPT-NeoX: put there, saved and loaded alone.

Base layer's output + α · Infini(LN of the layer's input), at one layer or several.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from new_llm.config import UserError
from new_llm.config.files import shorten
from new_llm.models.hf.adapter_file import AdapterFile, AdapterRecord, read_adapter_file, write_adapter_file
from new_llm.models.hf.adapter_layers import (
    BASE,
    add_parallel_infini,
    describe_settings,
    find_adapters,
    make_layer,
    replace_layers,
    split_weights,
)
from new_llm.models.hf.convert import load_pythia
from new_llm.models.layers.parallel_infini import AdapterConfig
from new_llm.models.model_file import STRUCTURE_FILE, load_model
from new_llm.models.tensor_files import fingerprint_tensors
from new_llm.models.transformer import TransformerLM


def create_pythia_with_parallel_infini(
    model_name: str | Path = "EleutherAI/pythia-70m",
    *,
    use_delta_rule: bool = True,
    use_alibi: bool = False,
    initial_alpha: float = 0.0,
    freeze_base_model: bool = True,
    layers: Sequence[int] = (0,),
    segment_length: int | None = None,
    revision: str | None = None,
    **options: Any,
) -> TransformerLM:
    """A pretrained GPT-NeoX with a compressive memory beside some layers.

    The memory begins with the projections of the attention beside it, or (`init="random"`) with weights from torch's
    global generator. `get_alpha()` gives α (of several layers: a dictionary by layer index), and the memory is held,
    saved and carried as in every model of the family.

    Args:
        model_name: a GPT-NeoX: its name on the hub, its directory, or the folder of a model that `save` wrote.
        use_delta_rule: write only what the memory does not hold yet.
        use_alibi: decay the memory at each segment's write.
        initial_alpha: α at the start; with 0 the model equals its base bit for bit.
        freeze_base_model: the base's weights take no gradient, so that training leaves them as they are.
        layers: the layers that get a memory beside them, by index.
        segment_length: tokens in a segment; None: the base's own.
        revision: branch, tag or commit of a name on the hub.
        options: further fields of `AdapterConfig`: init, zero_init_dense, num_memory_heads, num_memory_banks,
            segments_per_bank, alibi_scale, gate_init.

    Raises:
        ValueError: an unknown option, a value out of range, or a layer that the base lacks.
        UserError: the base can't be found or read (also a ValueError).
    """
    config = AdapterConfig(
        layers=tuple(layers),
        use_delta_rule=use_delta_rule,
        use_alibi=use_alibi,
        initial_alpha=initial_alpha,
        freeze_base_model=freeze_base_model,
        **options,
    )
    model = load_base(model_name, revision=revision, segment_length=segment_length)
    return add_parallel_infini(model, config, base_name=str(model_name))


def load_base(name: str | Path, *, revision: str | None = None, segment_length: int | None = None) -> TransformerLM:
    """A GPT-NeoX by hub name or directory, or a model folder of this project; on the CPU, in float32 at least.

    Pythia is published in float16, and training in 16 bits loses small updates: such weights are widened, for training
    and for use alike, so that an adapter meets the base it was trained on.

    Raises:
        UserError: there is none, or it can't be read.
    """
    folder = Path(name).expanduser()
    if (folder / STRUCTURE_FILE).is_file():
        model = load_model(folder)
        model.segment_length = segment_length or model.segment_length
    else:
        model = load_pythia(name, revision, segment_length=segment_length)
    return model.to(torch.promote_types(model.embed_in.weight.dtype, torch.float32))


def save_adapter(model: TransformerLM, path: str | Path, *, with_base: bool = False) -> None:
    """Write the adapter's weights and settings, and what base they belong to; whole, or what was there before.

    Args:
        model: an adapted model.
        path: the file: .safetensors, or .pt (plain tensors, as torch.save writes them).
        with_base: write the base's weights too, where they were trained.

    Raises:
        UserError: the model has no adapter, or the file can't be written.
    """
    layers = find_adapters(model)
    if not layers:
        raise UserError("this model has no parallel adapter: there is nothing to save")
    base, adapter = split_weights(model)
    record = AdapterRecord(
        base_name=next(iter(layers.values())).base_name,
        base_fingerprint=fingerprint_tensors(base),
        with_base=with_base,
        segment_length=model.segment_length,
        layers={index: describe_settings(layer) for index, layer in layers.items()},
    )
    write_adapter_file(Path(path), AdapterFile(record, model.state_dict() if with_base else adapter))


def load_adapted_model(path: str | Path, base: str | Path | None = None, *, force: bool = False) -> TransformerLM:
    """The adapted model of a file, on the CPU; see `attach_adapter`.

    Args:
        path: what `save_adapter` wrote.
        base: hub name or directory of the base; None: the one that the file names.
        force: take another base of the same shape than the adapter was trained on.

    Raises:
        UserError: the file is broken, or there is no such base, or it is not the adapter's.
    """
    model = load_base(read_base_name(path) if base is None else base)
    return attach_adapter(model, path, force=force)


def read_base_name(path: str | Path) -> str:
    """The hub name or directory of the base that an adapter was trained on.

    Raises:
        UserError: the file is broken, or does not say.
    """
    name = read_adapter_file(Path(path)).record.base_name
    if name is None:
        raise UserError(f"{path}: does not say which base it belongs to: name one")
    return name


def attach_adapter(model: TransformerLM, path: str | Path, *, force: bool = False) -> TransformerLM:
    """Put a saved adapter on its base, or its weights into a model with the same adapter; after an error nothing is.

    The model takes the segment length that the adapter was trained with, and its held memory is emptied.

    Args:
        model: the base, changed in place.
        path: what `save_adapter` wrote.
        force: take another base of the same shape than the adapter was trained on.

    Returns:
        The same model.

    Raises:
        UserError: the file is broken, or does not fit the model.
    """
    _attach(model, read_adapter_file(Path(path)), str(path), force)
    return model


def _attach(model: TransformerLM, content: AdapterFile, where: str, force: bool) -> None:
    record = content.record
    base = split_weights(model)[0]
    present = find_adapters(model)
    settings = {index: dataclasses.asdict(options) for index, options in record.layers.items()}
    if present and {i: dataclasses.asdict(describe_settings(layer)) for i, layer in present.items()} != settings:
        raise UserError(f"{where}: the model has another parallel adapter, at layers {sorted(present)}")
    try:
        with torch.device("meta"):  # shapes alone: what the file asks for need not fit in memory
            planned = {i: make_layer(model, i, settings[i], record.base_name, is_plan=True) for i in settings}
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise UserError(shorten(f"{where}: does not fit this base: {error}")) from None
    shapes = {
        f"layers.{index}.{name}": tuple(value.shape)
        for index, layer in planned.items()
        for name, value in layer.adapter_state().items()
    }
    if record.with_base:
        shapes |= {_name_in_adapted(name, settings): tuple(value.shape) for name, value in base.items()}
    _check_shapes(content.tensors, shapes, where)
    if not record.with_base and not force and record.base_fingerprint != (own := fingerprint_tensors(base)):
        raise UserError(
            f"{where}: trained on another base ({record.base_name}, fingerprint {record.base_fingerprint[:12]}…) than "
            f"this one ({own[:12]}…); force=True takes it all the same"
        )
    if not present:
        made = {i: make_layer(model, i, settings[i], record.base_name) for i in sorted(settings)}
        replace_layers(model, made)
    model.load_state_dict(content.tensors, strict=False)
    model.segment_length = record.segment_length
    model.reset_memory()


def _name_in_adapted(name: str, adapted: Iterable[int]) -> str:
    """The name that a base's weight has once the layers `adapted` have a memory beside them."""
    for index in adapted:
        if name.startswith(prefix := f"layers.{index}."):
            return f"layers.{index}{BASE}{name.removeprefix(prefix)}"
    return name


def _check_shapes(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], where: str) -> None:
    if set(tensors) != set(expected):
        odd = sorted(set(tensors) ^ set(expected))
        raise UserError(shorten(f"{where}: does not fit this base: missing or unknown tensors: {', '.join(odd)}"))
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            found = list(tensors[name].shape)
            raise UserError(shorten(f"{where}: does not fit this base: {name} has shape {found}, not {list(shape)}"))
