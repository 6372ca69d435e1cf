"""The Triton kernels against the naive forms and the PyTorch forms, outputs and gradients.

On a machine without a GPU they run in Triton's interpreter, which must be chosen before triton is imported.
"""

import copy
import os
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from model_cases import assert_near, randomize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        pytest.skip("triton is imported, not as interpreter: set TRITON_INTERPRET=1", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from new_llm.config import PythiaConfig  # noqa: E402
from new_llm.models import create_model  # noqa: E402
from new_llm.models.decoding import DecodingWeights  # noqa: E402
from new_llm.models.layers import (  # noqa: E402
    HierarchicalLayer,
    InfiniLayer,
    Layer,
    MultiMemoryLayer,
    Segments,
)
from new_llm.models.ops import (  # noqa: E402
    feature_map,
    kernels,
    local_linear_attention,
    local_linear_attention_naive,
    scan_memories,
    scan_memories_naive,
)
from new_llm.models.ops.head_loss import score_logits  # noqa: E402
from new_llm.models.ops.kernels import triton_steps  # noqa: E402

EPSILON = 1e-6
NEAR = {torch.float32: 2e-5, torch.bfloat16: 0.03}
by_dtype = pytest.mark.parametrize("dtype", NEAR, ids=str)


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Chooses the kernels on every device; the list shows that they were asked for."""
    asked: list[Tensor] = []

    def uses_triton(t: Tensor, *_: object) -> bool:
        asked.append(t)
        return t.dtype in kernels.TRITON_DTYPES

    monkeypatch.setattr(kernels, "uses_triton", uses_triton)
    return asked


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE, dtype)


def draw_features(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return feature_map(draw(*shape, seed=seed, dtype=dtype))


def differentiate(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a sum of the outputs with fixed random weights."""
    loss = sum((draw(*t.shape, seed=90 + i) * t).sum() for i, t in enumerate(outputs))
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Near relative to the greatest number: 16 bits round sums of both signs."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    size = max(1.0, float(expected.detach().abs().max()))
    error = float((actual.detach().double() - expected.detach().double()).abs().max()) / size
    assert error < NEAR[dtype], f"{error:.2g} of {size:.2g}"


@by_dtype
@pytest.mark.parametrize(
    ("length", "width", "value_width", "chunk_length", "has_initial"),
    [(1, 3, 5, 64, False), (37, 16, 20, 64, True), (70, 20, 16, 64, False), (45, 72, 136, 16, True)],
)
def test_local_attention(
    with_kernels: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    width: int,
    value_width: int,
    chunk_length: int,
    has_initial: bool,
    dtype: torch.dtype,
) -> None:
    q, k = (draw_features(2, 2, length, width, seed=seed, dtype=dtype) for seed in (1, 2))
    v = draw(2, 2, length, value_width, seed=3, dtype=dtype)
    inputs = [q, k, v]
    if has_initial:
        inputs += [draw(2, 2, width, value_width, seed=4), draw_features(2, 2, width, seed=5)]
    inputs = [t.detach().requires_grad_() for t in inputs]

    def attend(inputs: list[Tensor]) -> Tensor:
        sums = (inputs[3], inputs[4]) if has_initial else None
        return local_linear_attention(*inputs[:3], epsilon=EPSILON, chunk_length=chunk_length, initial_sums=sums)

    actual = attend(inputs)
    assert actual.dtype == dtype
    gradients = differentiate([actual], inputs)
    assert with_kernels
    monkeypatch.undo()
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = attend(exact)
    assert_close(actual, expected, dtype)
    for mine, other in zip(gradients, differentiate([expected], exact), strict=True):
        assert_close(mine, other, dtype)
    if not has_initial:
        naive = local_linear_attention_naive(*exact, epsilon=EPSILON)
        assert_close(actual, naive, dtype)


@dataclass(frozen=True)
class Call:
    """One call of `scan_memories`: n segments, N memories, and which options."""

    segments: int
    memories: int
    writes: int
    length: int = 5
    width: int = 4
    value_width: int = 6
    has_delta: bool = True
    has_decay: bool = False
    has_sum: bool = False
    is_empty: bool = False
    rows_differ: bool = False


CALLS = {
    "delta": Call(5, 1, 5),
    "delta, last unwritten": Call(5, 1, 4, has_decay=True),
    "sums": Call(5, 1, 5, has_delta=False),
    "sums, last unwritten, decay": Call(4, 1, 3, has_delta=False, has_decay=True),
    "memories, empty": Call(5, 3, 5, has_sum=True, is_empty=True),
    "memories, rows differ": Call(4, 2, 3, has_decay=True, has_sum=True, rows_differ=True),
    "memories, sums": Call(5, 2, 5, has_delta=False, has_decay=True, rows_differ=True),
    "first from empty": Call(1, 1, 1, is_empty=True),
    "wide": Call(2, 1, 2, length=37, width=72, value_width=80),
}


@by_dtype
@pytest.mark.parametrize("group", [2, 9])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_memories(
    with_kernels: list[Tensor], monkeypatch: pytest.MonkeyPatch, call: Call, group: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("new_llm.models.ops.memory_scan.choose_group", lambda *_: group)
    tokens = (2, call.segments, 2, call.length)
    features = [draw_features(*tokens, call.width, seed=seed, dtype=dtype) for seed in (1, 2)]
    inputs = [*features, draw(*tokens, call.value_width, seed=3, dtype=dtype)]
    size = call.length * call.width
    inputs.append(draw(*tokens, call.memories, seed=5) / size)
    if not call.is_empty:
        inputs.append(draw(2, call.memories, 2, call.width, call.value_width, seed=4))
    if call.has_delta:
        inputs.append(draw(2, call.writes, 2, call.length, seed=6).abs() / size)
    if call.has_sum:
        inputs.append(draw(*tokens, seed=7).abs() / size)
    inputs = [t.detach().requires_grad_() for t in inputs]
    slots = torch.arange(call.writes, device=DEVICE) % call.memories + torch.zeros(2, 1, device=DEVICE).long()
    if call.rows_differ:
        slots = (slots + torch.tensor([[0], [1]], device=DEVICE)) % call.memories
    decay = draw(2, call.writes, 2, seed=8).sigmoid() if call.has_decay else None

    def scan(function, inputs: list[Tensor]) -> list[Tensor]:
        rest = inputs[4:]
        memories = None if call.is_empty else rest.pop(0)
        delta_scales = rest.pop(0) if call.has_delta else None
        sum_scales = rest.pop(0) if call.has_sum else None
        out = function(
            *inputs[:3],
            memories,
            inputs[3],
            slots,
            num_writes=call.writes,
            delta_scales=delta_scales,
            sum_scales=sum_scales,
            decay=decay if decay is None else decay.to(inputs[3].dtype),
        )
        return [t for t in out if t is not None]

    actual = scan(scan_memories, inputs)
    gradients = differentiate(actual, inputs)
    assert with_kernels
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = scan(scan_memories_naive, exact)
    for mine, other in zip(actual, expected, strict=True):
        assert_close(mine, other, dtype)
    for mine, other in zip(gradients, differentiate(expected, exact), strict=True):
        assert_close(mine, other, dtype)


@by_dtype
@pytest.mark.parametrize("writes", [True, False])
def test_the_head_s_loss(with_kernels: list[Tensor], monkeypatch: pytest.MonkeyPatch, writes: bool, dtype: torch.dtype):
    """Two blocks of the vocabulary, logits of every size, and a row without a target, whatever its logits are."""
    logits = 5 * draw(4, 4500, dtype=dtype)
    logits[1, :4100] = -torch.inf
    logits[2] = torch.nan
    targets = torch.tensor([4499, 4200, -1, 0], device=DEVICE)
    weights = torch.tensor([0.5, 2.0, 1.0, 0.0], device=DEVICE)
    mine, theirs = logits.clone(), logits.clone()
    losses = score_logits(mine, targets, weights, write_gradients=writes)
    assert with_kernels
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    torch.testing.assert_close(losses, score_logits(theirs, targets, weights, write_gradients=writes))
    assert losses[2:].tolist() == [0, 0]
    if writes:
        torch.testing.assert_close(mine, theirs)


LAYERS: dict[str, type[Layer]] = {"infini": InfiniLayer, "multi": MultiMemoryLayer, "hierarchical": HierarchicalLayer}


@pytest.mark.parametrize("use_delta_rule", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_with_masked_tokens(
    with_kernels: list[Tensor], monkeypatch: pytest.MonkeyPatch, kind: str, use_delta_rule: bool
) -> None:
    torch.manual_seed(0)
    options = {"use_alibi": True, "num_memory_banks": 2, "segments_per_bank": 1} if kind == "infini" else {}
    layer = LAYERS[kind](16, 2, 24, use_delta_rule=use_delta_rule, num_memory_heads=2, **options).to(DEVICE)
    hidden = draw(2, 5, 6, 16, seed=1).requires_grad_()
    valid = torch.ones(2, 5, 6, dtype=torch.bool, device=DEVICE)
    valid[0, 1] = valid[1, 2, 4:] = valid[1, 4] = False
    parameters = [hidden, *layer.parameters()]

    def run() -> tuple[list[Tensor], list[Tensor]]:
        out, memory = layer(hidden, None, Segments(valid))
        assert memory is not None
        results = [out, memory.memories, memory.norms]
        return results, differentiate(results, parameters)

    actual = run()
    assert with_kernels
    monkeypatch.undo()
    expected = run()
    for mine, other in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert_near(mine, other, 1e-3 * max(1.0, float(other.abs().max())))


def test_kernels_are_for_gpus() -> None:
    assert not kernels.uses_triton(torch.zeros(1))
    if DEVICE == "cuda":
        assert kernels.uses_triton(torch.zeros(1, device=DEVICE, dtype=torch.bfloat16))
        assert not kernels.uses_triton(torch.zeros(1, device=DEVICE))


@pytest.mark.parametrize(
    ("kind", "segment", "options"),
    [
        ("pythia", None, {}),
        ("infini", 4, {"memory_layers": (0,), "num_memory_heads": 2}),
        ("infini", 4, {"memory_layers": (0,), "num_memory_heads": 2, "use_delta_rule": False, "use_alibi": True}),
    ],
)
def test_a_token_of_a_plain_layer_is_three_launches_and_right(
    kind: str, segment: int | None, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows at two places, over the end of a segment; sizes that are no multiples of a tile's."""
    shape = PythiaConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=72
    )
    model = create_model(kind, shape, segment_length=segment, **options).to(DEVICE)
    randomize(model)
    ids = draw(2, 9, seed=1).mul(100).long().remainder(16)
    stream = model.open_stream(2)
    stream.feed(ids[:, :3], torch.tensor([[1, 1, 1], [1, 1, 0]]))
    expected = copy.deepcopy(stream)
    stream.begin_steps(6)
    monkeypatch.setattr(triton_steps, "PIECE", 4)  # so that a head has several
    launches: list[str] = []
    for name in ("project", "attend", "recall", "merge"):
        call = getattr(triton_steps, name)
        monkeypatch.setattr(triton_steps, name, lambda *a, _c=call, _n=name, **o: launches.append(_n) or _c(*a, **o))
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "uses_triton", lambda *_: True)
        weights = DecodingWeights(model, num_rows=2, packs=False)
    for t in range(3, 9):
        with weights.in_use():
            found = stream.read_token(ids[:, t : t + 1])
        assert_near(found, expected.feed_hidden(ids[:, t : t + 1]), 2e-5)
        stream.count_token()
    assert launches == ["project", "attend" if kind == "pythia" else "recall", "merge"] * 6
