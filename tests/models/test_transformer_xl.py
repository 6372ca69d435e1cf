"""The layers of Transformer-XL and of the recurrent memory transformer against their equations."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model_cases import HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_HEADS, VOCAB_SIZE, assert_near, randomize, text_ids
from new_llm import TransformerLM, create_model
from new_llm.config import PythiaConfig
from new_llm.models.layers import RecurrentMemoryStack, Segments
from new_llm.models.layers.pythia import compute_rotary_angles
from new_llm.models.layers.transformer_xl import TransformerXLLayer

SHAPE = PythiaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=HIDDEN_SIZE,
    num_hidden_layers=2,
    num_attention_heads=NUM_HEADS,
    intermediate_size=INTERMEDIATE_SIZE,
    max_position_embeddings=64,
    rotary_pct=0.5,
)


def make(kind: str, segment_length: int, **options: Any) -> TransformerLM:
    model = create_model(kind, SHAPE, segment_length=segment_length, **options)
    randomize(model)
    return model


def attend(layer: TransformerXLLayer, x: Tensor, segment_length: int, memory_tokens: int) -> Tensor:
    """What attention adds to one row [T, D], before W_o: softmax over the segment and the C tokens before it."""
    half = layer.attention.rotary_dim // 2
    q, k, v = layer.attention.query_key_value(x).view(len(x), NUM_HEADS, 3, -1).unbind(2)

    def turn(heads: Tensor, places: Tensor) -> Tensor:
        angles = compute_rotary_angles(places, 2 * half, 1e4, torch.float64)
        cos, sin = (part[:, None, :half] for part in angles)
        first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)

    mixed = []
    for t in range(len(x)):
        start = t // segment_length * segment_length
        seen = torch.arange(max(0, start - memory_tokens), t + 1)
        query = turn(q[t : t + 1], torch.tensor([t - start]))
        scores = (query * turn(k[seen], seen - start)).sum(-1) / math.sqrt(q.shape[-1])
        mixed.append((scores.softmax(0).unsqueeze(-1) * v[seen]).sum(0).flatten())
    return torch.stack(mixed)


@pytest.mark.parametrize("memory_tokens", [3, 4, 9])
def test_attention_equals_its_equation(memory_tokens):
    """Four segments of 4 tokens in one call, then an odd piece of 3 that reads what they left."""
    layer = TransformerXLLayer(HIDDEN_SIZE, NUM_HEADS, 8, rotary_pct=0.5, memory_tokens=memory_tokens).double()
    randomize(layer)
    torch.nn.init.eye_(layer.attention.dense.weight)
    torch.nn.init.zeros_(layer.attention.dense.bias)
    x = torch.randn(2, 19, HIDDEN_SIZE, generator=torch.Generator().manual_seed(5)).double()
    with torch.no_grad():
        whole, memory = layer.attention(x[:, :16].unflatten(1, (4, 4)), None, Segments())
        last, _ = layer.attention(x[:, None, 16:], memory, Segments())
        expected = torch.stack([attend(layer, row, 4, memory_tokens) for row in x])
    assert_near(torch.cat((whole.flatten(1, 2), last[:, 0]), 1), expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_memory_it_is_pythia_bit_for_bit(dtype):
    ids = text_ids(2, 19)
    models = [make(kind, 5, **options).to(dtype) for kind, options in KINDS_WITHOUT_MEMORY]
    found = []
    for model in models:
        loss, _ = model.compute_loss(ids, ids, update_memory=True)
        loss.backward()
        stream = model.open_stream(2)
        streamed = torch.cat([stream.feed(piece) for piece in ids.split(3, dim=1)], dim=1)
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        found.append((model(ids), loss, gradients, streamed))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not models[1].memory_layers


KINDS_WITHOUT_MEMORY: list[tuple[str, dict[str, Any]]] = [("pythia", {}), ("transformer_xl", {"memory_tokens": 0})]


@pytest.mark.parametrize("detach_memory", [True, False])
def test_with_the_whole_text_it_is_pythia_that_reads_it_whole(detach_memory):
    ids = text_ids(2, 37)
    model = make("transformer_xl", 5, memory_tokens=40, detach_memory=detach_memory)
    whole = make("pythia", 64)
    with torch.no_grad():
        assert_near(model(ids), whole(ids), 1e-5)
        stream = model.open_stream(2)
        assert_near(torch.cat([stream.feed(piece) for piece in ids.split(1, dim=1)], dim=1), whole(ids), 1e-5)
    gradients = []
    for one in (model, whole):
        one.compute_loss(ids, ids)[0].backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in one.parameters()]))
    assert torch.allclose(*gradients, atol=1e-5) is not detach_memory


def test_rows_do_not_share_a_cache():
    """One row may write into the shared memory; the sum of several rows' keys would be no one's."""
    model, ids = make("transformer_xl", 5), text_ids(2, 19)
    model(ids[:1], update_memory=True)
    before = model.get_memory_state()
    with pytest.raises(ValueError, match=r"call reset_memory\(batch_size\) first"):
        model(ids, update_memory=True)
    assert torch.equal(model.get_memory_state()[0]["keys"], before[0]["keys"])


# The recurrent memory transformer against its equation, row by row and segment by segment


def read_row(stack: RecurrentMemoryStack, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """One row's tokens [T, D]: what comes out, and the memory after the last segment."""
    memory, outputs = stack.first_memory.weight, []
    for segment in x.split(length):
        whole = torch.cat((memory, segment, memory))[None, None]
        for layer in stack.layers:
            whole, _ = layer(whole)
        read, written = whole[0, 0][len(memory) : -len(memory)], whole[0, 0][-len(memory) :]
        memory = stack.memory_norm(written)
        outputs.append(read)
    return torch.cat(outputs), memory


@pytest.mark.parametrize("num_memory_tokens", [1, 3])
def test_the_stack_equals_its_equation(num_memory_tokens):
    """Row 0 has a short last segment; row 1 is whole."""
    stack = RecurrentMemoryStack(16, 2, 24, num_layers=2, num_memory_tokens=num_memory_tokens)
    randomize(stack)
    stack.double()
    x = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(0)).double()
    valid = torch.arange(4) < torch.tensor([[4, 4, 2], [4, 4, 4]]).unsqueeze(-1)
    with torch.no_grad():
        found, memory = stack(x, None, Segments(valid=valid))
        for row in range(2):
            expected, vectors = read_row(stack, x[row][valid[row]], 4)
            torch.testing.assert_close(found[row][valid[row]], expected, atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(memory.vectors[row], vectors, atol=1e-10, rtol=1e-10)
    assert memory.num_segments.tolist() == [3, 3]
