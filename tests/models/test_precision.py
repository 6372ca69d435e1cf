"""16 bits beyond `check_layer`: autocast, and reads of a memory larger than float16's numbers."""

import pytest
import torch
from torch import Tensor

from model_cases import MIXED_STACKS, STACKS, build_model, text_ids
from new_llm.models import TransformerLM

by_stack = pytest.mark.parametrize("name", [*MIXED_STACKS, "pythia"])


def run(model: TransformerLM, ids: Tensor) -> Tensor:
    """Logits of two calls, the second with the memory of the first."""
    model.reset_memory(len(ids))
    with torch.no_grad():
        return torch.cat([model(ids, update_memory=True), model(ids)], dim=1).float()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@by_stack
def test_autocast_keeps_memory_in_float32(name: str) -> None:
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


@pytest.mark.parametrize("name", [name for name in (*MIXED_STACKS, "pythia") if "tokens" not in name])
def test_float16_reads_survive_a_huge_memory(name: str) -> None:
    """After 10 million tokens M and z are beyond float16's 65,504; a read is a ratio and is not.

    A token memory's M, which unit keys write by the delta rule, does not grow with the number of tokens.
    """
    model = build_model(STACKS[name], dtype=torch.float32)
    ids = text_ids(2, 13)
    run(model, ids)
    state = model.get_memory_state()
    for entry in state.values():
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                entry[key] = value * 1e6
    model.set_memory_state(state)
    with torch.no_grad():
        expected = model(ids[:, :5])
        actual = model.half()(ids[:, :5])
    assert actual.dtype == torch.float16
    assert bool(actual.isfinite().all())
    assert relative_error(actual.float(), expected) < 0.01
