"""Bytes and parameters of the memory layers."""

import pytest
import torch
from torch import Tensor

from new_llm.models import TransformerLM
from new_llm.models.layers import HierarchicalLayer, InfiniLayer, MultiMemoryLayer, TokenMemoryLayer


@pytest.mark.parametrize(
    ("layer", "num_bytes"),
    [
        (InfiniLayer(512, 8, 64, num_memory_heads=8), 133_120),
        (InfiniLayer(512, 8, 64), 1_050_624),
        (MultiMemoryLayer(512, 8, 64), 532_480),
        (HierarchicalLayer(512, 8, 64, num_memories=4), 532_480),
        (InfiniLayer(512, 8, 64, num_memory_heads=8, num_memory_banks=2), 2 * 133_120),
        (TokenMemoryLayer(512), 4 * 256 * 513 * 4),
        (TokenMemoryLayer(512, num_memory_heads=3, memory_key_size=512), 3 * 1_050_624),
    ],
)
def test_memory_bytes(layer: torch.nn.Module, num_bytes: int) -> None:
    model = TransformerLM([layer], vocab_size=8)
    assert model.memory_info()["total_bytes"] == num_bytes
    assert model.memory_info()["per_layer"] == [{"layer": 0, "kind": layer.kind, "bytes": num_bytes}]
    entry = model.get_memory_state()[0]
    held = [value for value in entry.values() if isinstance(value, Tensor) and value.is_floating_point()]
    assert sum(value.numel() * value.element_size() for value in held) == num_bytes
