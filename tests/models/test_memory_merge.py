"""Memories that add: two machines' states merge into one machine's; all others are refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model_cases import (
    MEMORY_CASES,
    MEMORY_STACKS,
    LayerCase,
    assert_states_equal,
    assert_states_near,
    build_model,
    get_model,
    text_ids,
)
from new_llm.models import TransformerLM, merge_memory_states
from new_llm.models.state import STATE_VERSION

SUMS = [
    name
    for name, case in MEMORY_CASES.items()
    if not any(
        case.options.get(name, name == "use_delta_rule") for name in ("use_delta_rule", "use_alibi", "use_token_decay")
    )
]


def read_from_empty(model: TransformerLM, ids: Tensor, mask: Tensor | None = None) -> dict[int, dict[str, Any]]:
    model.reset_memory()
    with torch.no_grad():
        model(ids, mask, update_memory=True)
    return model.get_memory_state()


@pytest.mark.parametrize("name", [*SUMS, "mixed-sums"])
def test_two_halves_merge_into_one_batch_of_both(name):
    model = get_model(name, dtype=torch.float32)
    ids = text_ids(2, 13)
    merged = merge_memory_states([read_from_empty(model, ids[:1]), read_from_empty(model, ids[1:])])
    together = read_from_empty(model, ids)
    assert_states_near(merged, together, 1e-6)
    model.set_memory_state(merged)
    assert_states_equal(model.get_memory_state(), merged)


def test_a_tree_that_is_held_moves_up_once_however_many_rows_are_added():
    model, ids = get_model("hierarchical-fenwick-sum", dtype=torch.float64), text_ids(3, 35)
    held = read_from_empty(model, ids[:1, :15])  # three segments: blocks of two and of one
    for rows in (1, 2):
        model.set_memory_state(held)
        model(ids[1 : 1 + rows], update_memory=True)
        alone = []
        for row in range(1, 1 + rows):
            model.set_memory_state(held)
            model(ids[row : row + 1], update_memory=True)
            alone.append(model.get_memory_state()[0]["fine_memories"])
        model.set_memory_state(held)
        model(ids[1 : 1 + rows], update_memory=True)
        entry = model.get_memory_state()[0]
        assert int(entry["segment_counter"]) == 10  # three and seven: binary 1010
        assert [bool(block.any()) for block in entry["fine_memories"]] == [False, True, False, True]
        moved = torch.zeros_like(alone[0])
        moved[3] = held[0]["fine_memories"].sum(0)  # all that was held is in the block of eight
        expected = sum(alone) - (rows - 1) * moved
        torch.testing.assert_close(entry["fine_memories"], expected)


def test_merging_does_not_depend_on_the_order_and_leaves_its_inputs():
    model = get_model("mixed-sums")
    states = [read_from_empty(model, text_ids(1, 13, start)) for start in (0, 100, 200)]
    again = [read_from_empty(model, text_ids(1, 13, start)) for start in (0, 100, 200)]
    merged = merge_memory_states(states)
    assert_states_near(merge_memory_states(states[::-1]), merged, 1e-12)
    assert_states_near(merge_memory_states([merge_memory_states(states[:2]), states[2]]), merged, 1e-12)
    assert_states_equal(merge_memory_states(states[:1]), states[0])
    for state, same in zip(states, again, strict=True):
        assert_states_equal(state, same)


@pytest.mark.parametrize("name", [*sorted(MEMORY_STACKS.keys() - set(SUMS) - {"mixed-sums"})])
def test_memories_that_do_not_add_are_refused(name):
    state = read_from_empty(get_model(name), text_ids(1, 9))
    with pytest.raises(ValueError, match=r"layer \d.*(delta rule|decay)") as error:
        merge_memory_states([state, state])
    assert "\n" not in str(error.value)


def test_states_that_do_not_belong_together_are_refused():
    options = {"use_delta_rule": False}
    multi = LayerCase("multi_memory", options)

    def fill(*cases: LayerCase) -> dict[int, dict[str, Any]]:
        return read_from_empty(build_model(list(cases)), text_ids(1, 7))

    state = fill(multi)
    with pytest.raises(ValueError, match="at least one"):
        merge_memory_states([])
    for other, message in (
        (fill(multi, multi), r"state 1 has memory layers \[0, 1\]"),
        (fill(LayerCase("hierarchical", options)), "layer kind"),
        (fill(LayerCase("multi_memory", {**options, "num_memories": 2})), "num_memories 2"),
        (fill(LayerCase("multi_memory", {**options, "num_memory_heads": 1})), "shape"),
        ({0: {**state[0], "version": 1}}, "version"),
        ({0: None}, "layer 0 of state 1"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_memory_states([state, other])


def test_memories_of_ones_own_add_field_by_field_within_range():
    def make(total: float, count: int) -> dict[int, dict[str, Any]]:
        plain = {"layer_kind": "mean", "version": STATE_VERSION, "per_row": False, "additive": True}
        return {0: {**plain, "total": torch.full((2,), total), "count": torch.tensor(count)}}

    merged = merge_memory_states([make(1.5, 3), make(2.0, 4)])
    assert_states_equal(merged, make(3.5, 7))
    for state, message in (
        (make(3e38, 1), "layer 0 of the sum: total holds NaN or infinite"),
        (make(0.0, 2**53 - 1), "layer 0 of the sum: count holds impossible counts"),
        (make(0.0, -1), "layer 0 of state 0: count holds impossible counts"),
        ({0: make(0.0, 0)[0] | {"current_bank": torch.tensor(0)}}, "current_bank does not belong"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_memory_states([state, state])
