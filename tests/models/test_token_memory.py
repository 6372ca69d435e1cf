"""The token memory's rule in segments against the rule token by token, and what rows add to a shared memory."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_cases import assert_near, get_model, text_ids
from new_llm.models.layers import TokenMemoryLayer
from new_llm.models.ops import delta_rule, scale_to_length, scan_delta_rule, scan_delta_rule_naive


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 7), st.integers(1, 3), st.data())
def test_a_segment_at_a_time_equals_a_token_at_a_time(rows, segments, length, heads, data):
    """Reads, M and all gradients, with some keys 0, in pieces of at most 3 tokens or in one."""
    num_writes = data.draw(st.integers(0, segments))
    shape = (rows, segments, heads, length)
    q, k = (F.normalize(draw(*shape, 4, seed=seed), dim=-1) for seed in (0, 1))
    k[..., data.draw(st.integers(0, length - 1)), :] = 0
    v, beta = draw(rows, segments, length, 5, seed=2), 2 * torch.sigmoid(draw(*shape, seed=3))
    memory, rest = draw(rows, heads, 4, 5, seed=4), draw(heads, 4, 5, seed=8)
    decay = torch.sigmoid(draw(rows, num_writes, heads, seed=9))
    inputs = [t.requires_grad_() for t in (q, k, v, beta, memory, rest, decay)]
    with patch.object(delta_rule, "PIECE_LENGTH", data.draw(st.sampled_from((3, 64)))):
        found, expected = scan_delta_rule(*inputs), scan_delta_rule_naive(*inputs)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, 1e-10)
    weights = [draw(*t.shape, seed=5 + place) for place, t in enumerate(expected)]
    gradients = [
        torch.autograd.grad(
            sum((t * w).sum() for t, w in zip(outputs, weights, strict=True)), inputs, materialize_grads=True
        )
        for outputs in (found, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        assert_near(one, other, 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize(("length", "width"), [(64, 32), (130, 20)])
def test_the_compiled_kernels_equal_the_rule(dtype: torch.dtype, tolerance: float, length: int, width: int) -> None:
    """Where there are none, the PyTorch form in these dtypes; some β are 0."""
    shape = (2, 3, 2, length)
    q, k = (F.normalize(draw(*shape, width, seed=seed), dim=-1).to(dtype).double() for seed in (0, 1))
    v, beta = draw(2, 3, length, 24, seed=2).to(dtype).double(), 2 * torch.sigmoid(draw(*shape, seed=3))
    beta[..., ::7] = 0
    memory, rest, decay = draw(2, 2, width, 24, seed=4), draw(2, width, 24, seed=5), draw(2, 2, 2, seed=6).sigmoid()
    exact = [t.float().double().requires_grad_() for t in (q, k, v, beta, memory, rest, decay)]
    mine = [t.detach().to(dtype if place < 3 else torch.float32).requires_grad_() for place, t in enumerate(exact)]
    results = []
    for function, inputs in ((scan_delta_rule, mine), (scan_delta_rule_naive, exact)):
        outputs = function(*inputs)
        loss = sum((t.double() * draw(*t.shape, seed=7 + place)).sum() for place, t in enumerate(outputs))
        assert isinstance(loss, Tensor)
        results.append([*outputs, *torch.autograd.grad(loss, inputs)])
    for one, other in zip(*results, strict=True):
        assert float(((one.double() - other).norm() / other.norm()).detach()) < tolerance


@pytest.mark.parametrize("narrow", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_of_given_lengths(narrow: torch.dtype) -> None:
    x, lengths, upstream = draw(3, 5, 40).to(narrow), draw(3, 5, seed=1), draw(3, 5, 40, seed=2)
    x[1, 2] = 0
    wide = torch.promote_types(narrow, torch.float32)
    exact, mine = (x.double(), lengths.to(wide).double()), (x.clone(), lengths.to(wide))
    for t in (*exact, *mine):
        t.requires_grad_()
    expected, found = exact[1].unsqueeze(-1) * F.normalize(exact[0], dim=-1), scale_to_length(*mine, dtype=wide)
    gradients = [torch.autograd.grad(y, t, upstream.to(y.dtype)) for y, t in ((expected, exact), (found, mine))]
    expected_x, found_x = (g[0].masked_fill(x == 0, 0) for g in gradients)
    tolerance = 1e-12 if narrow == torch.float64 else 1e-5
    assert_near(found, expected.to(wide), tolerance)
    assert_near(gradients[1][1], gradients[0][1].to(wide), tolerance)
    assert_near(found_x, expected_x.to(narrow), 0.01 if narrow == torch.bfloat16 else tolerance)


@pytest.mark.parametrize(("name", "index"), [("tokens", 1), ("infini-alibi", 0)])
def test_rows_add_what_they_changed_to_a_shared_memory_that_decays(name, index):
    model, ids = get_model(name, segment_length=4), text_ids(3, 10)
    with torch.no_grad():
        model(text_ids(1, 9, start=50), update_memory=True)
        before = model.get_memory_state()
        model(ids, update_memory=True)
        together = model.get_memory_state()[index]
        attention = model.layers[index].attention
        shares = (
            torch.tensor(attention.decay, dtype=torch.float64)
            if name == "infini-alibi"
            else torch.sigmoid(attention.retention)
        )
        left = before[index]["memories"] * shares[:, None, None] ** 3  # after each row's three writes
        changes = []
        for row in range(3):
            model.set_memory_state(before)
            model(ids[row : row + 1], update_memory=True)
            changes.append(model.get_memory_state()[index]["memories"] - left)
    assert_near(together["memories"], left + sum(changes), 1e-10)
    assert int(together["token_counts"].sum()) == 9 + 3 * 10


def test_the_layer_alone_asks_for_the_heads_rows():
    with pytest.raises(ValueError, match="rows of its tokens: it runs inside a TransformerLM"):
        TokenMemoryLayer(6)(torch.zeros(1, 1, 4, 6))
