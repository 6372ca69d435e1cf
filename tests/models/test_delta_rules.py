"""The delta rules in pieces against the rules token by token, and flash-linear-attention's kernel."""

import sys
import types
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_cases import assert_near, assert_same, draw
from new_llm.models.ops import (
    delta_rule,
    gated_delta,
    gated_delta_rule,
    gated_delta_rule_naive,
    scale_to_length,
    scan_delta_rule,
    scan_delta_rule_naive,
)

# The token memory's


def draw_scan(rows: int, segments: int, writes: int, heads: int, length: int, width: int, size: int) -> list[Tensor]:
    """q, k, v, β, what the memory holds beyond M₀, M₀ and w."""
    shape = (rows, segments, heads, length)
    q, k = (F.normalize(draw(*shape, width, seed=seed), dim=-1) for seed in (0, 1))
    v, beta = draw(rows, segments, length, size, seed=2), 2 * draw(*shape, seed=3).sigmoid()
    memory, rest = draw(rows, heads, width, size, seed=4), draw(heads, width, size, seed=8)
    return [q, k, v, beta, memory, rest, draw(rows, writes, heads, seed=9).sigmoid()]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 7), st.integers(1, 3), st.data())
def test_a_segment_at_a_time_equals_a_token_at_a_time(rows, segments, length, heads, data):
    """Reads, M and all gradients, with some keys 0, in pieces of at most 3 tokens or in one."""
    inputs = draw_scan(rows, segments, data.draw(st.integers(0, segments)), heads, length, 4, 5)
    inputs[1][..., data.draw(st.integers(0, length - 1)), :] = 0
    with patch.object(delta_rule, "PIECE_LENGTH", data.draw(st.sampled_from((3, 64)))):
        assert_same(scan_delta_rule, scan_delta_rule_naive, inputs, 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize(("length", "width"), [(64, 32), (130, 20)])
def test_the_compiled_kernels_equal_the_rule(dtype: torch.dtype, tolerance: float, length: int, width: int) -> None:
    """Where there are none, the PyTorch form in these dtypes; some β are 0."""
    parts = draw_scan(2, 3, 2, 2, length, width, 24)
    parts[3][..., ::7] = 0
    mine = [t.to(dtype if place < 3 else torch.float32) for place, t in enumerate(parts)]
    assert_same(scan_delta_rule, scan_delta_rule_naive, mine, tolerance, exact=[t.double() for t in mine])


@pytest.mark.parametrize("narrow", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_of_given_lengths(narrow: torch.dtype) -> None:
    wide = torch.promote_types(narrow, torch.float32)
    parts = [draw(3, 5, 40).to(narrow), draw(3, 5, seed=1).to(wide)]

    def scale(x: Tensor, lengths: Tensor) -> Tensor:
        return lengths.unsqueeze(-1) * F.normalize(x, dim=-1)

    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.01}[narrow]
    exact = [t.double() for t in parts]
    assert_same(lambda *given: scale_to_length(*given, dtype=wide), scale, parts, tolerance, exact=exact)
    assert not scale_to_length(torch.zeros(2, 40), torch.ones(2)).any()


# Gated DeltaNet's


def draw_rule(num_tokens: int, width: int = 8) -> list[Tensor]:
    """q, k, v, β, log α and M of 2 rows and 3 heads; β up to 2, where unit keys turn what is held around."""
    q, k, v = (draw(2, 3, num_tokens, width, seed=seed) for seed in (1, 2, 3))
    beta, fading = (draw(2, 3, num_tokens, seed=seed).sigmoid() for seed in (4, 5))
    return [q, F.normalize(k, dim=-1), v, 2 * beta, -4 * fading, draw(2, 3, width, width, seed=6)]


@pytest.mark.parametrize(("num_tokens", "num_written"), [(1, 1), (5, 3), (32, 0), (37, None), (96, 64), (100, 50)])
def test_chunks_equal_the_rule_with_all_gradients(num_tokens: int, num_written: int | None) -> None:
    def run(*parts: Tensor) -> tuple[Tensor, Tensor]:
        begun = [t[:, :, :num_written] for t in parts[:5]]
        kept = parts[5] if num_written == 0 else gated_delta_rule_naive(*begun, parts[5])[1]
        return gated_delta_rule_naive(*parts)[0], kept

    assert_same(lambda *parts: gated_delta_rule(*parts, num_written=num_written), run, draw_rule(num_tokens), 1e-12)


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
