"""Losses: which token each position predicts, the fused head against its naive form, what joins in training alone."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model_cases import HIDDEN_SIZE, LayerCase, assert_near, assert_same, build_model, get_model, text_ids
from new_llm.models import create_model
from new_llm.models.inputs import LossStatistics, align_labels
from new_llm.models.ops import head_loss as module
from new_llm.models.ops.head_loss import linear_cross_entropy, linear_cross_entropy_naive
from new_llm.models.ops.kernels import native
from tiny import make_shape


def test_position_t_predicts_token_t_plus_one():
    tokens = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    assert align_labels(tokens, 4).tolist() == [[1, 4, 1, -100], [9, 2, 6, -100]]
    assert align_labels(tokens, 3).tolist() == [[1, 4, 1], [9, 2, 6]]


@pytest.mark.parametrize("extra", [0, 1])
def test_token_losses_are_the_log_probabilities_of_the_next_tokens(extra):
    model = get_model("mixed", segment_length=4)
    text = text_ids(2, 10 + extra)
    ids = text[:, :10]
    with torch.no_grad():
        losses = model.token_losses(ids, text)
        probabilities = model(ids).log_softmax(-1)
    for row in range(2):
        for t in range(10):
            has_target = t + 1 < text.shape[1]
            expected = -probabilities[row, t, text[row, t + 1]] if has_target else torch.zeros(()).double()
            assert_near(losses[row, t], expected, 1e-12)


@pytest.mark.parametrize("name", ["pythia", "infini-delta", "tokens"])
def test_second_derivatives_are_refused(name):
    """They would lack the part that goes through fast functions."""
    model, ids = get_model(name), text_ids(2, 9)
    for value in (model.compute_loss(ids, ids)[0], *([] if name == "pythia" else [model(ids).logsumexp(-1).sum()])):
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(value, model.embed_in.weight, create_graph=True)


def test_masked_and_ignored_tokens_are_no_targets():
    model = get_model("mixed", segment_length=4)
    ids = text_ids(2, 9)
    labels = ids.clone()
    labels[0, 3] = -100
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, [0, 5]] = 0
    losses = model.token_losses(ids, labels, mask)
    expected = [[t not in (2, 8) for t in range(9)], [t not in (0, 4, 5, 8) for t in range(9)]]
    assert (losses != 0).tolist() == expected
    loss, statistics = model.compute_loss(ids, labels, mask)
    assert statistics.num_tokens == 7 + 5
    assert statistics.total_nll == pytest.approx(float(losses.sum().detach()))
    assert float(loss.detach()) == pytest.approx(statistics.total_nll / 12)
    assert statistics.perplexity == pytest.approx(math.exp(statistics.total_nll / 12), rel=1e-5)
    for nothing, tokens in ((torch.full_like(ids, -100), mask), (ids, torch.arange(9).expand(2, 9) % 2)):
        with pytest.raises(ValueError, match="no token to predict"):
            model.compute_loss(ids, nothing, tokens)
    assert math.isnan(LossStatistics(num_tokens=0, total_nll=0.0).perplexity)


ROWS, WIDTH, WORDS = 23, 16, 301


@pytest.fixture(params=["compiled", "pytorch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pytorch":
        monkeypatch.setattr(native, "find_kernels", lambda *tensors: None)
        return
    if native.load_kernels() is None:
        pytest.skip("no C compiler here")
    monkeypatch.setattr(module, "MIN_NATIVE_LOGITS", 0)


def make(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=dtype)
    weight = torch.randn(WORDS, WIDTH, generator=generator, dtype=dtype)
    targets = torch.randint(0, WORDS, (ROWS,), generator=generator)
    targets[::4] = -100
    return hidden, weight, targets, torch.rand(ROWS, generator=generator, dtype=dtype)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("chunk_rows", "weighted"), [(1, False), (5, True), (1024, True)])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_results_and_gradients_are_the_naive_form_s(dtype, tolerance, reduction, chunk_rows, weighted):
    hidden, weight, targets, weights = make(dtype)
    options = {"targets": targets, "label_weights": weights if weighted else None, "reduction": reduction}
    fast = functools.partial(linear_cross_entropy, chunk_rows=chunk_rows, **options)
    assert_same(fast, functools.partial(linear_cross_entropy_naive, **options), [hidden, weight], tolerance)
    if dtype == torch.float64:  # and those of finite differences
        score = functools.partial(linear_cross_entropy, targets=targets[:6], chunk_rows=chunk_rows, reduction=reduction)
        inputs = hidden[:6, :4].clone().requires_grad_(), weight[:, :4].clone().requires_grad_()
        assert torch.autograd.gradcheck(score, inputs, fast_mode=True)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_under_autocast_products_are_bfloat16_and_all_else_is_float32(reduction):
    hidden, weight, targets, _ = make()
    naive = functools.partial(linear_cross_entropy_naive, targets=targets, reduction=reduction)

    def score(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_cross_entropy(hidden, weight, targets, reduction=reduction, chunk_rows=8)

    assert_same(score, naive, [hidden, weight], 2e-2)
    assert not torch.equal(score(hidden, weight), naive(hidden, weight))


@pytest.mark.usefixtures("kernels")
def test_logits_beyond_every_exponent_faults_and_rows_without_a_target():
    hidden, weight, targets, _ = make()
    fast, naive = (
        functools.partial(score, targets=targets, reduction="sum")
        for score in (linear_cross_entropy, linear_cross_entropy_naive)
    )
    assert_same(fast, naive, [1e4 * hidden, weight], 1e-4)
    faulty = hidden.clone()
    faulty[1, 3] = float("nan")
    assert linear_cross_entropy(faulty, weight, targets).isnan().tolist() == [row == 1 for row in range(ROWS)]
    hidden[targets == -100] = float("inf")
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    for_hidden, for_weight = torch.autograd.grad(fast(*inputs), inputs)
    assert fast(*inputs) > 0
    assert bool(for_weight.isfinite().all())
    assert not for_hidden[targets == -100].any()
    nothing = fast(*inputs, targets=torch.full_like(targets, -100))
    assert not any(part.any() for part in (nothing, *torch.autograd.grad(nothing, inputs)))


def test_what_does_not_fit_is_refused():
    hidden, weight, targets, weights = make()
    for arguments, options, words in (
        ((hidden[:, :3], weight, targets), {}, "N, D"),
        ((hidden, weight, targets[:5]), {}, "targets"),
        ((hidden, weight, targets), {"label_weights": weights[:2]}, "label_weights"),
        ((hidden, weight, targets), {"reduction": "mean"}, "reduction"),
        ((hidden, weight, targets), {"chunk_rows": 0}, "chunk_rows"),
        ((hidden, weight, targets.masked_fill(targets == -100, WORDS)), {}, "targets: 301 is not in the vocabulary"),
    ):
        with pytest.raises(ValueError, match=words):
            linear_cross_entropy(*arguments, **options)


@pytest.mark.parametrize(("kind", "with_hook"), [("pythia", False), ("pythia", True), ("selective", False)])
def test_a_model_s_total_loss_is_the_weighted_sum_of_its_token_losses(kind, with_hook):
    """A head with a hook is called as a module, and nothing else changes."""
    torch.manual_seed(0)
    options = {"earlier_pass_weight": 0.5} if kind == "selective" else {}
    shape = make_shape(vocab_size=40, hidden_size=16, intermediate_size=32)
    model = create_model(kind, shape, segment_length=8, **options).double().train()
    calls = []
    if with_hook:
        model.embed_out.register_forward_hook(lambda *arguments: calls.append(1))
    labels, weights = torch.randint(40, (2, 22)), 5 * torch.rand(2, 22).double()
    ids = labels[:, :-1]
    mask = torch.arange(21) < torch.tensor([[21], [15]])
    total = model.total_loss(ids, labels, mask, label_weights=weights)
    expected = (model.token_losses(ids, labels, mask) * weights[:, 1:]).sum()
    torch.testing.assert_close(total, expected)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(loss, parameters) for loss in (total, expected)]
    torch.testing.assert_close(*gradients)
    assert bool(calls) == with_hook
    with pytest.raises(ValueError, match="label_weights"):
        model.total_loss(ids, labels, label_weights=weights[:, :-1])


# What joins the loss in training alone: what memory returns must predict by itself, and a router use all memories


LENGTH = 5


def find_extra_loss(model, ids: torch.Tensor) -> torch.Tensor:
    return model.train().compute_loss(ids, ids)[0] - model.eval().compute_loss(ids, ids)[0]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("infini", {}),
        ("multi_memory", {"router": "top1", "balance_weight": 0.0}),
        ("hierarchical", {"hierarchy": "fenwick"}),
    ],
)
def test_what_memory_returns_predicts_the_next_token_alone(kind, options):
    """In all segments but the first, which finds an empty memory."""
    model, ids = build_model([LayerCase(kind, {"read_loss_weight": 0.3, **options})]), text_ids(2, 4 * LENGTH)
    reads: list[torch.Tensor] = []
    hook = model.layers[0].attention.dense.register_forward_hook(lambda _, __, output: reads.append(output))
    extra = find_extra_loss(model, ids)
    hook.remove()
    logits = F.layer_norm(reads[0], (HIDDEN_SIZE,)) @ model.embed_out.weight.t()
    losses = -logits.log_softmax(-1).flatten(1, 2)[:, LENGTH:-1].gather(-1, ids[:, LENGTH + 1 :, None])
    torch.testing.assert_close(extra, 0.3 * losses.mean())


def test_a_router_is_drawn_to_equal_shares():
    options = {"router": "top1", "num_memories": 3, "balance_weight": 0.2}
    model, ids = build_model([LayerCase("multi_memory", options)]), text_ids(2, 4 * LENGTH)
    scores: list[torch.Tensor] = []
    attention = model.layers[0].attention
    route = attention.route
    attention.route = lambda *arguments: scores.append(route(*arguments)) or scores[-1]
    extra = find_extra_loss(model, ids)
    sent = F.one_hot(scores[0].argmax(-1), 3).double().flatten(0, 2).mean(0)  # the keys' scores come first
    torch.testing.assert_close(extra, 0.2 * 3 * (sent * scores[0].softmax(-1).flatten(0, 2).mean(0)).sum())
    extra.backward()
    assert bool(attention.router.weight.grad.any())
