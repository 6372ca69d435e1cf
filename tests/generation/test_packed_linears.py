"""Packed weights give the products of the usual ones, and are used only where they hold."""

import pytest
import torch
from model_cases import MIXED_STACKS, build_model, text_ids
from torch import nn

from new_llm.models import packed_linears as module
from new_llm.models.packed_linears import MAX_ROWS, can_pack, packed_linears

needs_packing = pytest.mark.skipif(not can_pack(torch.zeros(1)), reason="no oneDNN here")


def is_packed(linear: nn.Linear) -> bool:
    return "forward" in vars(linear)


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(1, 48), (1, 1, 48), (MAX_ROWS, 48), (3, 2, 48), (MAX_ROWS + 1, 48)])
def test_products(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, bias: bool) -> None:
    if not can_pack(torch.zeros(1, dtype=dtype)):
        pytest.skip("no bf16 here")
    linear = nn.Linear(48, 80, bias=bias).to(dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        expected = linear(x)
        with packed_linears(linear):
            assert is_packed(linear)
            found = linear(x)
    assert not is_packed(linear)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@needs_packing
def test_gradients_and_changed_weights_go_the_usual_way() -> None:
    linear, x = nn.Linear(8, 6), torch.ones(1, 8)
    with packed_linears(linear):
        linear(x).sum().backward()
        assert linear.weight.grad is not None
        with torch.no_grad():
            linear.weight.add_(1)
            assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
            linear.weight = nn.Parameter(torch.zeros(6, 8))
            assert torch.equal(linear(x)[0], linear.bias)


@needs_packing
def test_the_inner_of_two_blocks_leaves_the_outer_its_weights() -> None:
    model = build_model(MIXED_STACKS["mixed"], dtype=torch.float32)
    with packed_linears(model):
        with packed_linears(model):
            assert is_packed(model.embed_out)
        assert is_packed(model.embed_out)
    assert not any(is_packed(part) for part in model.modules() if isinstance(part, nn.Linear))


def test_double_precision_is_left_alone() -> None:
    linear = nn.Linear(4, 4).double()
    with packed_linears(linear):
        assert not is_packed(linear)


@needs_packing
def test_generation_packs_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(MIXED_STACKS["mixed"], dtype=torch.float32)
    seen: list[bool] = []
    with_packed, _ = model.generate(
        text_ids(2, 5), max_new_tokens=20, on_token=lambda _: seen.append(is_packed(model.embed_out))
    )
    assert seen == [True] * 20
    assert not is_packed(model.embed_out)
    monkeypatch.setattr(module, "can_pack", lambda _: False)
    without, _ = model.generate(text_ids(2, 5), max_new_tokens=20)
    assert torch.equal(with_packed, without)


def test_a_step_in_16_bits_is_near_the_parallel_path() -> None:
    model = build_model(MIXED_STACKS["mixed"], dtype=torch.float32, segment_length=8).to(torch.bfloat16)
    ids = text_ids(2, 21)
    with torch.no_grad(), packed_linears(model):
        stream = model.open_stream(2)
        found = torch.cat([stream.feed(ids[:, t : t + 1]) for t in range(21)], dim=1)
        expected = model(ids)
    assert found.dtype == torch.bfloat16
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.03
