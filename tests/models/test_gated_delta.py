"""The gated delta rule in chunks against the rule token by token, and flash-linear-attention's kernel."""

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model_cases import assert_near
from new_llm.models.ops import gated_delta, gated_delta_rule, gated_delta_rule_naive


def draw_rule(num_tokens: int, width: int = 8) -> list[Tensor]:
    """q, k, v, β, log α and M of 2 rows and 3 heads; β up to 2, where unit keys turn what is held around."""
    generator = torch.Generator().manual_seed(num_tokens)
    q, k, v = (torch.randn(2, 3, num_tokens, width, generator=generator).double() for _ in range(3))
    beta, fading = (torch.rand(2, 3, num_tokens, generator=generator).double() for _ in range(2))
    memory = torch.randn(2, 3, width, width, generator=generator).double()
    return [t.requires_grad_() for t in (q, F.normalize(k, dim=-1), v, 2 * beta, -4 * fading, memory)]


@pytest.mark.parametrize(("num_tokens", "num_written"), [(1, 1), (5, 3), (32, 0), (37, None), (96, 64), (100, 50)])
def test_chunks_equal_the_rule_with_all_gradients(num_tokens: int, num_written: int | None) -> None:
    parts = draw_rule(num_tokens)
    found = gated_delta_rule(*parts, num_written=num_written)
    begun = [t[:, :, :num_written] for t in parts[:5]]
    kept = parts[5] if num_written == 0 else gated_delta_rule_naive(*begun, parts[5])[1]
    expected = gated_delta_rule_naive(*parts)[0], kept
    upstream = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).double() for t in expected]
    gradients = [torch.autograd.grad(list(results), parts, upstream) for results in (found, expected)]
    for one, other in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        assert_near(one, other, 1e-12)


def test_where_flash_linear_attention_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_delta, "HAS_FLA", True)
    v: Any = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device="cuda:0")
    for triton, capability, width, takes_it in (
        ("3.3.1", (9, 0), 64, True),
        ("3.4.0", (9, 0), 64, False),
        ("3.6.0", (10, 0), 64, False),
        ("3.6.0+git1", (8, 0), 256, True),
        ("3.7.1", (9, 0), 256, True),
        ("3.7.1", (9, 0), 257, False),
    ):
        monkeypatch.setattr(gated_delta, "version", lambda name, triton=triton: triton)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert gated_delta.uses_fla(v, width) == takes_it, triton


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not gated_delta.HAS_FLA, reason="needs a GPU and fla")
def test_the_kernel_of_flash_linear_attention_equals_the_rule() -> None:
    parts = [t.detach().cuda().float() for t in draw_rule(100, 32)]
    narrow = [t.bfloat16() for t in parts[:3]]
    for num_written in (None, 64):
        found = gated_delta_rule(*narrow, *parts[3:], num_written=num_written)
        expected = gated_delta_rule(*(t.float() for t in narrow), *parts[3:], num_written=num_written)
        for one, other in zip(found, expected, strict=True):
            assert (one.float() - other).norm() < 0.02 * other.norm()


def test_the_kernel_is_called_with_the_layout_that_it_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with fla's signature: q, k [B, T, H, K], v [B, T, H, V], log α and β [B, T, H], M [B, H, K, V]."""

    def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
        assert q.dtype == k.dtype == v.dtype
        assert output_final_state
        scale = k.shape[-1] ** -0.5 if scale is None else scale
        parts = (t.transpose(1, 2) for t in (scale * q, k, v, beta, g))
        reads, memory = gated_delta_rule_naive(*parts, initial_state)
        return reads.transpose(1, 2), memory

    kernel = types.SimpleNamespace(chunk_gated_delta_rule=chunk_gated_delta_rule)
    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, kernel if name.endswith("rule") else types.ModuleType(name))
    parts = [t.detach() for t in draw_rule(6)]
    for found, expected in zip(gated_delta._run_fla(*parts), gated_delta_rule_naive(*parts), strict=True):
        assert_near(found, expected, 1e-12)
