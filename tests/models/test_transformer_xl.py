"""Transformer-XL's layers: Pythia without memory, and with memory for the whole text."""

from typing import Any

import pytest
import torch

from model_cases import HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_HEADS, VOCAB_SIZE, assert_near, randomize, text_ids
from new_llm import TransformerLM, create_model
from new_llm.config import PythiaConfig

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
