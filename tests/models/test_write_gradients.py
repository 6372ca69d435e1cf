"""Gradients flow through every write inside a call, and none past its end."""

import pytest
import torch
from model_cases import MEMORY_STACKS, build_model, get_model, text_ids
from torch import Tensor

by_stack = pytest.mark.parametrize("name", MEMORY_STACKS)


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


@pytest.mark.parametrize("name", [name for name in MEMORY_STACKS if "tokens" not in name])
def test_what_segment_1_wrote_trains_its_keys_and_values(name: str) -> None:
    """Segments 2 and 3 are read with frozen weights, so that the write is the only way to them."""
    model = get_model(name, segment_length=4)
    for layer in model.memory_layers.values():
        with torch.no_grad():
            first, second, third = model.embed_in(text_ids(2, 12)).unflatten(1, (3, 4)).split(1, dim=1)
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
