"""Weights of 8 bits: the rounding, its products with and without a kernel, and generation with them."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import MIXED_STACKS, STACKS, build_model, text_ids
from torch import nn

from new_llm.config import UserError
from new_llm.config.generation import GenerationConfig
from new_llm.models.ops.kernels import native
from new_llm.models.ops.kernels.native import MAX_ROWS
from new_llm.models.quantization import (
    LEVELS,
    linear_int8,
    linear_int8_naive,
    quantize_rows,
    quantize_rows_naive,
    quantize_weights,
)
from new_llm.models.step_weights import StepWeights

needs_kernels = pytest.mark.skipif(not native.has_kernels(), reason="no C compiler here")


def make_weight(rows: int, columns: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-6, 4, (rows, 1), generator=generator)
    weight = torch.randn(rows, columns, generator=generator) * sizes
    weight[rows // 2] = 0
    return weight.to(dtype)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]))
def test_rounding_is_within_half_a_level_and_the_kernels_is_the_equations(
    rows: int, columns: int, seed: int, dtype: torch.dtype
) -> None:
    weight = make_weight(rows, columns, seed, dtype)
    found, expected = quantize_rows(weight), quantize_rows_naive(weight)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.scales, expected.scales)
    error = (found.widen(torch.float32) - weight.float()).abs()
    assert bool((error <= found.scales.unsqueeze(1) * 0.5001).all())  # nothing is clipped
    largest = found.values.abs().amax(1)
    assert bool(((largest == LEVELS) | (weight == 0).all(1)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_smallest_numbers_stay_in_range(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1e-44, -1e-44, 0.0], [4e-43, -4e-43, 1e-44], [1e-38, -2e-38, 0.0]]).to(dtype)
    found, expected = quantize_rows(weight), quantize_rows_naive(weight)
    assert torch.equal(found.values, expected.values)
    assert bool((found.values.float() * weight.sign().float() >= 0).all())


def test_rounding_twice_changes_nothing() -> None:
    linear = nn.Linear(33, 20)
    quantize_weights(linear)
    once = linear.weight.detach().clone()
    quantize_weights(linear)
    torch.testing.assert_close(linear.weight.detach(), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(wrong: float) -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = wrong
    for candidate in (weight, weight.double()):
        with pytest.raises(ValueError, match="not finite"):
            quantize_rows(candidate)


@pytest.mark.parametrize("has_kernels", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("columns", [1, 31, 64, 100, 512])
def test_products(
    columns: int, dtype: torch.dtype, tolerance: float, bias: bool, has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernels:
        monkeypatch.setattr(native, "load_kernels", lambda: None)
    linear = nn.Linear(columns, 70, bias=bias).to(dtype)
    weight = quantize_rows(linear.weight)
    generator = torch.Generator().manual_seed(columns)
    for shape in ((1,), (1, 1), (2, 1), (5,), (MAX_ROWS[torch.int8],), (3, 11)):
        x = torch.randn(*shape, columns, generator=generator, dtype=torch.float64).to(dtype)
        with torch.no_grad():
            found, expected = linear_int8(x, weight, linear.bias), linear_int8_naive(x, weight, linear.bias)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["pythia", *MIXED_STACKS])
@pytest.mark.parametrize("has_kernels", [pytest.param(True, marks=needs_kernels), False])
def test_generation_runs_the_model_that_rounding_makes(
    name: str, has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernels:
        monkeypatch.setattr(native, "load_kernels", lambda: None)
    model = build_model(STACKS[name], dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    rounded = copy.deepcopy(model)
    quantize_weights(rounded)
    assert not torch.equal(rounded.embed_out.weight, model.embed_out.weight)
    assert torch.equal(rounded.embed_in.weight, model.embed_in.weight)
    found, _ = model.generate(text_ids(2, 7), max_new_tokens=20, weights="int8")
    expected, _ = rounded.generate(text_ids(2, 7), max_new_tokens=20)
    assert torch.equal(found, expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    weights = StepWeights(model, "int8", num_rows=2, packs=False)
    with torch.no_grad(), weights.in_use():
        logits = model(text_ids(2, 14))
    with torch.no_grad():
        torch.testing.assert_close(logits, rounded(text_ids(2, 14)), atol=1e-5, rtol=1e-5)


def test_two_generations_of_one_model_keep_their_own_weights() -> None:
    model = build_model(STACKS["pythia"], dtype=torch.float32)
    alone = {
        weights: model.generate(text_ids(1, 7), max_new_tokens=12, weights=weights)[0] for weights in ("auto", "int8")
    }
    seen: list[torch.Tensor] = []

    def generate_inside(_: object) -> None:
        if len(seen) < 3:
            seen.append(model.generate(text_ids(1, 7), max_new_tokens=12)[0])

    outer, _ = model.generate(text_ids(1, 7), max_new_tokens=12, weights="int8", on_token=generate_inside)
    assert torch.equal(outer, alone["int8"])
    assert all(torch.equal(inner, alone["auto"]) for inner in seen)


def test_int8_is_the_same_on_any_number_of_threads() -> None:
    model = build_model(MIXED_STACKS["mixed"], dtype=torch.float32)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(model.generate(text_ids(1, 9), max_new_tokens=15, weights="int8")[0])
    torch.set_num_threads(1)
    assert all(torch.equal(ids, found[0]) for ids in found)


def test_other_names_are_refused() -> None:
    with pytest.raises(UserError, match="weights"):
        GenerationConfig(weights="int4")  # pyright: ignore[reportArgumentType]
