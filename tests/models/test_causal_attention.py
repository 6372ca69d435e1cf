"""Attention in bfloat16 on a CPU against torch's own in float64."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model_cases import assert_same, draw
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


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("length", [1, 7, 8, 9, 20])
def test_results_and_gradients_are_near_torch_s(length):
    """Queries, keys and values lie side by side, as a layer's do."""

    def attend(function: Callable[..., Tensor], mixed: Tensor) -> Tensor:
        return function(*mixed.transpose(1, 2).chunk(3, dim=-1))

    torchs = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    fast, exact = (functools.partial(attend, function) for function in (causal_attention, torchs))
    mixed = draw(3, length, 2, 3 * 16, seed=length, dtype=torch.bfloat16)
    assert_same(fast, exact, [mixed], 0.01, exact=[mixed.double()])


@pytest.mark.usefixtures("small_blocks")
def test_no_token_sees_a_later_one():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 19, 16).bfloat16().unbind(0)
    before = causal_attention(q, k, v)
    k[:, :, 11:], v[:, :, 11:] = 100, -50
    assert torch.equal(causal_attention(q, k, v)[:, :, :11], before[:, :, :11])
    q, k, v = (t.float() for t in (q, k, v))  # other precisions are torch's own
    assert torch.equal(causal_attention(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True))
