"""The kernels on a GPU against float64: outputs and gradients, poisoned memory, and two runs bit for bit.

`pytest -m gpu` on a machine with one; elsewhere all are skipped. The smallest cases run in Triton's interpreter too:
`TRITON_INTERPRET=1 pytest -m gpu`.
"""

import os
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU here"),
]

from new_llm.models.ops import (  # noqa: E402
    feature_map,
    gated_delta,
    gated_delta_rule,
    gated_delta_rule_naive,
    kernels,
    local_linear_attention,
    local_linear_attention_naive,
    scan_delta_rule,
    scan_delta_rule_naive,
    scan_memories,
    scan_memories_naive,
)
from new_llm.models.ops.head_loss import linear_cross_entropy, linear_cross_entropy_naive  # noqa: E402

EPSILON = 1e-6
NEAR = {"bfloat16": 0.03, "float32": 1e-4, "tf32": 5e-3}
"""How far numbers may be from float64's, relative to the greatest or to 0.3 (gradients that cancel out)."""
SMALL = {(1, 64), (70, 65)}
"""The lengths and widths that the interpreter runs."""
SHAPES = [
    pytest.param(length, width, id=f"S{length}-K{width}")
    for length, width in product((1, 17, 64, 257, 2048), (64, 72, 128, 200, 256, 512, 1024, 2048))
    if length * width <= 2**20 and (length in (257, 2048) or width in (64, 200, 512))
] + [pytest.param(70, 65, id="S70-K65"), pytest.param(2048, 1024, id="S2048-K1024")]
by_precision = pytest.mark.parametrize("precision", NEAR)
by_shape = pytest.mark.parametrize(("length", "width"), SHAPES)


@pytest.fixture(autouse=True)
def poisoned_memory(precision: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty gives NaN under deterministic algorithms; products of float32 are float32's or tf32's."""
    if INTERPRETED:
        monkeypatch.setattr(kernels, "uses_triton", lambda t, dtypes=(torch.bfloat16,): t.dtype in dtypes)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def skip_what_is_slow(length: int, width: int) -> None:
    if INTERPRETED and (length, width) not in SMALL:
        pytest.skip("too slow in the interpreter")


def check(precision: str, run: Callable, expected_of: Callable, inputs: list[Tensor]) -> None:
    """Outputs and gradients of `run` in a precision: near `expected_of` in float64, and the same again."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32

    def differentiate(function: Callable, dtype: torch.dtype) -> list[Tensor]:
        cast = [t.to(dtype).to(t.dtype if dtype == torch.float64 else dtype).requires_grad_() for t in inputs]
        outputs = function(*cast)
        loss = sum((draw(*out.shape, seed=90 + i) * out).sum() for i, out in enumerate(outputs))
        assert isinstance(loss, Tensor)
        return [*(out.detach() for out in outputs), *torch.autograd.grad(loss, cast)]

    inputs = [t.to(dtype).double() for t in inputs]  # so that both begin from the same numbers
    actual, again = differentiate(run, dtype), differentiate(run, dtype)
    for number, (mine, same, exact) in enumerate(
        zip(actual, again, differentiate(expected_of, torch.float64), strict=True)
    ):
        assert torch.equal(mine, same), f"result {number} differs from run to run"
        error = float((mine.double() - exact).abs().max() / exact.abs().max().clamp_min(0.3))
        assert error < NEAR[precision], f"result {number}: {error:.2g}"


@by_precision
@by_shape
def test_local_attention(length: int, width: int, precision: str) -> None:
    skip_what_is_slow(length, width)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [local_linear_attention(feature_map(q), feature_map(k), v, epsilon=EPSILON, chunk_length=4096)]

    def attend_exactly(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        scores = (feature_map(q) @ feature_map(k).transpose(-1, -2)).tril()
        return [scores @ v / scores.sum(-1, keepdim=True).clamp_min(EPSILON)]

    check(precision, attend, attend_exactly, [draw(2, 3, length, width, seed=seed) for seed in (1, 2, 3)])


@pytest.mark.parametrize("precision", ["bfloat16"])
def test_local_attention_of_more_groups_than_an_axis_of_a_grid_holds(precision: str) -> None:
    if INTERPRETED:
        pytest.skip("too slow in the interpreter")

    def attend(function: Callable, **options: int) -> Callable:
        return lambda q, k, v: [function(feature_map(q), feature_map(k), v, epsilon=EPSILON, **options)]

    naive = attend(local_linear_attention_naive)
    inputs = [draw(70_000, 1, 3, 16, seed=seed) for seed in (1, 2, 3)]
    check(precision, attend(local_linear_attention, chunk_length=64), naive, inputs)


@by_precision
@pytest.mark.parametrize(("heads", "memories"), [(1, 1), (8, 1), (2, 3)])
@by_shape
def test_memories(length: int, width: int, heads: int, memories: int, precision: str) -> None:
    """Four segments with the delta rule, decay, and memories that are written in turn."""
    skip_what_is_slow(length, width)
    if heads * memories > 1 and length * width > 2**18:
        pytest.skip("the same tiles as fewer heads")
    tokens, segments = (2, 4, heads, length), 4
    slots = (torch.arange(segments, device=DEVICE) % memories).expand(2, segments)
    decay = draw(2, segments, heads, seed=8).sigmoid()

    def scan(function: Callable) -> Callable:
        def run(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
            wide = torch.promote_types(q.dtype, torch.float32)
            q, k = feature_map(q), feature_map(k)
            read_scales = torch.full((*tokens, memories), 1 / width, dtype=wide, device=DEVICE)
            delta_scales = torch.full(tokens, 1 / (4 * length * width), dtype=wide, device=DEVICE)
            start = draw(2, memories, heads, width, width, seed=4).to(wide)
            options = {"num_writes": segments, "delta_scales": delta_scales, "decay": decay.to(wide)}
            out = function(q, k, v, start, read_scales, slots, **options)
            return [out.reads, out.memories]

        return run

    inputs = [draw(*tokens, width, seed=seed) for seed in (1, 2, 3)]
    check(precision, scan(scan_memories), scan(scan_memories_naive), inputs)


@by_precision
@pytest.mark.parametrize(("length", "width"), [(70, 65), (200, 64), (257, 128), (257, 256), (130, 512)])
def test_the_gated_delta_rule(length: int, width: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, whatever is installed; M is taken after the first 64 tokens, and the last chunk is not whole."""
    skip_what_is_slow(length, width)
    monkeypatch.setattr(gated_delta, "uses_fla", lambda *_: False)
    monkeypatch.setattr(gated_delta, "CHUNK_LENGTH", gated_delta.GPU_CHUNK_LENGTH)  # in the interpreter

    def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, fading: Tensor, memory: Tensor) -> list[Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        rates = 2 * beta.to(wide).sigmoid(), -fading.to(wide).sigmoid()
        parts = q * width**-0.5, F.normalize(k, dim=-1), v, *rates
        if wide == torch.float64:
            _, kept = gated_delta_rule_naive(*(t[:, :, :64] for t in parts), memory)
            return [gated_delta_rule_naive(*parts, memory)[0], kept]
        return list(gated_delta_rule(*parts, memory.to(wide), num_written=64))

    inputs = [draw(2, 3, length, *size, seed=seed) for seed, size in enumerate(([width], [width], [width], [], []))]
    check(precision, run, run, [*inputs, draw(2, 3, width, width, seed=5)])


@by_precision
@pytest.mark.parametrize(("length", "width"), [(70, 65), (64, 64), (257, 256), (130, 512)])
def test_the_delta_rule_token_by_token(length: int, width: int, precision: str) -> None:
    """Three segments of which two are written, in one piece or more."""
    skip_what_is_slow(length, width)

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
    check(precision, scan(scan_delta_rule), scan(scan_delta_rule_naive), inputs)


@by_precision
@pytest.mark.parametrize(("rows", "words"), [(4, 301), (700, 5003), (2048, 50_304)])
def test_the_head_s_loss(rows: int, words: int, precision: str) -> None:
    if INTERPRETED and rows > 4:
        pytest.skip("too slow in the interpreter")
    targets = torch.arange(rows, device=DEVICE) * 7 % words
    targets[1::3] = -100

    def score(function: Callable) -> Callable:
        return lambda hidden, weight: [function(hidden, weight, targets, reduction="sum").unsqueeze(0)]

    inputs = [draw(rows, 64, seed=1), draw(words, 64, seed=2) / 8]
    check(precision, score(linear_cross_entropy), score(linear_cross_entropy_naive), inputs)
