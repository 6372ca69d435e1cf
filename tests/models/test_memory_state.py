"""`get_memory_state` and `set_memory_state`: what they hold and refuse, and the way to another process."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model_cases import (
    MIXED_STACKS,
    assert_states_equal,
    get_model,
    text_ids,
)
from new_llm.models import TransformerLM

LAYER_KEYS = {
    "infini": {"memories", "memory_norms", "current_bank", "segment_counter"},
    "multi_memory": {"memories", "memory_norms", "current_memory_idx"},
    "hierarchical": {"fine_memories", "fine_memory_norms", "current_memory_idx"},
}


def fill(model: TransformerLM, rows: int | None = None) -> dict[int, dict[str, Any]]:
    model.reset_memory(rows)
    with torch.no_grad():
        model(text_ids(rows or 2, 13), update_memory=True)
    return model.get_memory_state()


def test_states_hold_the_documented_keys_as_cpu_tensors():
    model = get_model("mixed", dtype=torch.float32)
    state = fill(model)
    assert list(state) == [0, 2, 3]
    for index, entry in state.items():
        kind = model.layers[index].kind
        assert LAYER_KEYS[kind] <= entry.keys()
        assert entry["layer_kind"] == kind
        for key, value in entry.items():
            assert isinstance(value, Tensor | int | float | str | bool), key
            if isinstance(value, Tensor):
                assert value.device.type == "cpu"
                assert not value.requires_grad
                assert not value.is_floating_point() or value.dtype == torch.float32
    assert state[0]["memories"].shape == (2, 4, 4, 4)
    assert state[0]["memory_norms"].shape == (2, 4, 4)
    assert int(state[0]["current_bank"]) == 3 % 2  # three segments were read, one a bank
    assert state[2]["memories"].shape == (2, 2, 8, 8)
    assert int(state[2]["current_memory_idx"]) == 3 % 2
    assert state[3]["fine_memories"].shape == (3, 2, 8, 8)
    assert int(state[3]["current_memory_idx"]) == 3 % 3
    assert int(state[0]["token_counts"].sum()) == 2 * 13
    assert fill(model, 2)[3]["fine_memories"].shape == (2, 3, 2, 8, 8)


# What is refused

Spoil = Callable[[dict[int, dict[str, Any]]], Any]


def spoil_layer(**values: Any) -> Spoil:
    """Replace values of the hierarchical layer, the last of the stack."""
    return lambda state: state[3].update(values)


def put_number(key: str, number: float) -> Spoil:
    def spoil(state: dict[int, dict[str, Any]]) -> None:
        state[3][key].view(-1)[-1] = number

    return spoil


REFUSED: dict[str, tuple[Spoil, str]] = {
    "version": (spoil_layer(version=99), r"layer 3.*version 99.*3"),
    "layer kind": (
        spoil_layer(layer_kind="multi_memory"),
        r"layer 3.*layer kind 'multi_memory'.*'hierarchical'",
    ),
    "settings": (spoil_layer(use_delta_rule=False), r"layer 3.*use_delta_rule"),
    "missing layer": (lambda state: state.pop(3), r"layers \['?0'?, '?2'?\].*\[0, 2, 3\]"),
    "unknown layer": (lambda state: state.update({4: state[3]}), r"\[0, 2, 3\]"),
    "width": (spoil_layer(fine_memories=torch.zeros(3, 2, 8, 7)), r"layer 3.*fine_memories.*\(3, 2, 8, 7\)"),
    "memories": (
        spoil_layer(fine_memory_norms=torch.zeros(4, 2, 8)),
        r"layer 3.*fine_memory_norms.*\(4, 2, 8\)",
    ),
    "counts": (spoil_layer(token_counts=torch.zeros(2, dtype=torch.int64)), r"layer 3.*token_counts.*\(2,\)"),
    "no tensor": (spoil_layer(fine_memories=[1.0]), r"layer 3.*fine_memories"),
    "integers": (spoil_layer(fine_memories=torch.ones(3, 2, 8, 8, dtype=torch.int64)), r"layer 3.*dtype"),
    "missing key": (lambda state: state[3].pop("fine_memories"), r"layer 3.*fine_memories"),
    "unknown key": (spoil_layer(other=1), r"layer 3.*other"),
    "no dictionary": (lambda state: state.update({3: "memory"}), r"layer 3"),
    "empty": (lambda state: state.update({3: {}}), r"layer 3"),
    "NaN": (put_number("fine_memories", float("nan")), r"layer 3.*fine_memories.*NaN"),
    "infinite": (put_number("fine_memory_norms", float("inf")), r"layer 3.*fine_memory_norms.*infinite"),
    "tensor version": (spoil_layer(version=torch.tensor([1, 1])), r"layer 3.*version of type Tensor"),
    "mixed keys": (lambda state: state[3].update({3: 4}), r"layer 3.*keys"),
    "no rows": (lambda state: state[3].update(segment_counter=torch.zeros(0)), "layer 3"),
    "negative": (put_number("token_counts", -1), r"layer 3.*negative"),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("rows", [None, 2])
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(spoil, message, rows):
    model = get_model("mixed", dtype=torch.float32)
    good = fill(model, rows)
    with torch.no_grad():
        model(text_ids(2, 9, start=90), update_memory=True)
    held = model.get_memory_state()
    bad = copy.deepcopy(good)
    spoil(bad)
    with pytest.raises(ValueError, match=message.replace(r"\(", r"\((?:2, )?")) as error:
        model.set_memory_state(bad)
    assert "\n" not in str(error.value)
    assert_states_equal(model.get_memory_state(), held)
    for nothing in (None, [1, 2], {0: {"memories": torch.zeros(1)}}):
        with pytest.raises(ValueError, match="memory state"):
            model.set_memory_state(nothing)
    model.set_memory_state(good)
    assert_states_equal(model.get_memory_state(), good)


@pytest.mark.parametrize("name", [name for name in MIXED_STACKS if name != "tokens"])  # one memory layer alone
def test_layers_of_different_numbers_of_rows_are_refused(name):
    model = get_model(name)
    three, shared, two = fill(model, 3), fill(model), fill(model, 2)
    first = min(two)
    for other in (three, shared):
        with pytest.raises(ValueError, match="different numbers of rows"):
            model.set_memory_state({**two, first: other[first]})
        assert_states_equal(model.get_memory_state(), two)


def test_states_of_another_precision_are_taken_over():
    """A float64 model's memory serves a float32 model, rounded once."""
    wide, narrow = (get_model("mixed", dtype=dtype) for dtype in (torch.float64, torch.float32))
    state = fill(wide)
    narrow.set_memory_state(state)
    for index, entry in narrow.get_memory_state().items():
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                assert torch.equal(value, state[index][key].float())
