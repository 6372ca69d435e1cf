"""How the queries and keys of a memory layer begin."""

from typing import Any

import pytest
import torch

from model_cases import LAYER_TYPES
from new_llm.models.initialization import initialize_weights
from new_llm.models.layers import MemoryLayer

by_kind = pytest.mark.parametrize("kind", ["infini", "parallel_infini"])


def draw(kind: str, **options: Any) -> dict[str, torch.Tensor]:
    """q, k and v parts of a layer's projection, weights [3, H, K, D] and biases [3, H, K]."""
    torch.manual_seed(0)
    layer = LAYER_TYPES[kind](32, 4, 48, num_memory_heads=4, **options)
    assert isinstance(layer, MemoryLayer)
    initialize_weights(layer, 0.02)
    linear = layer.attention.query_key_value
    return {
        "weight": linear.weight.detach().view(4, 3, 8, 32).transpose(0, 1),
        "bias": linear.bias.detach().view(4, 3, 8).transpose(0, 1),
    }


@by_kind
def test_queries_and_keys_are_scaled_and_values_are_not(kind: str) -> None:
    plain, scaled = draw(kind), draw(kind, query_key_init_scale=6.0, query_key_init_bias=-3.0)
    assert torch.equal(scaled["weight"][:2], 6 * plain["weight"][:2])
    assert torch.equal(scaled["weight"][2], plain["weight"][2])
    assert torch.equal(scaled["bias"][:2], torch.full_like(plain["bias"][:2], -3.0))
    assert not scaled["bias"][2].any()


@by_kind
def test_matched_keys_begin_as_the_queries(kind: str) -> None:
    plain, matched = draw(kind), draw(kind, match_query_key_init=True)
    assert not torch.equal(plain["weight"][0], plain["weight"][1])
    assert torch.equal(matched["weight"][0], matched["weight"][1])
    assert torch.equal(matched["weight"][::2], plain["weight"][::2])
