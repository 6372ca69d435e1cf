"""The memory that a model holds: updated only when asked, shared or one a row, reset, restored, differentiable."""

import pytest
import torch
from model_cases import (
    MEMORY_STACKS,
    MIXED_STACKS,
    SHORT_STACKS,
    LayerCase,
    assert_near,
    assert_states_equal,
    assert_states_near,
    build_model,
    get_model,
    text_ids,
)
from torch import Tensor

from new_llm.models import TransformerLM
from new_llm.models.layers import HierarchicalLayer, InfiniLayer, MultiMemoryLayer

by_stack = pytest.mark.parametrize("name", MEMORY_STACKS)
UNDECAYED_STACKS = [
    name for name, cases in MEMORY_STACKS.items() if not any(case.options.get("use_alibi") for case in cases)
]
by_short_stack = pytest.mark.parametrize("name", SHORT_STACKS)


def fill(model, rows: int | None = None, start: int = 0) -> dict:
    """An empty memory, filled by a call of two segments and a bit; its state."""
    model.reset_memory(rows)
    with torch.no_grad():
        model(text_ids(rows or 2, 2 * model.segment_length + 2, start), update_memory=True)
    return model.get_memory_state()


# What changes it, and what does not


@by_stack
@pytest.mark.parametrize("rows", [None, 2])
def test_a_call_without_update_changes_no_bit(name: str, rows: int | None) -> None:
    model = get_model(name, dtype=torch.float32)
    before = fill(model, rows)
    ids, mask = text_ids(2, 17), torch.ones(2, 17)
    mask[0, 4:9] = 0
    model(ids)
    model(ids, mask, update_memory=False)
    model.token_losses(ids, ids)
    loss, _ = model.compute_loss(ids, ids)
    loss.backward()
    model.zero_grad()
    assert_states_equal(model.get_memory_state(), before)
    model(ids[:, :1], update_memory=True)
    after = model.get_memory_state()
    assert all(not torch.equal(after[i]["token_counts"], before[i]["token_counts"]) for i in before)


@by_short_stack
def test_a_state_is_a_copy(name: str) -> None:
    """Neither later calls nor writing into the given tensors reach through it."""
    model = get_model(name)
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


@by_short_stack
def test_a_failed_call_changes_nothing(name: str) -> None:
    model = get_model(name)
    before = fill(model, 2)
    for bad in (text_ids(3, 4), text_ids(2, 4) + 128):
        with pytest.raises(ValueError, match=r"rows|ids"):
            model(bad, update_memory=True)
    assert_states_equal(model.get_memory_state(), before)


@by_short_stack
def test_a_call_of_masked_tokens_alone_changes_nothing(name: str) -> None:
    model = get_model(name)
    for rows in (None, 2):
        for is_filled in (False, True):
            model.reset_memory(rows)
            before = fill(model, rows) if is_filled else model.get_memory_state()
            logits = model(text_ids(2, 7), torch.zeros(2, 7), update_memory=True)
            assert bool(logits.isfinite().all())
            assert_states_equal(model.get_memory_state(), before)


# Shared, or one a row


@pytest.mark.parametrize("name", UNDECAYED_STACKS)
def test_shared_memory_takes_the_sum_of_the_rows_changes(name: str) -> None:
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
def test_decay_in_shared_memory_is_the_decay_of_time_not_of_rows(use_delta_rule: bool) -> None:
    """z is a decayed sum of positive features: whatever the number of rows it stays positive and bounded."""
    options = {"num_memory_heads": 4, "use_alibi": True, "alibi_scale": 1.5, "use_delta_rule": use_delta_rule}
    model = build_model([LayerCase("infini", options)], segment_length=5)
    with torch.no_grad():
        for step in range(12):
            model(text_ids(16, 5, start=5 * step), update_memory=True)
            norms = model.get_memory_state()[0]["memory_norms"]
            assert bool((norms >= 0).all()), f"call {step}: z falls to {norms.min():.3g}"
        assert float(norms.max()) < 12 * 16 * 5 * 20


@by_stack
def test_rows_of_their_own_stay_apart(name: str) -> None:
    model = get_model(name)
    fill(model, 3)
    with torch.no_grad():
        together = model(text_ids(3, 7))
        for row in range(3):
            model.reset_memory()
            model(text_ids(3, 12)[row : row + 1], update_memory=True)
            assert_near(model(text_ids(3, 7)[row : row + 1]), together[row : row + 1], 1e-10)


@by_short_stack
def test_reset_rows_empties_those_rows_alone(name: str) -> None:
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
            if isinstance(value, Tensor) and key != "frozen":
                assert torch.equal(value[[0, 2]], filled[index][key][[0, 2]])
                assert not value[1].any()
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert_near(after[1], empty[1], 1e-12)
    assert not torch.allclose(after[1], before[1])


@by_short_stack
def test_reset_and_fresh_memory(name: str) -> None:
    model = get_model(name)
    ids = text_ids(2, 7)
    with torch.no_grad():
        empty = model(ids)
        filled = fill(model)
        assert not torch.allclose(model(ids), empty)
        with model.fresh_memory():
            assert_near(model(ids), empty, 1e-12)
            model(ids, update_memory=True)
        assert_states_equal(model.get_memory_state(), filled)
        with pytest.raises(ValueError, match="batch"), model.fresh_memory(batch_size=3):
            assert model.memory_rows == 3
            model(ids)
        assert model.memory_rows is None
        assert_states_equal(model.get_memory_state(), filled)
        model.reset_memory()
        assert torch.equal(model(ids), empty)
    for entry in model.get_memory_state().values():
        assert not any(value.any() for value in entry.values() if isinstance(value, Tensor))


def test_rows_that_do_not_fit_are_refused() -> None:
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


# Gradients


@by_stack
def test_training_steps_follow_one_another(name: str) -> None:
    """The held memory is detached at a call's end, so no step backs into the one before; inside it is not."""
    model = build_model(MEMORY_STACKS[name], dtype=torch.float32)
    for rows in (None, 2):
        model.reset_memory(rows)
        for _ in range(3):
            ids = text_ids(2, 12)
            loss, _ = model.compute_loss(ids, ids, update_memory=True)
            loss.backward()
            assert all(not memory.memories.requires_grad for memory in model._held if memory is not None)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool(parameter.grad.isfinite().all()), parameter_name
        # One fine memory is the coarse memory: the expansion gate between them changes nothing.
        is_idle = "expansion_gate" in parameter_name and "num_memories=1" in name
        assert bool(parameter.grad.any()) != is_idle, parameter_name


@by_stack
def test_what_segment_1_wrote_trains_its_keys_and_values(name: str) -> None:
    """Segments 2 and 3 are read with a frozen twin of the layer, so that the write is the only way to the weights."""
    model = get_model(name, segment_length=4)
    for layer in model.memory_layers.values():
        with torch.no_grad():
            first, second, third = model.embed_in(text_ids(2, 12)).unflatten(1, (3, 4)).unbind(1)
        layer.zero_grad()
        _, written = layer(first)
        layer.requires_grad_(False)
        try:
            _, memory = layer(second, written)
            read, _ = layer(third, memory)
        finally:
            layer.requires_grad_(True)
        read.square().sum().backward()
        heads = layer.attention.num_memory_heads
        for parameter in (layer.attention.query_key_value.weight, layer.attention.query_key_value.bias):
            assert parameter.grad is not None
            queries, keys, values = parameter.grad.reshape(heads, 3, -1).unbind(1)
            assert bool((keys.norm(dim=-1) > 0).all())
            assert bool((values.norm(dim=-1) > 0).all())
            assert not queries.any()  # queries are no part of a write
        layer.zero_grad()


@by_stack
def test_a_loss_on_segment_3_reaches_segment_1(name: str) -> None:
    model = build_model(MEMORY_STACKS[name], segment_length=4)
    ids = text_ids(1, 12)
    labels = ids.clone()
    labels[:, :9] = -100
    embedded: list[Tensor] = []
    model.embed_in.register_forward_hook(lambda _, __, output: embedded.append(output))
    loss, statistics = model.compute_loss(ids, labels)
    assert statistics.num_tokens == 3
    (gradient,) = torch.autograd.grad(loss, embedded)
    assert bool((gradient[0, :4].norm(dim=-1) > 0).all())


# Sizes


@pytest.mark.parametrize(
    ("layer", "num_bytes"),
    [
        (InfiniLayer(512, 8, 64, num_memory_heads=8), 133_120),
        (InfiniLayer(512, 8, 64), 1_050_624),
        (MultiMemoryLayer(512, 8, 64), 532_480),
        (HierarchicalLayer(512, 8, 64, num_memories=4), 532_480),
        (InfiniLayer(512, 8, 64, num_memory_heads=8, num_memory_banks=2), 2 * 133_120),
    ],
)
def test_memory_bytes(layer: torch.nn.Module, num_bytes: int) -> None:
    model = TransformerLM([layer], vocab_size=8)
    assert model.memory_info()["total_bytes"] == num_bytes
    assert model.memory_info()["per_layer"] == [{"layer": 0, "kind": layer.kind, "bytes": num_bytes}]
    entry = model.get_memory_state()[0]
    held = [value for value in entry.values() if isinstance(value, Tensor) and value.is_floating_point()]
    assert sum(value.numel() * value.element_size() for value in held) == num_bytes


def test_parameters_of_the_expansion_gate() -> None:
    def count(layer: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in layer.parameters())

    assert count(HierarchicalLayer(512, 8, 64)) - count(MultiMemoryLayer(512, 8, 64)) == 65_793
    assert count(InfiniLayer(512, 8, 64)) + 7 == count(MultiMemoryLayer(512, 8, 64))  # gates of 1 and 8 heads


def test_mixed_stacks_list_each_memory() -> None:
    model = get_model("mixed")
    per_layer = model.memory_info()["per_layer"]
    assert [(entry["layer"], entry["kind"]) for entry in per_layer] == [
        (0, "infini"),
        (2, "multi_memory"),
        (3, "hierarchical"),
    ]
    assert model.memory_info()["total_bytes"] == sum(entry["bytes"] for entry in per_layer)
    assert get_model("pythia").memory_info() == {"total_bytes": 0, "per_layer": []}
    assert_states_near(get_model("pythia").get_memory_state(), {}, 0)
    assert set(MIXED_STACKS) <= set(MEMORY_STACKS)
