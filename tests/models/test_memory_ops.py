"""Each op against its naive form, its derivatives, and its behaviour in 16 bits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model_cases import DTYPES, TOLERANCES, assert_near, draw
from new_llm.models.ops import (
    feature_map,
    local_linear_attention,
    local_linear_attention_naive,
    read_memories,
    read_memories_naive,
    weigh_memories,
    weigh_memories_naive,
    write_memory,
    write_memory_naive,
)
from new_llm.models.ops.memory import _WideSums

EPSILON = 1e-6
ROWS, MEMORIES, HEADS, LENGTH, WIDTH, VALUE_WIDTH = 2, 3, 2, 5, 4, 6
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_rule = pytest.mark.parametrize("use_delta_rule", [True, False])
by_decay = pytest.mark.parametrize("decay", [None, [0.5, 0.9]])


def draw_features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return feature_map(draw(*shape, seed=seed, dtype=dtype))


def draw_memories(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """M, z and token counts, as if written by features; row 1's memory 2 is empty."""
    memories = draw(ROWS, MEMORIES, HEADS, WIDTH, VALUE_WIDTH, seed=1, dtype=dtype)
    norms = 9 * draw_features(ROWS, MEMORIES, HEADS, WIDTH, seed=2, dtype=dtype)
    num_tokens = torch.tensor([[9, 8, 7], [6, 5, 0]])
    memories[1, 2], norms[1, 2] = 0, 0
    return memories, norms, num_tokens


def draw_segment(length: int = LENGTH, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    q, k = (draw_features(ROWS, HEADS, length, WIDTH, seed=seed, dtype=dtype) for seed in (3, 4))
    return q, k, draw(ROWS, HEADS, length, VALUE_WIDTH, seed=5, dtype=dtype)


# Fast forms equal naive forms


def test_feature_map_is_elu_plus_one():
    x = torch.linspace(-30, 30, 121, dtype=torch.float64)
    expected = torch.where(x > 0, x + 1, x.exp())
    assert torch.equal(feature_map(x), expected)
    assert bool((feature_map(x.bfloat16()) > 0).all())  # ELU(x) + 1 in 16 bits rounds small features to 0


@by_dtype
@pytest.mark.parametrize("chunk_length", [1, 3, 64])
@pytest.mark.parametrize("length", [1, 7, 11])
def test_local_attention_equals_its_naive_form(length, chunk_length, dtype):
    q, k, v = draw_segment(length, dtype)
    actual = local_linear_attention(q, k, v, epsilon=EPSILON, chunk_length=chunk_length)
    assert_near(actual, local_linear_attention_naive(q, k, v, epsilon=EPSILON), TOLERANCES[dtype])


@by_dtype
@pytest.mark.parametrize("num_memories", [1, MEMORIES])
@pytest.mark.parametrize("weighted", [True, False])
def test_read_equals_its_naive_form(weighted, num_memories, dtype):
    memories, norms, _ = (t[:, -num_memories:] for t in draw_memories(dtype))
    q, _, _ = draw_segment(dtype=dtype)
    weights = draw(ROWS, num_memories, HEADS, LENGTH, seed=6, dtype=dtype) if weighted else None
    actual = read_memories(q, memories, norms, epsilon=EPSILON, weights=weights)
    expected = read_memories_naive(q, memories, norms, epsilon=EPSILON, weights=weights)
    assert_near(actual, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("standardize", [False, True])
@by_dtype
def test_selection_equals_its_naive_form(dtype, standardize):
    _, norms, num_tokens = draw_memories(dtype)
    q, _, _ = draw_segment(dtype=dtype)
    products, options = q @ norms.permute(0, 2, 3, 1), {"width": WIDTH, "standardize": standardize}
    for given in ((products, num_tokens), (0 * products, 0 * num_tokens)):
        assert_near(weigh_memories(*given, **options), weigh_memories_naive(*given, **options), TOLERANCES[dtype])


@by_decay
@by_rule
@by_dtype
def test_write_equals_its_naive_form(dtype, use_delta_rule, decay):
    memories, norms, _ = draw_memories(dtype)
    _, k, v = draw_segment(dtype=dtype)
    w = None if decay is None else torch.tensor(decay, dtype=dtype)
    for n in range(MEMORIES):
        before = memories[:, n].clone(), norms[:, n].clone()
        options: dict[str, Any] = {"use_delta_rule": use_delta_rule, "epsilon": EPSILON, "decay": w}
        actual = write_memory(k, v, memories[:, n], norms[:, n], **options)
        expected = write_memory_naive(k, v, *before, **options)
        for new, naive in zip(actual, expected, strict=True):
            assert_near(new, naive, TOLERANCES[dtype] * 10)  # sums of tens
        assert torch.equal(memories[:, n], before[0])
        assert torch.equal(norms[:, n], before[1])


def test_read_of_another_width_is_refused():
    memories, norms, _ = draw_memories()
    with pytest.raises(ValueError, match=r"width 3 .* width 4"):
        read_memories(draw_features(ROWS, HEADS, LENGTH, 3), memories, norms, epsilon=EPSILON)


# Derivatives, in float64


def check_gradients(function, *inputs: Tensor) -> None:
    assert torch.autograd.gradcheck(function, tuple(t.detach().requires_grad_() for t in inputs))


def test_gradients_of_attention_reads_and_selection():
    q, k, v = draw_segment()
    sums = draw(ROWS, HEADS, WIDTH, VALUE_WIDTH, seed=7), draw_features(ROWS, HEADS, WIDTH, seed=8)
    for chunk_length in (2, 64):
        options: dict[str, Any] = {"epsilon": EPSILON, "chunk_length": chunk_length}
        check_gradients(
            lambda q, k, v, *sums, o=options: local_linear_attention(q, k, v, initial_sums=sums, **o), q, k, v, *sums
        )
    memories, norms, num_tokens = draw_memories()
    products = q @ norms.permute(0, 2, 3, 1)
    norms = norms + 0.1  # an empty memory's divisor is clamped, where finite differences see a corner
    weights = draw(ROWS, MEMORIES, HEADS, LENGTH, seed=6)
    check_gradients(lambda q, m, z, w: read_memories(q, m, z, epsilon=EPSILON, weights=w), q, memories, norms, weights)
    check_gradients(lambda p: weigh_memories(p, num_tokens, width=WIDTH), products)
    temperature = torch.tensor([0.5, 2.0], dtype=torch.float64)
    options = {"width": WIDTH, "standardize": True}
    check_gradients(lambda p, t: weigh_memories(p, num_tokens, temperature=t, **options), products, temperature)


@by_decay
@by_rule
def test_gradient_of_write(use_delta_rule, decay):
    memories, norms, _ = draw_memories()
    _, k, v = draw_segment()
    options: dict[str, Any] = {"use_delta_rule": use_delta_rule, "epsilon": EPSILON}
    options["decay"] = None if decay is None else torch.tensor(decay, dtype=torch.float64)
    check_gradients(lambda *inputs: write_memory(*inputs, **options), k, v, memories[:, 0], norms[:, 0])


# 16 bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e7])
def test_read_in_16_bits_survives_a_huge_memory(dtype, size):
    """After 10 million tokens z and M are far beyond float16's 65,504; what is read is not."""
    memories, norms, num_tokens = draw_memories(torch.float32)
    q = draw_segment(dtype=torch.float32)[0]
    weights = weigh_memories(q @ norms.permute(0, 2, 3, 1), num_tokens, width=WIDTH).movedim(-1, 1)
    expected = read_memories(q, memories, norms, epsilon=EPSILON, weights=weights)
    actual = read_memories(q.to(dtype), memories * size, norms * size, epsilon=EPSILON, weights=weights)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@by_rule
def test_write_in_16_bits_sums_in_float32(dtype, use_delta_rule):
    """3,000 tokens: a float16 sum would overflow, a bfloat16 sum would stop growing at 256."""
    k = torch.full((1, 1, 3000, 2), 30.0, dtype=dtype)
    v = torch.ones(1, 1, 3000, 2, dtype=dtype)
    memory, norm = write_memory(
        k, v, torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2), use_delta_rule=use_delta_rule, epsilon=EPSILON
    )
    assert memory.dtype == norm.dtype == torch.float32
    torch.testing.assert_close(memory, torch.full_like(memory, 90000.0))
    torch.testing.assert_close(norm, torch.full_like(norm, 90000.0))


def test_the_wide_product_of_bfloat16_has_the_gradients_of_its_equation():
    """Only a GPU multiplies like that; the gradients are the same everywhere."""
    k, v = (torch.randn(2, 5, width).bfloat16() for width in (3, 4))
    upstream = torch.randn(2, 3, 4).bfloat16().float()
    k, v = k.requires_grad_(), v.requires_grad_()
    actual = torch.autograd.grad(_WideSums.apply(k, v), (k, v), upstream)
    wide_k, wide_v = (t.detach().double().requires_grad_() for t in (k, v))
    expected = torch.autograd.grad(wide_k.transpose(1, 2) @ wide_v, (wide_k, wide_v), upstream.double())
    for mine, right in zip(actual, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.double(), right, rtol=8e-3, atol=1e-2)
