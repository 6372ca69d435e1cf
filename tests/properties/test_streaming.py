"""Reading in pieces of any size, with any masks, gives the logits and the memory of the parallel path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import (
    DTYPES,
    MIXED_STACKS,
    SHORT_STACKS,
    STACKS,
    STREAM_TOLERANCES,
    assert_near,
    assert_states_near,
    get_model,
    text_ids,
)
from torch import Tensor

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_stack = pytest.mark.parametrize("name", STACKS)
segment_lengths = st.sampled_from((3, 5, 8))


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


def draw_cuts(data: st.DataObject, length: int) -> list[tuple[int, int]]:
    ends = sorted(data.draw(st.sets(st.integers(1, length)), label="cuts") | {length})
    return list(zip([0, *ends[:-1]], ends, strict=True))


@by_dtype
@by_stack
@settings(deadline=None, max_examples=4)
@given(segment_lengths, st.integers(1, 24), st.sampled_from((None, 1, 2)), st.data())
def test_stream_equals_parallel(
    name: str, dtype: torch.dtype, segment_length: int, length: int, rows: int | None, data: st.DataObject
) -> None:
    """From a memory that is already filled; then the stream's last segment, perhaps open, is written."""
    tolerance = STREAM_TOLERANCES[dtype]
    model = get_model(name, segment_length=segment_length, dtype=dtype)
    ids = text_ids(rows or 2, length, start=30)
    with torch.no_grad():
        model.reset_memory(rows)
        model(text_ids(rows or 2, segment_length + 1), update_memory=True)
        held = model.get_memory_state()
        expected = model(ids, update_memory=True)
        expected_state = model.get_memory_state()
        model.set_memory_state(held)
        stream = model.open_stream(rows or 2)
        pieces = [stream.feed(ids[:, begin:end]) for begin, end in draw_cuts(data, length)]
        assert_states_near(model.get_memory_state(), held, 0)
        stream.close(update_memory=True)
    assert_near(torch.cat(pieces, dim=1), expected, tolerance)
    assert_states_near(model.get_memory_state(), expected_state, tolerance)
    assert stream.num_tokens.tolist() == [length] * (rows or 2)


@by_dtype
@pytest.mark.parametrize("name", [*SHORT_STACKS, "pythia"])
@settings(deadline=None, max_examples=12)
@given(segment_lengths, call_masks(), st.booleans(), st.data())
def test_masked_stream_equals_masked_call(
    name: str, dtype: torch.dtype, segment_length: int, mask: Tensor, shared: bool, data: st.DataObject
) -> None:
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
        pieces = [stream.feed(ids[:, a:b], mask[:, a:b]) for a, b in draw_cuts(data, length)]
        stream.close(update_memory=True)
    actual = torch.cat(pieces, dim=1)
    assert bool(actual.isfinite().all())
    assert_near(actual[mask], expected[mask], tolerance)
    assert_states_near(model.get_memory_state(), expected_state, tolerance)
    assert torch.equal(stream.num_tokens, mask.sum(1))


@by_dtype
@by_stack
@settings(deadline=None, max_examples=4)
@given(segment_lengths, call_masks(), st.booleans())
def test_padded_row_equals_the_row_without_padding(
    name: str, dtype: torch.dtype, segment_length: int, mask: Tensor, update: bool
) -> None:
    """In logits and in the memory that it leaves; a row of nothing leaves its memory as it was."""
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    rows, length = mask.shape
    model = get_model(name, segment_length=segment_length, dtype=dtype)
    ids = text_ids(rows, length)
    first = text_ids(rows, segment_length, start=60)
    with torch.no_grad():
        model.reset_memory(rows)
        model(first, update_memory=True)
        held = model.get_memory_state()
        together = model(ids, mask.long(), update_memory=update)
        state = model.get_memory_state()
        for row in range(rows):
            model.reset_memory(1)
            model(first[row : row + 1], update_memory=True)
            real = ids[row][mask[row]].unsqueeze(0)
            if real.numel():
                assert_near(together[row][mask[row]], model(real, update_memory=update)[0], tolerance)
            alone = model.get_memory_state()
            for index, entry in alone.items():
                assert_states_near({0: take_row(state[index], row)}, {0: take_row(entry, 0)}, tolerance)
                if not real.numel():
                    assert_states_near({0: take_row(state[index], row)}, {0: take_row(held[index], row)}, 0)


def take_row(entry: dict, row: int) -> dict:
    per_row = {key: value for key, value in entry.items() if isinstance(value, Tensor) and key != "frozen"}
    return {key: value[row] for key, value in per_row.items()}


@pytest.mark.parametrize("name", MIXED_STACKS)
def test_one_token_at_a_time(name: str) -> None:
    model = get_model(name, segment_length=5)
    ids = text_ids(2, 23)
    with torch.no_grad():
        model.reset_memory(2)
        stream = model.open_stream(2)
        actual = torch.cat([stream.feed(ids[:, t : t + 1]) for t in range(23)], dim=1)
        assert_near(actual, model(ids), 1e-9)


@pytest.mark.parametrize("name", MIXED_STACKS)
def test_stream_without_update_leaves_the_held_memory(name: str) -> None:
    model = get_model(name, segment_length=5)
    model(text_ids(1, 7), update_memory=True)
    held = model.get_memory_state()
    stream = model.open_stream()
    stream.feed(text_ids(1, 13))
    stream.close()
    assert_states_near(model.get_memory_state(), held, 0)
    with pytest.raises(ValueError, match="closed"):
        stream.feed(text_ids(1, 1))


def test_stream_refuses_other_rows() -> None:
    model = get_model("mixed")
    with pytest.raises(ValueError, match="batch_size: 0"):
        model.open_stream(0)
    with pytest.raises(ValueError, match="3 rows of tokens for a stream of 2"):
        model.open_stream(2).feed(text_ids(3, 2))
    model.reset_memory(2)
    with pytest.raises(ValueError, match="batch of 3 rows"):
        model.open_stream(3)


def test_a_stream_adds_what_it_read_to_a_memory_that_has_grown_meanwhile() -> None:
    """Rows' changes are summed into the shared memory: sums do not depend on which text was closed first."""
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


def test_a_stream_whose_rows_are_no_longer_held_leaves_the_memory_usable() -> None:
    model = get_model("mixed", segment_length=5)
    stream = model.open_stream(2)
    stream.feed(text_ids(2, 5))
    model.reset_memory(3)
    with pytest.raises(ValueError, match=r"2 rows|of 2|each of 3"):
        stream.close(update_memory=True)
    assert model(text_ids(3, 4)).shape[:2] == (3, 4)


@pytest.mark.parametrize("name", SHORT_STACKS)
def test_a_row_that_is_reset_in_a_stream_begins_anew_and_the_other_goes_on(name: str) -> None:
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
    for index in kept:
        assert_states_near({0: take_row(kept[index], 0)}, {0: take_row(fresh[index], 0)}, 1e-9)


def test_a_stream_with_reset_rows_is_not_added_to_a_shared_memory() -> None:
    model = get_model(next(iter(SHORT_STACKS)), segment_length=5)
    model.reset_memory()
    stream = model.open_stream(2)
    stream.feed(text_ids(2, 7))
    with pytest.raises(ValueError, match="shape"):
        stream.reset_rows(torch.tensor([True]))
    stream.reset_rows(torch.tensor([True, False]))
    with pytest.raises(ValueError, match="shared memory"):
        stream.close(update_memory=True)
