"""Attention in bfloat16 on a CPU against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from new_llm.models.ops import local_attention as module
from new_llm.models.ops.kernels import native
from new_llm.models.ops.local_attention import causal_attention


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.load_kernels() is None:
        pytest.skip("no C compiler here")
    monkeypatch.setattr(module, "MIN_SCORES", 0)
    monkeypatch.setattr(module, "BLOCK_QUERIES", 8)
    monkeypatch.setattr(module, "BLOCK_SCORES", 2 * 8 * 2 * 20)


def run(function, mixed: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of queries, keys and values that lie side by side, as a layer's do, and the gradient."""
    mixed = mixed.detach().requires_grad_()
    q, k, v = mixed.transpose(1, 2).chunk(3, dim=-1)
    result = function(q, k, v)
    (gradient,) = torch.autograd.grad(result, mixed, upstream.to(result.dtype))
    return result.detach(), gradient


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("length", [1, 7, 8, 9, 20])
def test_results_and_gradients_are_near_torch_s(length):
    torch.manual_seed(length)
    mixed = torch.randn(3, length, 2, 3 * 16).bfloat16()
    upstream = torch.randn(3, 2, length, 16).bfloat16()
    expected = run(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), mixed.double(), upstream)
    found = run(causal_attention, mixed, upstream)
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one.double() - two).norm() / two.norm()) < 0.01


@pytest.mark.usefixtures("small_blocks")
def test_no_token_sees_a_later_one():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 19, 16).bfloat16().unbind(0)
    before = causal_attention(q, k, v)
    k[:, :, 11:], v[:, :, 11:] = 100, -50
    assert torch.equal(causal_attention(q, k, v)[:, :, :11], before[:, :, :11])
    q, k, v = (t.float() for t in (q, k, v))  # other precisions are torch's own
    assert torch.equal(causal_attention(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True))
