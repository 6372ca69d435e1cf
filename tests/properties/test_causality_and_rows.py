"""What one position or row can learn of another, for every layer kind and option combination."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import STACKS, VOCAB_SIZE, get_model, text_ids
from torch import Tensor

from new_llm.models import TransformerLM

by_stack = pytest.mark.parametrize("name", STACKS)
few = settings(deadline=None, max_examples=10)
segment_lengths = st.sampled_from((3, 4, 7))
call_lengths = st.integers(2, 17)
dtypes = st.sampled_from((torch.float32, torch.float64))


def reset(model: TransformerLM, shared: bool, rows: int) -> None:
    model.reset_memory(None if shared else rows)


def change(ids: Tensor, row: int, column: int) -> Tensor:
    changed = ids.clone()
    changed[row, column] = (changed[row, column] + 1) % VOCAB_SIZE
    return changed


def gradient_of_embeddings(model: TransformerLM, ids: Tensor, row: int, column: int, **options: bool) -> Tensor:
    """How the logits at one place depend on each token's embedding: [B, T], the gradient's norm."""
    embedded: list[Tensor] = []
    handle = model.embed_in.register_forward_hook(lambda _, __, output: embedded.append(output))
    try:
        logits = model(ids, **options)
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(logits[row, column].square().sum(), embedded)
    return gradient.norm(dim=-1)[:, : ids.shape[1]]


@by_stack
@few
@given(segment_lengths, call_lengths, st.booleans(), st.booleans(), dtypes, st.data())
def test_a_token_changes_no_earlier_logit_and_no_other_row(
    name: str,
    segment_length: int,
    length: int,
    shared: bool,
    update: bool,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    column = data.draw(st.integers(0, length - 1), label="changed column")
    model = get_model(name, segment_length=segment_length, dtype=dtype)
    with torch.no_grad():
        reset(model, shared, 2)
        ids = text_ids(2, length)
        model(text_ids(2, 2 * segment_length, start=40), update_memory=True)
        held = model.get_memory_state()
        before = model(ids, update_memory=update)
        model.set_memory_state(held)
        after = model(change(ids, 1, column), update_memory=update)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1, :column], after[1, :column])
    assert not torch.allclose(before[1, column], after[1, column])
    inside = slice(column, (column // segment_length + 1) * segment_length)
    assert not torch.isclose(before[1, inside], after[1, inside]).all(-1).any()


@by_stack
def test_gradients_reach_earlier_segments_of_the_same_row_alone(name: str) -> None:
    """A memory layer's logits depend on every earlier token; a plain Pythia's on those of the segment."""
    model = get_model(name, segment_length=4)
    reset(model, False, 3)
    ids = text_ids(3, 11)
    for update in (False, True):
        norms = gradient_of_embeddings(model, ids, 1, 9, update_memory=update)
        assert not norms[[0, 2]].any()
        assert not norms[1, 10:].any()
        assert bool((norms[1, 8:10] > 0).all())
        assert bool((norms[1, :8] > 0).all()) == (name != "pythia")
        assert name != "pythia" or not norms[1, :8].any()


@pytest.mark.parametrize("name", ["mixed", "pythia-first"])
def test_a_later_row_does_not_read_what_an_earlier_row_wrote_in_the_call(name: str) -> None:
    """With one shared memory, rows still see it as it was before the call, not one another."""
    model = get_model(name, segment_length=4)
    ids = text_ids(3, 12)
    with torch.no_grad():
        together = model(ids, update_memory=True)
        for row in range(3):
            model.reset_memory()
            torch.testing.assert_close(model(ids[row : row + 1]), together[row : row + 1], atol=1e-12, rtol=1e-12)
