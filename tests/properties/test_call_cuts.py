"""One call of n segments equals n calls with the memory carried."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import (
    DTYPES,
    STACKS,
    TOLERANCES,
    assert_near,
    assert_states_near,
    get_model,
    text_ids,
)

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_stack = pytest.mark.parametrize("name", STACKS)


@by_dtype
@by_stack
@settings(deadline=None, max_examples=8)
@given(st.sampled_from((3, 4, 7)), st.integers(1, 30), st.sampled_from((None, 1, 2)), st.data())
def test_call_cuts_change_nothing(
    name: str, dtype: torch.dtype, segment_length: int, length: int, rows: int | None, data: st.DataObject
) -> None:
    """Cut at any ends of segments; the last piece may be odd. One shared memory, or one a row."""
    model = get_model(name, segment_length=segment_length, dtype=dtype)
    ids = text_ids(rows or 1, length)
    ends = list(range(segment_length, length, segment_length))
    cuts = [end for end in ends if data.draw(st.booleans())]
    with torch.no_grad():
        model.reset_memory(rows)
        whole = model(ids, update_memory=True)
        expected_state = model.get_memory_state()
        model.reset_memory(rows)
        pieces = [
            model(ids[:, begin:end], update_memory=True) for begin, end in zip([0, *cuts], [*cuts, length], strict=True)
        ]
    assert_near(torch.cat(pieces, dim=1), whole, TOLERANCES[dtype])
    assert_states_near(model.get_memory_state(), expected_state, TOLERANCES[dtype])


def test_one_segment_is_not_cut() -> None:
    """A call shorter than a segment, and one of exactly a segment, are the plain layer stack."""
    model = get_model("pythia", segment_length=9)
    ids = text_ids(1, 9)
    with torch.no_grad():
        assert_near(model(ids[:, :5]), model(ids)[:, :5], 1e-12)
        model.segment_length = 4
        assert_near(model(ids)[:, 4:8], model(ids[:, 4:8]), 1e-12)
        assert_near(model(ids)[:, 8:], model(ids[:, 8:]), 1e-12)
