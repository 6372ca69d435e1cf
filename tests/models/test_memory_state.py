"""The memory that a model holds: shared or per row, reset, saved, restored, merged, left alone when a call fails."""

import pytest
import torch
from torch import Tensor

from model_cases import (
    MEMORY_CASES,
    MEMORY_STACKS,
    LayerCase,
    assert_near,
    assert_states_equal,
    assert_states_near,
    build_model,
    get_model,
    text_ids,
)
from new_llm.models import TransformerLM, merge_memory_states
from new_llm.models.state import STATE_VERSION, list_tensors
from tiny import refused


def fill(model: TransformerLM, rows=None, start=0, ids=None):
    """An empty memory, filled by a call of two segments and a bit, or of these ids; its state."""
    model.reset_memory(rows)
    with torch.no_grad():
        model(text_ids(rows or 2, 13, start) if ids is None else ids, update_memory=True)
    return model.get_memory_state()


DOCUMENTED = {  # DESIGN's keys: a tensor's shape, or a count's value
    0: {"memories": (2, 4, 4, 4), "memory_norms": (2, 4, 4), "current_bank": 3 % 2, "segment_counter": 3},
    2: {"memories": (2, 2, 8, 8), "memory_norms": (2, 2, 8), "current_memory_idx": 3 % 2},
    3: {"fine_memories": (3, 2, 8, 8), "fine_memory_norms": (3, 2, 8), "current_memory_idx": 3 % 3},
}


def test_states_hold_the_documented_keys_as_cpu_tensors():
    model = get_model("mixed", dtype=torch.float32)
    state = fill(model)  # three segments, one a bank
    assert list(state) == list(DOCUMENTED)
    for index, entry in state.items():
        assert entry["layer_kind"] == model.layers[index].kind
        for key, expected in DOCUMENTED[index].items():
            assert (int(entry[key]) if isinstance(expected, int) else entry[key].shape) == expected, key
        for key, value in entry.items():
            assert isinstance(value, Tensor | int | float | str | bool), key
            if isinstance(value, Tensor):
                assert value.is_cpu
                assert not value.requires_grad
                assert not value.is_floating_point() or value.dtype == torch.float32
    assert int(state[0]["token_counts"].sum()) == 2 * 13
    assert fill(model, 2)[3]["fine_memories"].shape == (2, 3, 2, 8, 8)


REFUSED = {  # keys and values of the hierarchical layer, the last of the stack
    "version": ("version", 99, "version 99.*3"),
    "tensor version": ("version", torch.tensor([1, 1]), "version of type Tensor"),
    "layer kind": ("layer_kind", "multi_memory", "layer kind 'multi_memory'.*'hierarchical'"),
    "settings": ("use_delta_rule", False, "use_delta_rule"),
    "width": ("fine_memories", torch.zeros(3, 2, 8, 7), r"fine_memories.*\((2, )?3, 2, 8, 7\)"),
    "no tensor": ("fine_memories", [1.0], "fine_memories"),
    "integers": ("fine_memories", torch.ones(3, 2, 8, 8, dtype=torch.int64), "dtype"),
    "unknown key": ("other", 1, "other"),
    "NaN": ("fine_memories", float("nan"), "fine_memories.*NaN"),
    "no rows": ("segment_counter", torch.zeros(0), ""),
    "negative": ("token_counts", -1.0, "negative"),
}


@pytest.mark.parametrize(("key", "value", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("rows", [None, 2])
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(key, value, message, rows):
    model = get_model("mixed", dtype=torch.float32)
    bad = fill(model, rows)
    if isinstance(value, float):  # the last number of a tensor
        bad[3][key].view(-1)[-1] = value
    else:
        bad[3][key] = value
    held = fill(model, rows, start=90)
    with refused(f"layer 3.*{message}", ValueError):
        model.set_memory_state(bad)
    assert_states_equal(model.get_memory_state(), held)


def test_states_of_other_layers_or_of_none_are_refused():
    model = get_model("mixed")
    three, shared, two = fill(model, 3), fill(model), fill(model, 2)
    for bad, message in (
        *(({**two, 0: other[0]}, "different numbers of rows") for other in (three, shared)),
        ({**two, 3: "memory"}, "layer 3"),
        ({0: two[0], 2: two[2]}, r"layers \['?0'?, '?2'?\].*\[0, 2, 3\]"),
        *((nothing, "memory state") for nothing in (None, [1, 2], {0: {"memories": torch.zeros(1)}})),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_memory_state(bad)
        assert_states_equal(model.get_memory_state(), two)


def test_states_of_another_precision_are_taken_over_and_a_sum_is_as_wide_as_the_widest():
    wide, narrow = (get_model("mixed-sums", dtype=dtype) for dtype in (torch.float64, torch.float32))
    state = fill(wide)
    narrow.set_memory_state(state)
    taken = narrow.get_memory_state()
    for index, entry in taken.items():
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                assert torch.equal(value, state[index][key].float())
    for states in ([state, taken], [taken, state]):
        assert merge_memory_states(states)[0]["memories"].dtype == torch.float64


def test_a_state_is_a_copy_and_a_failed_call_changes_nothing():
    """Neither later calls nor writes to the given tensors reach through it."""
    model = get_model("mixed")
    state = fill(model, 2)
    kept = model.get_memory_state()
    for bad in (text_ids(3, 4), text_ids(2, 4) + 128):
        with pytest.raises(ValueError, match=r"rows|ids"):
            model(bad, update_memory=True)
    assert_states_equal(model.get_memory_state(), kept)
    model(text_ids(2, 9), update_memory=True)
    assert_states_equal(state, kept)
    model.set_memory_state(state)
    for t in list_tensors(state):
        t.fill_(7)
    assert_states_equal(model.get_memory_state(), kept)


@pytest.mark.parametrize(
    "name",  # whose memories add up number by number but for a decay; blocks of a tree also move
    [
        name
        for name, cases in MEMORY_STACKS.items()
        if not any(case.options.keys() & {"use_token_decay", "hierarchy"} for case in cases)
    ],
)
def test_shared_memory_takes_the_sum_of_the_rows_changes(name):
    """Every row starts from the memory before the call; its change is what it alone would have made."""
    model, ids = get_model(name), text_ids(3, 13)
    before = fill(model, start=50)
    alone = []
    with torch.no_grad():
        model(ids, update_memory=True)
        together = model.get_memory_state()
        for row in range(3):
            model.set_memory_state(before)
            model(ids[row : row + 1], update_memory=True)
            alone.append(model.get_memory_state())
    for index, entry in before.items():
        attention, shares = model.layers[index].attention, torch.ones(1).double()  # what three writes leave
        if (decay := getattr(attention, "decay", None)) is not None:
            shares = torch.tensor(decay, dtype=torch.float64) ** 3
        elif hasattr(attention, "retention"):
            shares = attention.retention.sigmoid().detach() ** 3
        for key, value in entry.items():
            if isinstance(value, Tensor) and key.endswith(("memories", "norms", "counts")):
                fades = value.is_floating_point() and "counts" not in key
                left = value * shares.view(-1, *[1] * (2 if "memories" in key else 1)) if fades else value
                change = sum(state[index][key] - left for state in alone)
                torch.testing.assert_close(together[index][key], left + change, atol=1e-9, rtol=1e-10)
        assert torch.equal(together[index]["segment_counter"], alone[0][index]["segment_counter"])


def test_reset_and_fresh_memory_and_rows_that_do_not_fit():
    model, ids = get_model("mixed"), text_ids(2, 7)
    with torch.no_grad():
        empty = model(ids)
        filled = fill(model)
        with model.fresh_memory():
            assert_near(model(ids), empty, 1e-12)
            model(ids, update_memory=True)
        assert_states_equal(model.get_memory_state(), filled)
        with pytest.raises(RuntimeError, match="interrupted"), model.fresh_memory(batch_size=3):  # noqa: PT012
            model(text_ids(3, 4), update_memory=True)
            raise RuntimeError("interrupted")
        assert model.memory_rows is None
        assert_states_equal(model.get_memory_state(), filled)
        model.reset_memory()
        assert torch.equal(model(ids), empty)
    with pytest.raises(ValueError, match="batch_size: 0"):
        model.reset_memory(0)
    with pytest.raises(ValueError, match="one memory shared by all rows"):
        model.reset_rows(torch.tensor([True]))
    model.reset_memory(2)
    with pytest.raises(ValueError, match=r"batch of 3 rows, but .* each of 2.*reset_memory"):
        model(text_ids(3, 4))
    with pytest.raises(ValueError, match="holds 2 rows"):
        model.reset_rows(torch.ones(3, dtype=torch.bool))


SUMS = [
    name
    for name, case in MEMORY_CASES.items()
    if case.options.get("use_delta_rule") is False and not case.options.keys() & {"use_alibi", "use_token_decay"}
]


@pytest.mark.parametrize("name", [*SUMS, "mixed-sums"])
def test_two_halves_merge_into_one_batch_of_both(name):
    model = get_model(name, dtype=torch.float32)
    ids = text_ids(2, 13)
    merged = merge_memory_states([fill(model, ids=ids[:1]), fill(model, ids=ids[1:])])
    assert_states_near(merged, fill(model, ids=ids), 1e-6)
    model.set_memory_state(merged)
    assert_states_equal(model.get_memory_state(), merged)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_tree_that_is_held_moves_up_once_however_many_rows_are_added(rows):
    model, ids = get_model("hierarchical-fenwick-sum"), text_ids(3, 35)
    held = fill(model, ids=ids[:1, :15])  # three segments: blocks of two and of one

    def add(ids: Tensor):
        model.set_memory_state(held)
        model(ids, update_memory=True)
        return model.get_memory_state()[0]

    entry = add(ids[1 : 1 + rows])
    assert int(entry["segment_counter"]) == 10  # three and seven: binary 1010
    assert [bool(block.any()) for block in entry["fine_memories"]] == [False, True, False, True]
    expected = sum(add(ids[row : row + 1])["fine_memories"] for row in range(1, 1 + rows))
    expected[3] -= (rows - 1) * held[0]["fine_memories"].sum(0)  # all that was held is in the block of eight
    torch.testing.assert_close(entry["fine_memories"], expected)


def test_states_that_do_not_belong_together_are_refused():
    options = {"use_delta_rule": False}
    multi = LayerCase("multi_memory", options)

    def read(*cases: LayerCase):
        return fill(build_model(list(cases)))

    state = read(multi)
    with pytest.raises(ValueError, match="at least one"):
        merge_memory_states([])
    for other, message in (
        (read(multi, multi), r"state 1 has memory layers \[0, 1\]"),
        (read(LayerCase("hierarchical", options)), "layer kind"),
        (read(LayerCase("multi_memory", {**options, "num_memories": 2})), "num_memories 2"),
        (read(LayerCase("multi_memory", {**options, "num_memory_heads": 1})), "shape"),
        ({0: {**state[0], "version": 1}}, "version"),
        ({0: None}, "layer 0 of state 1"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_memory_states([state, other])
    for wrong in ([state, None], state):
        with pytest.raises(ValueError, match="not a memory state"):
            merge_memory_states(wrong)


def test_memories_of_ones_own_add_field_by_field_within_range():
    def make(total: float, count: int):
        plain = {"layer_kind": "mean", "version": STATE_VERSION, "per_row": False, "additive": True}
        return {0: {**plain, "total": torch.full((2,), total), "count": torch.tensor(count)}}

    assert_states_equal(merge_memory_states([make(1.5, 3), make(2.0, 4)]), make(3.5, 7))
    for state, message in (
        (make(3e38, 1), "layer 0 of the sum: total holds NaN or infinite"),
        (make(0.0, 2**53 - 1), "layer 0 of the sum: count holds impossible counts"),
        (make(0.0, -1), "layer 0 of state 0: count holds impossible counts"),
        ({0: make(0.0, 0)[0] | {"current_bank": torch.tensor(0)}}, "current_bank does not belong"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_memory_states([state, state])
