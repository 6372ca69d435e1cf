"""Packed weights give the products of the usual ones, and are used only where they hold."""

import pytest
import torch
from torch import nn

from new_llm.models.decoding import MAX_PACKED_ROWS as MAX_ROWS
from new_llm.models.decoding import can_pack, pack_linear

needs_packing = pytest.mark.skipif(not can_pack(torch.zeros(1)), reason="no oneDNN here")


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(1, 48), (1, 1, 48), (MAX_ROWS, 48), (3, 2, 48), (MAX_ROWS + 1, 48)])
def test_products(shape, dtype, tolerance, bias):
    if not can_pack(torch.zeros(1, dtype=dtype)):
        pytest.skip("no bf16 here")
    linear = nn.Linear(48, 80, bias=bias).to(dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(pack_linear(linear)(x), linear(x), atol=tolerance, rtol=tolerance)


@needs_packing
def test_gradients_go_the_usual_way():
    linear = nn.Linear(8, 6)
    pack_linear(linear)(torch.ones(1, 8)).sum().backward()
    assert linear.weight.grad is not None


def test_double_precision_is_left_alone():
    assert not can_pack(torch.zeros(1, dtype=torch.float64))
