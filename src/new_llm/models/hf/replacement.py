"""Layers of a pretrained model: swapped for another kind, which takes over what fits, or given a memory beside them."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from new_llm.config import PythiaConfig, UserError
from new_llm.models.layers import LAYER_KINDS, Layer, ParallelInfiniLayer, PythiaLayer
from new_llm.models.layers.base import initialize_weights
from new_llm.models.layers.parallel_infini import AdapterConfig, ParallelInfiniOptions
from new_llm.models.transformer import TransformerLM, check_order

LayerChoice = str | Mapping[str, Any] | Layer
"""A kind ("infini"), a kind with options ({"kind": "infini", "num_memory_heads": 8}), or a layer."""
FUSED = "attention.query_key_value."


def swap_layers(layers: list[Layer], choices: Mapping[int, LayerChoice], config: PythiaConfig) -> list[Layer]:
    """The layers with some of them replaced by other kinds; see `take_over_weights`.

    Raises:
        ValueError: no layer of that index, an unknown kind or option, a layer of another hidden size,
            or one that can only be the last in another place.
    """
    for index in choices:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(layers):
            raise ValueError(f"replace_layers: no layer {index!r}; the model has 0 to {len(layers) - 1}")
    chosen = {index: make_layer(choice, config, index) for index, choice in choices.items()}
    check_order([chosen.get(index, layer) for index, layer in enumerate(layers)])
    return [
        take_over_weights(layer, chosen[index], config.initializer_range) if index in chosen else layer
        for index, layer in enumerate(layers)
    ]


def make_layer(choice: LayerChoice, config: PythiaConfig, index: int) -> Layer:
    """The layer that is chosen; its size, heads, MLP and ε are the checkpoint's unless the choice says otherwise."""
    where = f"replace_layers, layer {index}"
    if isinstance(choice, Layer):
        if choice.hidden_size != config.hidden_size:
            raise ValueError(f"{where}: hidden size {choice.hidden_size}, the checkpoint's is {config.hidden_size}")
        return choice
    options = {"kind": choice} if isinstance(choice, str) else dict(choice)
    kind = options.pop("kind", None)
    if kind not in LAYER_KINDS:
        raise ValueError(f"{where}: unknown kind {kind!r}; allowed are {', '.join(LAYER_KINDS)}")
    shape = {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "rotary_pct": config.rotary_pct,
        "rotary_emb_base": config.rotary_emb_base,
        "layer_norm_eps": config.layer_norm_eps,
    }
    known = inspect.signature(LAYER_KINDS[kind]).parameters
    try:
        return LAYER_KINDS[kind](**({name: value for name, value in shape.items() if name in known} | options))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


@torch.no_grad()
def take_over_weights(old: PythiaLayer | Layer, new: Layer, initializer_range: float) -> Layer:
    """Give a layer the weights of the one whose place it takes, wherever name and shape agree; the rest is drawn anew.

    Both LayerNorms, the MLP and the output projection keep their numbers. The fused projection holds q, k, v of a head
    side by side, head by head; where the new layer has other heads its rows are put in order, so that every output
    that was part of q (of k, of v) still is, at the same place among all heads together.
    """
    reference = next(old.parameters())
    initialize_weights(new, initializer_range)
    new.to(reference.device, reference.dtype)
    theirs, heads = old.state_dict(), tuple(count_heads(layer.get_submodule("attention")) for layer in (old, new))
    for name, mine in new.state_dict().items():
        if name.startswith("base_layer."):  # a layer that keeps the old one whole, and adds to it
            mine.copy_(theirs[name.removeprefix("base_layer.")])
            continue
        value = theirs.get(name)
        if value is None or value.shape != mine.shape:
            continue
        if name.startswith(FUSED):
            if heads[0] is None or heads[1] is None:
                continue  # nothing is known of how the new layer splits it
            value = split_heads_anew(value, heads[0], heads[1])
        mine.copy_(value)
    return new


def count_heads(attention: nn.Module) -> int | None:
    """Heads whose q, k, v a fused projection holds; None where the attention does not name them."""
    heads = getattr(attention, "num_memory_heads", getattr(attention, "num_heads", None))
    return heads if isinstance(heads, int) else None


def split_heads_anew(fused: Tensor, old_heads: int, new_heads: int) -> Tensor:
    """Rows [heads · (q, k, v) · K, ...] of a fused projection, put in order for another number of heads."""
    if old_heads == new_heads:
        return fused
    rest = fused.shape[1:]
    whole = fused.unflatten(0, (old_heads, 3, -1)).transpose(0, 1).reshape(3, -1, *rest)  # all of q, of k, of v
    return whole.unflatten(1, (new_heads, -1)).transpose(0, 1).reshape(-1, *rest)


# Memories beside layers


LAYER_OPTIONS = tuple(ParallelInfiniOptions.__dataclass_fields__)
BASE = ".base_layer."
"""What stands in the name of a base layer's weight, where the base has a dot."""


def add_parallel_infini(model: TransformerLM, config: AdapterConfig, *, base_name: str | None = None) -> TransformerLM:
    """Put a new memory beside some Pythia layers of a model, in place; what the model holds in memory is emptied.

    `base_name` is the base's name or directory, for the record.

    Raises:
        ValueError: a layer that the model lacks or that is no Pythia layer, options that do not fit its width, or a
            model that has an adapter.
    """
    if present := find_adapters(model):
        raise UserError(f"the model has a parallel adapter already, at layers {sorted(present)}")
    options = {name: getattr(config, name) for name in LAYER_OPTIONS}
    made = {index: make_adapted_layer(model, index, options, base_name) for index in sorted(config.layers)}
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


def make_adapted_layer(
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
