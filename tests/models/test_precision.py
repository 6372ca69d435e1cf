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
