"""What models cost: the numbers that a stream keeps, and the operations of a token."""

import pytest
import torch

from new_llm import create_model
from new_llm.config import PythiaConfig
from new_llm.models.cost import count_flops, count_state

L, D, H, S, Z = 2, 32, 2, 8, 64
SHAPE = PythiaConfig(vocab_size=Z, hidden_size=D, num_hidden_layers=L, num_attention_heads=H, intermediate_size=48)
K = D // H
MEMORY = H * K * (K + 1)  # M and z
OPEN = H * K * (2 * K + 1) + D  # both sums of products, that of keys, the last key


@pytest.mark.parametrize(
    ("kind", "options", "length", "expected"),
    [
        ("pythia", {}, 32, L * 2 * D * 32),
        ("pythia_segments", {}, S, L * 2 * D * S),
        ("selective", {"skip_interval": 2}, S, 3 * L * 2 * D * S),
        ("transformer_xl", {"memory_tokens": 12}, S, L * 2 * D * (12 + S)),
        ("infini", {"num_memory_heads": H}, S, 2 * D * S + MEMORY + OPEN),
        ("multi_memory", {"num_memories": 3}, S, 2 * D * S + 3 * MEMORY + OPEN),
        ("rmt", {"num_memory_tokens": 3}, S, 3 * D + D * S),
    ],
)
def test_the_state_is_what_a_stream_keeps(kind: str, options: dict, length: int, expected: int) -> None:
    model = create_model(kind, SHAPE, segment_length=length, **options)
    assert count_state(model) == expected
    assert model.memory_rows is None


def test_operations_are_those_of_the_products() -> None:
    model = create_model("pythia_segments", SHAPE, segment_length=S).eval()
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    attention = L * 2 * 2 * D * S  # q kᵀ and its product with v, of S tokens each
    assert count_flops(model, 4 * S) == 2 * weights + attention
