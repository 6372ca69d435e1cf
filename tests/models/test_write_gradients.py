"""Gradients through a write, and 16 bits beyond `check_layer`."""

import pytest
import torch
from torch import Tensor

from model_cases import MEMORY_STACKS, MIXED_STACKS, STACKS, build_model, get_model, text_ids
from new_llm.models import TransformerLM


@pytest.mark.parametrize("name", MEMORY_STACKS)
def test_every_parameter_has_a_gradient(name):
    model = build_model(MEMORY_STACKS[name], dtype=torch.float32)
    ids = text_ids(2, 12)
    model.compute_loss(ids, ids, update_memory=True)[0].backward()
    assert all(not memory.memories.requires_grad for memory in model._held if memory is not None)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool(parameter.grad.isfinite().all()), parameter_name
        # One fine memory is the coarse memory: the expansion gate between them changes nothing.
        is_idle = "expansion_gate" in parameter_name and name == "hierarchical-one"
        assert bool(parameter.grad.any()) != is_idle, parameter_name


@pytest.mark.parametrize("name", [name for name in MEMORY_STACKS if "tokens" not in name])
def test_what_segment_1_wrote_trains_its_keys_and_values(name):
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


# 16 bits beyond `check_layer`: autocast, and reads of a memory larger than float16's numbers


by_stack = pytest.mark.parametrize("name", [*MIXED_STACKS, "pythia"])


def run(model: TransformerLM, ids: Tensor) -> Tensor:
    """Logits of two calls, the second with the memory of the first."""
    model.reset_memory(len(ids))
    with torch.no_grad():
        return torch.cat([model(ids, update_memory=True), model(ids)], dim=1).float()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@by_stack
def test_autocast_keeps_memory_in_float32(name):
    """Training in bf16 is autocast over float32 weights."""
    model = build_model(STACKS[name], dtype=torch.float32)
    ids = text_ids(2, 33)
    expected = run(model, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(model, ids)
        model.reset_memory()
        loss, _ = model.compute_loss(ids, ids, update_memory=True)
    loss.backward()
    assert relative_error(actual, expected) < 0.05
    for entry in model.get_memory_state().values():
        tensors = [t for t in entry.values() if isinstance(t, Tensor) and t.is_floating_point()]
        assert all(t.dtype == torch.float32 and bool(t.any()) for t in tensors)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
