"""Swapping a Pythia layer for another kind, which takes over what fits."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from new_llm.config import PythiaConfig
from new_llm.models.initialization import initialize_weights
from new_llm.models.layers import LAYER_KINDS, Layer, PythiaLayer
from new_llm.models.transformer import check_order

LayerChoice = str | Mapping[str, Any] | Layer
"""A kind ("infini"), a kind with options ({"kind": "infini", "num_memory_heads": 8}), or a layer."""
FUSED = "attention.query_key_value."
BASE = "base_layer."


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

    Args:
        old: the layer that is replaced.
        new: its successor, in whose place the weights are written.
        initializer_range: standard deviation of what is drawn.
    """
    reference = next(old.parameters())
    initialize_weights(new, initializer_range)
    new.to(reference.device, reference.dtype)
    theirs, heads = old.state_dict(), tuple(count_heads(layer.get_submodule("attention")) for layer in (old, new))
    for name, mine in new.state_dict().items():
        if name.startswith(BASE):  # a layer that keeps the old one whole, and adds to it
            mine.copy_(theirs[name.removeprefix(BASE)])
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
