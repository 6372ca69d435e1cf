"""The memory that a model holds: shared or per row, reset, restored, and left alone when a call fails."""

import pytest
import torch
from torch import Tensor

from model_cases import (
    MEMORY_STACKS,
    MIXED_STACKS,
    LayerCase,
    assert_near,
    assert_states_equal,
    build_model,
    get_model,
    text_ids,
)
from new_llm.models import TransformerLM

UNDECAYED_STACKS = [  # whose memories add up number by number; blocks of a tree also move
    name
    for name, cases in MEMORY_STACKS.items()
    if not any(
        any(case.options.get(option) for option in ("use_alibi", "use_token_decay"))
        or case.kind == "token_memory"
        or case.options.get("hierarchy") == "fenwick"
        for case in cases
    )
]
by_mixture = pytest.mark.parametrize("name", MIXED_STACKS)


def fill(model: TransformerLM, rows: int | None = None, start: int = 0) -> dict:
    """An empty memory, filled by a call of two segments and a bit; its state."""
    model.reset_memory(rows)
    with torch.no_grad():
        model(text_ids(rows or 2, 2 * model.segment_length + 2, start), update_memory=True)
    return model.get_memory_state()


def test_a_state_is_a_copy():
    """Neither later calls nor writes to the given tensors reach through it."""
    model = get_model("mixed")
    state = fill(model)
    kept = model.get_memory_state()
    model(text_ids(2, 9), update_memory=True)
    assert_states_equal(state, kept)
    model.set_memory_state(state)
    for entry in state.values():
        for value in entry.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                value.fill_(7.0)
    assert_states_equal(model.get_memory_state(), kept)


def test_a_failed_call_changes_nothing():
    model = get_model("mixed")
    before = fill(model, 2)
    for bad in (text_ids(3, 4), text_ids(2, 4) + 128):
        with pytest.raises(ValueError, match=r"rows|ids"):
            model(bad, update_memory=True)
    assert_states_equal(model.get_memory_state(), before)


@pytest.mark.parametrize("name", UNDECAYED_STACKS)
def test_shared_memory_takes_the_sum_of_the_rows_changes(name):
    """Every row starts from the memory before the call; its change is what it alone would have made."""
    model = get_model(name)
    before = fill(model, start=50)
    ids = text_ids(3, 13)
    model(ids, update_memory=True)
    together = model.get_memory_state()
    alone = []
    for row in range(3):
        model.set_memory_state(before)
        model(ids[row : row + 1], update_memory=True)
        alone.append(model.get_memory_state())
    for index, entry in before.items():
        for key, value in entry.items():
            if isinstance(value, Tensor) and key.endswith(("memories", "norms", "counts")):
                change = sum(state[index][key] - value for state in alone)
                torch.testing.assert_close(together[index][key], value + change, atol=1e-9, rtol=1e-10)
        assert torch.equal(together[index]["segment_counter"], alone[0][index]["segment_counter"])


@pytest.mark.parametrize("use_delta_rule", [True, False])
def test_decay_in_shared_memory_depends_on_time_and_not_on_rows(use_delta_rule):
    """z is a decayed sum of positive features: whatever the number of rows it stays positive and bounded."""
    options = {"num_memory_heads": 4, "use_alibi": True, "alibi_scale": 1.5, "use_delta_rule": use_delta_rule}
    model = build_model([LayerCase("infini", options)], segment_length=5)
    with torch.no_grad():
        for step in range(12):
            model(text_ids(16, 5, start=5 * step), update_memory=True)
            norms = model.get_memory_state()[0]["memory_norms"]
            assert bool((norms >= 0).all()), f"call {step}: z falls to {norms.min():.3g}"
        assert float(norms.max()) < 12 * 16 * 5 * 20


@by_mixture
def test_reset_rows_empties_those_rows_alone(name):
    model = get_model(name)
    filled = fill(model, 3)
    with torch.no_grad():
        before = model(text_ids(3, 7))
        model.reset_rows(torch.tensor([False, False, False]))
        assert_states_equal(model.get_memory_state(), filled)
        model.reset_rows(torch.tensor([False, True, False]))
        after = model(text_ids(3, 7))
        state = model.get_memory_state()
        model.reset_memory(3)
        empty = model(text_ids(3, 7))
    for index, entry in state.items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                assert torch.equal(value[[0, 2]], filled[index][key][[0, 2]])
                assert not value[1].any()
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert_near(after[1], empty[1], 1e-12)
    assert not torch.allclose(after[1], before[1])


def interrupt_fresh_memory(model: TransformerLM) -> None:
    with model.fresh_memory(batch_size=3):
        assert model.memory_rows == 3
        model(text_ids(3, 4), update_memory=True)
        raise RuntimeError("interrupted")


def test_reset_and_fresh_memory():
    model, ids = get_model("mixed"), text_ids(2, 7)
    with torch.no_grad():
        empty = model(ids)
        filled = fill(model)
        with model.fresh_memory():
            assert_near(model(ids), empty, 1e-12)
            model(ids, update_memory=True)
        assert_states_equal(model.get_memory_state(), filled)
        with pytest.raises(RuntimeError, match="interrupted"):
            interrupt_fresh_memory(model)
        assert model.memory_rows is None
        assert_states_equal(model.get_memory_state(), filled)
        model.reset_memory()
        assert torch.equal(model(ids), empty)
    for entry in model.get_memory_state().values():
        assert not any(value.any() for value in entry.values() if isinstance(value, Tensor))


def test_rows_that_do_not_fit_are_refused():
    model = get_model("mixed")
    with pytest.raises(ValueError, match="batch_size: 0"):
        model.reset_memory(0)
    with pytest.raises(ValueError, match="one memory shared by all rows"):
        model.reset_rows(torch.tensor([True]))
    model.reset_memory(2)
    for call in (lambda: model(text_ids(3, 4)), lambda: model.compute_loss(text_ids(1, 4), text_ids(1, 4))):
        with pytest.raises(ValueError, match=r"batch of \d rows, but .* each of 2.*reset_memory"):
            call()
    with pytest.raises(ValueError, match="holds 2 rows"):
        model.reset_rows(torch.ones(3, dtype=torch.bool))
