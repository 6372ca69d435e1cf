"""Layers with a memory beside them: made, put in the place of a model's layers, and told apart from their base."""

from typing import Any

import torch
from torch import Tensor, nn

from new_llm.config import PythiaConfig, UserError
from new_llm.models.hf.replacement import split_heads_anew
from new_llm.models.initialization import initialize_weights
from new_llm.models.layers import Layer, ParallelInfiniLayer, PythiaLayer
from new_llm.models.layers.parallel_infini import AdapterConfig, ParallelInfiniOptions
from new_llm.models.transformer import TransformerLM

LAYER_OPTIONS = tuple(ParallelInfiniOptions.__dataclass_fields__)
BASE = ".base_layer."
"""What stands in the name of a base layer's weight, where the base has a dot."""


def add_parallel_infini(model: TransformerLM, config: AdapterConfig, *, base_name: str | None = None) -> TransformerLM:
    """Put a new memory beside some Pythia layers of a model, in place; what the model holds in memory is emptied.

    Args:
        model: the base.
        config: where, and what memory.
        base_name: the base's name or directory, for the record.

    Returns:
        The same model.

    Raises:
        ValueError: a layer that the model lacks or that is no Pythia layer, options that do not fit its width, or a
            model that has an adapter.
    """
    if present := find_adapters(model):
        raise UserError(f"the model has a parallel adapter already, at layers {sorted(present)}")
    options = {name: getattr(config, name) for name in LAYER_OPTIONS}
    made = {index: make_layer(model, index, options, base_name) for index in sorted(config.layers)}
    for layer in made.values():
        initialize_weights(layer.attention, PythiaConfig.initializer_range)
        if config.init == "base":
            copy_base_attention(layer)
        if config.zero_init_dense:
            nn.init.zeros_(layer.attention.dense.weight)
            nn.init.zeros_(layer.attention.dense.bias)
    replace_layers(model, made)
    if config.freeze_base_model:
        freeze_base(model)
    return model


@torch.no_grad()
def copy_base_attention(layer: ParallelInfiniLayer) -> None:
    """Begin the memory with the LayerNorm and the projections of the softmax attention that it stands beside.

    Its queries and keys are then made to find one another, and the output projection reads such values.
    """
    heads = (layer.base_layer.num_heads, layer.attention.num_memory_heads)
    for name, value in layer.base_layer.state_dict().items():
        if name.startswith(("input_layernorm.", "attention.")):
            fused = "query_key_value" in name
            layer.get_parameter(name).copy_(split_heads_anew(value, *heads) if fused else value)


def freeze_base(model: TransformerLM) -> None:
    """Let the adapter's weights alone take gradients."""
    model.requires_grad_(False)
    for layer in find_adapters(model).values():
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not name.startswith(BASE[1:]))


def find_adapters(model: TransformerLM) -> dict[int, ParallelInfiniLayer]:
    """The adapted layers by their index."""
    return {index: layer for index, layer in enumerate(model.layers) if isinstance(layer, ParallelInfiniLayer)}


def split_weights(model: TransformerLM) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The base's weights under the names they have in the base, and the adapter's."""
    prefixes = tuple(f"layers.{index}." for index in find_adapters(model))
    base: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.startswith(prefixes) and BASE not in name:
            adapter[name] = value
        else:
            base[name.replace(BASE, ".")] = value
    return base, adapter


def make_layer(
    model: TransformerLM, index: int, options: dict[str, Any], base_name: str | None, *, is_plan: bool = False
) -> ParallelInfiniLayer:
    """The layer that takes a Pythia layer's place and holds it; a plan of it, for its shapes, holds none.

    Raises:
        UserError: the model has no such layer, or it is no Pythia layer.
        ValueError: options that do not fit the model's width.
    """
    if not 0 <= index < len(model.layers):
        raise UserError(f"adapter.layers: {index}: the base has layers 0 to {len(model.layers) - 1}")
    base: Layer = model.layer_list[index]
    if isinstance(base, ParallelInfiniLayer):
        base = base.base_layer
    if not isinstance(base, PythiaLayer):
        raise UserError(f"adapter.layers: layer {index} is {base.kind}; a memory can stand beside a pythia layer")
    layer = ParallelInfiniLayer(**base.settings, **options, base_name=base_name)
    if not is_plan:
        like = base.input_layernorm.weight
        layer.to(like.device, like.dtype)
        layer.base_layer = base
        layer.train(model.training)
    return layer


def replace_layers(model: TransformerLM, layers: dict[int, ParallelInfiniLayer]) -> None:
    """Put layers in the places of a model's; what it holds in memory is emptied."""
    for index, layer in layers.items():
        model.layers[index] = layer
    model.reset_memory()


def describe_settings(layer: ParallelInfiniLayer) -> ParallelInfiniOptions:
    """The settings of a layer's memory."""
    return ParallelInfiniOptions(**{name: layer.settings[name] for name in LAYER_OPTIONS})
