"""The Triton kernels against float64: outputs and gradients, from poisoned memory, and two runs bit for bit.

On a GPU all shapes; elsewhere the small ones, in Triton's interpreter, which must be chosen before triton is imported.
"""

import copy
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        pytest.skip("triton is imported, not as interpreter: set TRITON_INTERPRET=1", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from new_llm.config import PythiaConfig  # noqa: E402
from new_llm.models import create_model, ops  # noqa: E402
from new_llm.models.decoding import DecodingWeights  # noqa: E402
from new_llm.models.layers import HierarchicalLayer, InfiniLayer, MultiMemoryLayer, Segments  # noqa: E402
from new_llm.models.ops.head_loss import (  # noqa: E402
    linear_cross_entropy,
    linear_cross_entropy_naive,
    score_logits,
)
from new_llm.models.ops.kernels import triton_steps  # noqa: E402

pytestmark = pytest.mark.gpu
EPSILON = 1e-6
NEAR = {"bfloat16": 0.03, "float32": 1e-4, "tf32": 5e-3} if ON_GPU else {"bfloat16": 0.03, "float32": 2e-5}
"""How far numbers may be from float64's, relative to the greatest or to 0.3 (gradients that cancel out)."""
SIZES = [
    (length, width)
    for length, width in [*product((1, 17, 64, 257, 2048), (64, 72, 128, 200, 256, 512, 1024, 2048)), (70, 65)]
    if length * width <= 2**20 and (length in (70, 257, 2048) or width in (64, 200, 512))
] + [(2048, 1024)]
by_precision = pytest.mark.parametrize("precision", NEAR)


def on_gpu(*values: Any) -> Any:
    """Parameters that the interpreter is too slow for."""
    return pytest.param(*values, marks=pytest.mark.skipif(not ON_GPU, reason="too slow in the interpreter"))


@pytest.fixture
def precision() -> str:
    return "float32"


@pytest.fixture(autouse=True)
def asked(precision: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """torch.empty gives NaN under deterministic algorithms; products of float32 are float32's or tf32's.

    The kernels are chosen in float32 too, and on every device; the list shows that they were asked for.
    """
    tensors: list[Tensor] = []
    original = ops.kernels.uses_triton

    def uses_triton(t: Tensor, *dtypes: Any) -> bool:
        tensors.append(t)
        return original(t, *dtypes) if ON_GPU else t.dtype in ops.kernels.TRITON_DTYPES

    monkeypatch.setattr(ops.kernels, "uses_triton", uses_triton)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    yield tensors
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def check(precision: str, run: Callable, expected_of: Callable, inputs: list[Tensor]) -> None:
    """Outputs and gradients of `run` in a precision: near `expected_of` in float64, and the same again."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32

    def differentiate(function: Callable, dtype: torch.dtype) -> list[Tensor]:
        cast = [t.to(dtype).to(t.dtype if dtype == torch.float64 else dtype).requires_grad_() for t in inputs]
        outputs = function(*cast)
        loss = sum((draw(*out.shape, seed=90 + i) * out).sum() for i, out in enumerate(outputs))
        gradients = torch.autograd.grad(loss, cast, allow_unused=True, materialize_grads=True)
        return [*(out.detach() for out in outputs), *gradients]

    inputs = [t.to(dtype).double() for t in inputs]  # so that both begin from the same numbers
    actual, again = differentiate(run, dtype), differentiate(run, dtype)
    for number, (mine, same, exact) in enumerate(
        zip(actual, again, differentiate(expected_of, torch.float64), strict=True)
    ):
        assert torch.equal(mine, same), f"result {number} differs from run to run"
        if mine.numel():
            error = float((mine.double() - exact).abs().max() / exact.abs().max().clamp_min(0.3))
            assert error < NEAR[precision], f"result {number}: {error:.2g}"


@by_precision
@pytest.mark.parametrize(
    ("shape", "value_width", "chunk_length", "has_initial"),
    [
        ((2, 2, 1, 3), 5, 64, False),
        ((2, 2, 37, 16), 20, 64, True),
        ((2, 2, 70, 20), 16, 64, False),
        ((2, 2, 45, 72), 136, 16, True),
        *[on_gpu((2, 3, *size), size[1], 4096, False) for size in SIZES],
        on_gpu((70_000, 1, 3, 16), 16, 64, False),  # more groups than an axis of a grid holds
    ],
)
def test_local_attention(shape, value_width, chunk_length, has_initial, precision, asked):
    def attend(q: Tensor, k: Tensor, v: Tensor, *sums: Tensor) -> list[Tensor]:
        """In float64 the PyTorch form, which test_memory_ops.py compares with the naive one."""
        wide = torch.promote_types(q.dtype, torch.float32)
        initial = (sums[0].to(wide), ops.feature_map(sums[1].to(wide))) if sums else None
        options = {"epsilon": EPSILON, "chunk_length": chunk_length, "initial_sums": initial}
        return [ops.local_linear_attention(ops.feature_map(q), ops.feature_map(k), v, **options)]

    inputs = [draw(*shape, seed=1), draw(*shape, seed=2), draw(*shape[:3], value_width, seed=3)]
    if has_initial:
        inputs += [draw(*shape[:2], shape[3], value_width, seed=4), draw(*shape[:2], shape[3], seed=5)]
    check(precision, attend, attend, inputs)
    assert asked


@dataclass(frozen=True)
class Call:
    """One call of `scan_memories`: n segments, N memories, and which options."""

    segments: int
    memories: int
    writes: int
    heads: int = 2
    length: int = 5
    width: int = 4
    value_width: int = 6
    group: int | None = None
    has_delta: bool = True
    has_decay: bool = False
    has_sum: bool = False
    is_empty: bool = False
    rows_differ: bool = False


CALLS = {
    "delta": Call(5, 1, 5, group=2),
    "delta, last unwritten": Call(5, 1, 4, has_decay=True),
    "sums": Call(5, 1, 5, has_delta=False),
    "sums, last unwritten, decay": Call(4, 1, 3, has_delta=False, has_decay=True, group=2),
    "memories, empty": Call(5, 3, 5, has_sum=True, is_empty=True, group=2),
    "memories, rows differ": Call(4, 2, 3, has_decay=True, has_sum=True, rows_differ=True, group=2),
    "memories, sums": Call(5, 2, 5, has_delta=False, has_decay=True, rows_differ=True),
    "first from empty": Call(1, 1, 1, is_empty=True),
    "wide": Call(2, 1, 2, length=37, width=72, value_width=80),
}


@by_precision
@pytest.mark.parametrize(
    "call",
    [
        *[pytest.param(call, id=name) for name, call in CALLS.items()],
        *[
            on_gpu(Call(4, memories, 4, heads, length, width, width, has_decay=True))
            for (length, width), (heads, memories) in product(SIZES, ((1, 1), (8, 1), (2, 3)))
            if heads * memories == 1 or length * width <= 2**18  # the same tiles as fewer heads
        ],
    ],
)
def test_memories(call: Call, precision: str, asked: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    if call.group:
        monkeypatch.setattr("new_llm.models.ops.memory_scan.choose_group", lambda *_: call.group)
    tokens, size = (2, call.segments, call.heads, call.length), call.length * call.width
    inputs = {name: draw(*tokens, call.width, seed=seed) for seed, name in enumerate("qk")}
    inputs["v"] = draw(*tokens, call.value_width, seed=3)
    inputs["read_scales"] = draw(*tokens, call.memories, seed=5) / size
    if not call.is_empty:
        inputs["memories"] = draw(2, call.memories, call.heads, call.width, call.value_width, seed=4)
    if call.has_delta:
        inputs["delta_scales"] = draw(2, call.writes, call.heads, call.length, seed=6).abs() / size
    if call.has_sum:
        inputs["sum_scales"] = draw(*tokens, seed=7).abs() / size
    slots = torch.arange(call.writes, device=DEVICE) % call.memories + torch.zeros(2, 1, device=DEVICE).long()
    if call.rows_differ:
        slots = (slots + torch.tensor([[0], [1]], device=DEVICE)) % call.memories
    decay = draw(2, call.writes, call.heads, seed=8).sigmoid() if call.has_decay else None

    def scan(function: Callable) -> Callable:
        def run(*given: Tensor) -> list[Tensor]:
            named = {"memories": None, **dict(zip(inputs, given, strict=True))}
            wide = torch.promote_types(named["q"].dtype, torch.float32)
            for name, t in named.items():
                if name in "qk":
                    named[name] = ops.feature_map(t)
                elif name != "v" and t is not None:
                    named[name] = t.to(wide)
            faded = None if decay is None else decay.to(wide)
            found = function(**named, slots=slots, num_writes=call.writes, decay=faded)
            return [t for t in found if t is not None]

        return run

    check(precision, scan(ops.scan_memories), scan(ops.scan_memories_naive), list(inputs.values()))
    assert asked


@by_precision
@pytest.mark.parametrize(
    ("length", "width"), [(70, 65), *[on_gpu(*size) for size in ((200, 64), (257, 128), (257, 256), (130, 512))]]
)
def test_the_gated_delta_rule(length: int, width: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, whatever is installed; M is taken after the first 64 tokens, and the last chunk is not whole."""
    monkeypatch.setattr(ops.gated_delta, "uses_fla", lambda *_: False)
    monkeypatch.setattr(ops.gated_delta, "CHUNK_LENGTH", ops.gated_delta.GPU_CHUNK_LENGTH)  # in the interpreter

    def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, fading: Tensor, memory: Tensor) -> list[Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        rates = 2 * beta.to(wide).sigmoid(), -fading.to(wide).sigmoid()
        parts = q * width**-0.5, F.normalize(k, dim=-1), v, *rates
        if wide == torch.float64:
            _, kept = ops.gated_delta_rule_naive(*(t[:, :, :64] for t in parts), memory)
            return [ops.gated_delta_rule_naive(*parts, memory)[0], kept]
        return list(ops.gated_delta_rule(*parts, memory.to(wide), num_written=64))

    inputs = [draw(2, 3, length, *size, seed=seed) for seed, size in enumerate(([width], [width], [width], [], []))]
    check(precision, run, run, [*inputs, draw(2, 3, width, width, seed=5)])


@by_precision
@pytest.mark.parametrize(
    ("length", "width"), [(70, 65), *[on_gpu(*size) for size in ((64, 64), (257, 256), (130, 512))]]
)
def test_the_delta_rule_token_by_token(length: int, width: int, precision: str) -> None:
    """Three segments of which two are written, in one piece or more."""

    def scan(function: Callable) -> Callable:
        def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *memories: Tensor) -> list[Tensor]:
            wide = torch.promote_types(q.dtype, torch.float32)
            change, rest = (t.to(wide) for t in memories)
            decay = torch.full((2, 2, 2), 0.75, dtype=wide, device=DEVICE)
            rates = 2 * beta.to(wide).sigmoid()
            return list(function(q * width**-0.5, F.normalize(k, dim=-1), v, rates, change, rest, decay))

        return run

    tokens, sizes = (2, 3, 2, length), ([2, 3, length, 48], [2, 3, 2, length], [2, 2, width, 48], [2, width, 48])
    inputs = [draw(*tokens, width, seed=1), draw(*tokens, width, seed=2)]
    inputs += [draw(*size, seed=3 + seed) for seed, size in enumerate(sizes)]
    check(precision, scan(ops.scan_delta_rule), scan(ops.scan_delta_rule_naive), inputs)


@by_precision
@pytest.mark.parametrize(("rows", "words"), [(4, 301), on_gpu(700, 5003), on_gpu(2048, 50_304)])
def test_the_head_s_loss(rows: int, words: int, precision: str) -> None:
    targets = torch.arange(rows, device=DEVICE) * 7 % words
    targets[1::3] = -100

    def score(function: Callable) -> Callable:
        return lambda hidden, weight: [function(hidden, weight, targets, reduction="sum").unsqueeze(0)]

    inputs = [draw(rows, 64, seed=1), draw(words, 64, seed=2) / 8]
    check(precision, score(linear_cross_entropy), score(linear_cross_entropy_naive), inputs)


@by_precision
@pytest.mark.parametrize("writes", [True, False])
def test_logits_of_every_size(writes: bool, precision: str, asked: list[Tensor], monkeypatch: pytest.MonkeyPatch):
    """Two blocks of the vocabulary, and a row without a target, whatever its logits are."""
    logits = 5 * draw(4, 4500, seed=0, dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32)
    logits[1, :4100] = -torch.inf
    logits[2] = torch.nan
    targets = torch.tensor([4499, 4200, -1, 0], device=DEVICE)
    weights = torch.tensor([0.5, 2.0, 1.0, 0.0], device=DEVICE)
    mine, theirs = logits.clone(), logits.clone()
    losses = score_logits(mine, targets, weights, write_gradients=writes)
    assert asked
    monkeypatch.undo()
    monkeypatch.setattr(ops.kernels, "HAS_TRITON", False)
    torch.testing.assert_close(losses, score_logits(theirs, targets, weights, write_gradients=writes))
    assert losses[2:].tolist() == [0, 0]
    if writes:
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("use_delta_rule", [True, False])
@pytest.mark.parametrize("kind", [InfiniLayer, MultiMemoryLayer, HierarchicalLayer])
def test_a_layer_with_masked_tokens(kind, use_delta_rule, asked, monkeypatch):
    torch.manual_seed(0)
    options = {"use_delta_rule": use_delta_rule, "num_memory_heads": 2}
    if kind is InfiniLayer:
        options |= {"use_alibi": True, "num_memory_banks": 2, "segments_per_bank": 1}
    layer = kind(16, 2, 24, **options).to(DEVICE)
    hidden = draw(2, 5, 6, 16, seed=1, dtype=torch.float32).requires_grad_()
    valid = torch.ones(2, 5, 6, dtype=torch.bool, device=DEVICE)
    valid[0, 1] = valid[1, 2, 4:] = valid[1, 4] = False

    def run() -> list[Tensor]:
        out, memory = layer(hidden, None, Segments(valid))
        results = [out, memory.memories, memory.norms]
        loss = sum((draw(*t.shape, seed=90 + i) * t).sum() for i, t in enumerate(results))
        inputs = [hidden, *layer.parameters()]
        return [*results, *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)]

    actual = run()
    assert asked
    monkeypatch.undo()
    for mine, other in zip(actual, run(), strict=True):
        tolerance = 1e-3 * max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)


def test_kernels_are_for_gpus_and_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not ops.kernels.uses_triton(torch.zeros(1, dtype=torch.bfloat16))
    if ON_GPU:
        assert ops.kernels.uses_triton(torch.zeros(1, device=DEVICE, dtype=torch.bfloat16))
        assert not ops.kernels.uses_triton(torch.zeros(1, device=DEVICE))


@pytest.mark.parametrize(
    ("kind", "segment", "options"),
    [
        ("pythia", None, {}),
        ("infini", 4, {"memory_layers": (0,), "num_memory_heads": 2}),
        ("infini", 4, {"memory_layers": (0,), "num_memory_heads": 2, "use_delta_rule": False, "use_alibi": True}),
    ],
)
def test_a_token_of_a_plain_layer_is_three_launches_and_right(kind, segment, options, monkeypatch):
    """Rows at two places, over the end of a segment; sizes that are no multiples of a tile's."""
    monkeypatch.undo()
    torch.manual_seed(0)
    shape = PythiaConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=72
    )
    model = create_model(kind, shape, segment_length=segment, **options).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
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
        patch.setattr(ops.kernels, "uses_triton", lambda *_: True)
        weights = DecodingWeights(model, num_rows=2, packs=False)
    for t in range(3, 9):
        with weights.in_use():
            found = stream.read_token(ids[:, t : t + 1])
        torch.testing.assert_close(found, expected.feed_hidden(ids[:, t : t + 1]), atol=2e-5, rtol=2e-5)
        stream.count_token()
    assert launches == ["project", "attend" if kind == "pythia" else "recall", "merge"] * 6
