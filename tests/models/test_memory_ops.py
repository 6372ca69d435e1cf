"""Each op of a memory against its naive form, in 16 bits, over segments, and the delta rules token by token."""

import functools
import itertools
import sys
import types
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, library

from model_cases import DTYPES, TOLERANCES, assert_near, assert_same, draw
from new_llm.models import ops
from new_llm.models.layers import InfiniLayer, Segments
from new_llm.models.ops.memory import _WideSums
from new_llm.models.ops.memory_scan import _compiled_backward, choose_group, compiled_scan

EPSILON = 1e-6
ROWS, MEMORIES, HEADS, LENGTH, SCANNED, WIDTH, VALUE_WIDTH = 2, 3, 2, 5, 3, 4, 6
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_rule = pytest.mark.parametrize("use_delta_rule", [True, False])


def draw_features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return ops.feature_map(draw(*shape, seed=seed, dtype=dtype))


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


def test_feature_map_is_elu_plus_one():
    x = torch.linspace(-30, 30, 121, dtype=torch.float64)
    assert torch.equal(ops.feature_map(x), torch.where(x > 0, x + 1, x.exp()))
    assert bool((ops.feature_map(x.bfloat16()) > 0).all())  # ELU(x) + 1 in 16 bits rounds small features to 0


@by_dtype
@pytest.mark.parametrize("chunk_length", [1, 3, 64])
@pytest.mark.parametrize("length", [1, 7, 11])
def test_local_attention_equals_its_naive_form(length, chunk_length, dtype):
    """Whole, and gone on with from the sums of its first half."""
    options, cut = {"epsilon": EPSILON, "chunk_length": chunk_length}, length // 2

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        sums = k[..., :cut, :].mT @ v[..., :cut, :], k[..., :cut, :].sum(-2)
        parts = (t[..., cut:, :] for t in (q, k, v))
        return ops.local_linear_attention(q, k, v, **options), ops.local_linear_attention(
            *parts, initial_sums=sums, **options
        )

    def attend_naively(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = ops.local_linear_attention_naive(q, k, v, epsilon=EPSILON)
        return found, found[..., cut:, :]

    assert_same(attend, attend_naively, list(draw_segment(length, dtype)), 10 * TOLERANCES[dtype])


@by_dtype
@pytest.mark.parametrize("num_memories", [1, MEMORIES])
@pytest.mark.parametrize("weighted", [True, False])
def test_read_equals_its_naive_form(weighted, num_memories, dtype):
    memories, norms, _ = (t[:, -num_memories:] for t in draw_memories(dtype))
    inputs = [draw_segment(dtype=dtype)[0], memories, norms]
    inputs += [draw(ROWS, num_memories, HEADS, LENGTH, seed=6, dtype=dtype)] * weighted

    def run(read, q: Tensor, m: Tensor, z: Tensor, weights: Tensor | None = None) -> Tensor:
        return read(q, m, z, epsilon=EPSILON, weights=weights)

    fast, naive = (functools.partial(run, read) for read in (ops.read_memories, ops.read_memories_naive))
    assert_same(fast, naive, inputs, TOLERANCES[dtype])
    with pytest.raises(ValueError, match=r"width 3 .* width 4"):
        fast(draw_features(ROWS, HEADS, LENGTH, 3, dtype=dtype), *inputs[1:])


@pytest.mark.parametrize("standardize", [False, True])
@by_dtype
def test_selection_equals_its_naive_form(dtype, standardize):
    _, norms, num_tokens = draw_memories(dtype)
    q, _, _ = draw_segment(dtype=dtype)
    products, temperature = q @ norms.permute(0, 2, 3, 1), torch.tensor([0.5, 2.0], dtype=dtype)

    def run(weigh, products: Tensor, temperature: Tensor, counts: Tensor = num_tokens) -> Tensor:
        return weigh(products, counts, width=WIDTH, standardize=standardize, temperature=temperature)

    fast, naive = (functools.partial(run, weigh) for weigh in (ops.weigh_memories, ops.weigh_memories_naive))
    assert_same(fast, naive, [products, temperature], 10 * TOLERANCES[dtype])
    empty = 0 * products, temperature, 0 * num_tokens
    assert_near(fast(*empty), naive(*empty), TOLERANCES[dtype])


@pytest.mark.parametrize("decay", [None, [0.5, 0.9]])
@by_rule
@by_dtype
def test_write_equals_its_naive_form(dtype, use_delta_rule, decay):
    memories, norms, _ = draw_memories(dtype)
    _, k, v = draw_segment(dtype=dtype)
    w = None if decay is None else torch.tensor(decay, dtype=dtype)
    options = {"use_delta_rule": use_delta_rule, "epsilon": EPSILON, "decay": w}
    fast, naive = (functools.partial(write, **options) for write in (ops.write_memory, ops.write_memory_naive))
    for n in range(MEMORIES):
        given = [k, v, memories[:, n], norms[:, n]]
        before = [t.clone() for t in given]
        assert_same(fast, naive, given, TOLERANCES[dtype])
        fast(*given)
        assert all(map(torch.equal, given, before))


def test_the_default_write_rule_has_the_problems_that_mathematics_tells():
    k, v = draw_features(ROWS, HEADS, 1, WIDTH), draw(ROWS, HEADS, 1, VALUE_WIDTH, seed=1, dtype=torch.float64)
    memory, norm = k.new_zeros(ROWS, HEADS, WIDTH, VALUE_WIDTH), k.new_zeros(ROWS, HEADS, WIDTH)
    for share in (1, 0.5, 0.5, 0.5):  # what a pair that is written again and again reads as
        memory, norm = ops.write_memory(k, v, memory, norm, use_delta_rule=True, epsilon=EPSILON)
        read = ops.read_memories(k, memory.unsqueeze(1), norm.unsqueeze(1), epsilon=EPSILON)
        assert_near(read, share * v, TOLERANCES[torch.float64])
    memories, norms, _ = draw_memories()  # weighted by their z, several memories are one
    q, _, _ = draw_segment()
    scores = torch.einsum("bhsk,bnhk->bnhs", q, norms)
    selected = ops.read_memories(q, memories, norms, epsilon=EPSILON, weights=scores / scores.sum(1, keepdim=True))
    one = ops.read_memories(q, memories.sum(1, keepdim=True), norms.sum(1, keepdim=True), epsilon=EPSILON)
    assert_near(selected, one, TOLERANCES[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e7])
def test_read_in_16_bits_survives_a_huge_memory(dtype, size):
    """After 10 million tokens z and M are far beyond float16's 65,504; what is read is not."""
    memories, norms, num_tokens = draw_memories(torch.float32)
    q = draw_segment(dtype=torch.float32)[0]
    weights = ops.weigh_memories(q @ norms.permute(0, 2, 3, 1), num_tokens, width=WIDTH).movedim(-1, 1)
    expected = ops.read_memories(q, memories, norms, epsilon=EPSILON, weights=weights)
    actual = ops.read_memories(q.to(dtype), memories * size, norms * size, epsilon=EPSILON, weights=weights)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@by_rule
def test_write_in_16_bits_sums_in_float32(dtype, use_delta_rule):
    """3,000 tokens: a float16 sum would overflow, a bfloat16 sum would stop growing at 256."""
    k = torch.full((1, 1, 3000, 2), 30.0, dtype=dtype)
    v = torch.ones(1, 1, 3000, 2, dtype=dtype)
    memory, norm = ops.write_memory(
        k, v, torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2), use_delta_rule=use_delta_rule, epsilon=EPSILON
    )
    assert memory.dtype == norm.dtype == torch.float32
    torch.testing.assert_close(memory, torch.full_like(memory, 90000.0))
    torch.testing.assert_close(norm, torch.full_like(norm, 90000.0))


def test_the_wide_product_of_bfloat16_has_the_gradients_of_its_equation():
    """Only a GPU multiplies like that; the gradients are the same everywhere."""
    k, v = (draw(2, 5, width, seed=width, dtype=torch.bfloat16) for width in (3, 4))
    assert_same(_WideSums.apply, lambda k, v: k.mT @ v, [k, v], 1e-2, exact=[k.double(), v.double()])


def test_scanned_sums_equal_their_naive_form_and_decay_to_nothing_is_no_division():
    """A scan by dividing through products of the decay would be 0 / 0 here."""
    initial, changes = draw(1, 2, seed=1), draw(1, 400, 2, seed=2)
    decay = torch.full((1, 400, 1), 1e-3, dtype=torch.float64)
    decay[:, 200] = 0
    for factors in (None, decay, draw(1, 400, 1, seed=3).sigmoid()):
        assert_near(ops.scan_sums(initial, changes, factors), ops.scan_sums_naive(initial, changes, factors), 1e-12)
    parts = initial.requires_grad_(), changes[:, 197:203].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda first, rest: ops.scan_sums(first, rest, decay[:, 197:203]), parts)


def draw_call(segments: int, memories: int, writes: int, **options: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors and slots. Options are those of `OPTIONS`; what is left out is not there."""
    tokens, written = (ROWS, segments, HEADS, SCANNED), (ROWS, writes, HEADS, SCANNED)
    tensors = {
        "q": draw(*tokens, WIDTH, seed=1),
        "k": draw(*tokens, WIDTH, seed=2),
        "v": draw(*tokens, VALUE_WIDTH, seed=3),
        "read_scales": draw(*tokens, memories, seed=4),
    }
    if not options["is_empty"]:
        tensors["memories"] = draw(ROWS, memories, HEADS, WIDTH, VALUE_WIDTH, seed=5)
    if options["has_delta"]:
        tensors["delta_scales"] = draw(*written, seed=6) / 9
    if options["has_sum"]:
        tensors |= {"sum_scales": draw(*tokens, seed=7), "written_keys": draw(*written, WIDTH, seed=9)}
    if options["has_decay"]:
        tensors["decay"] = draw(ROWS, writes, HEADS, seed=8).sigmoid()
    slots = torch.arange(writes) % memories + torch.zeros(ROWS, 1, dtype=torch.int64)
    return tensors, (slots + options["rows_differ"] * torch.arange(ROWS).unsqueeze(1)) % memories


SHAPES = {
    "1 of 1, unwritten": (1, 1, 0),
    "1 of 1": (1, 1, 1),
    "7 of 1": (7, 1, 7),
    "7 of 1, last unwritten": (7, 1, 6),
    "6 of 3": (6, 3, 6),
    "5 of 2, last unwritten": (5, 2, 4),
}
OPTIONS = [
    dict(zip(("has_delta", "has_decay", "has_sum", "is_empty", "rows_differ"), values, strict=True))
    for values in itertools.product((True, False), repeat=5)
]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("group", [1, 2, 99])
def test_scan_equals_its_naive_form(monkeypatch, shape, group):
    """Outputs and gradients, all options together, in float64, float32 and, against float64, in bfloat16."""
    monkeypatch.setattr("new_llm.models.ops.memory_scan.choose_group", lambda *_: group)
    dtypes = itertools.cycle((torch.float64, torch.float32, torch.float64, torch.bfloat16, torch.float64))
    for options, dtype in zip(OPTIONS, dtypes, strict=False):
        if options["is_empty"] and shape[-1] == 0:
            continue  # nothing in, nothing written: a constant
        tensors, slots = draw_call(*shape, **options)

        def run(function, *given, names=tuple(tensors), slots=slots):
            named = dict(zip(names, given, strict=True))
            return function(**{"memories": None, **named}, slots=slots, num_writes=shape[-1])

        fast, naive = (functools.partial(run, function) for function in (ops.scan_memories, ops.scan_memories_naive))
        is_narrow, wide = dtype == torch.bfloat16, torch.promote_types(dtype, torch.float32)
        inputs = [t.to(dtype if name in ("q", "k", "v", "written_keys") else wide) for name, t in tensors.items()]
        exact = [t.double() for t in inputs] if is_narrow else None
        assert_same(fast, naive, inputs, 0.02 if is_narrow else 10 * TOLERANCES[dtype], exact=exact)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES.values() if shape[-1]], ids=str)
def test_torch_compile_is_told_what_the_scan_and_its_backward_return(shape):
    """No result is another one or an argument, and each has the form that was promised."""
    for options in OPTIONS:
        tensors, slots = draw_call(*shape, **options)
        given = {"memories": None} | {name: t.float() for name, t in tensors.items()}
        rest = [given.get(name) for name in ("sum_scales", "delta_scales", "decay", "written_keys")]
        q, k, v, memories, scales = (given[name] for name in ("q", "k", "v", "memories", "read_scales"))
        for learns in (False, True):
            arguments = (q, k, v, memories, scales, slots, *rest, shape[-1], learns)
            library.opcheck(compiled_scan, arguments, test_utils=("test_schema", "test_faketensor"))
        reads, sums, end, checkpoints, updates = compiled_scan(*arguments)
        upstream = reads, sums if options["has_sum"] else None, end
        kept = q, k, updates if options["has_delta"] else v, memories, scales, slots, *rest, checkpoints, shape[-1]
        library.opcheck(_compiled_backward, (*upstream, *kept), test_utils=("test_schema", "test_faketensor"))


def count_kept_bytes(num_segments: int, width: int) -> int:
    """Bytes that autograd keeps of one layer's scan over segments of 2 tokens, beyond its inputs' own size."""
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return t

    layer = InfiniLayer(width, 1, width)
    hidden = torch.randn(1, num_segments, 2, width)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(hidden, None, Segments(write_last=False))
    return sum(sizes.values())


def test_states_are_kept_once_a_group():
    """16 and 64 segments keep 3 and 7 states between groups, not 16 and 64."""
    width = 512
    state = width * width * 4
    # in n, linear parts (activations) cancel out of a − 4 b; states would add nothing linear but √n
    few, many = count_kept_bytes(16, width), count_kept_bytes(64, width)
    assert many - few < 8 * state + (64 - 16) * 2 * width * 4 * 40
    q = torch.empty(1, 64, 1, 1, 2**14, device="meta")
    assert choose_group(q, 1, 2**14) == 8
    assert choose_group(q[:, :1], 1, 2**14) == 1
    assert choose_group(q[..., :2], 4, 32) >= 64


# The delta rules in pieces against the rules token by token, and flash-linear-attention's kernel


def draw_scan(rows: int, segments: int, writes: int, heads: int, length: int, width: int, size: int) -> list[Tensor]:
    shape = (rows, segments, heads, length)
    q, k = (F.normalize(draw(*shape, width, seed=seed), dim=-1) for seed in (0, 1))
    v, beta = draw(rows, segments, length, size, seed=2), 2 * draw(*shape, seed=3).sigmoid()
    memory, rest = draw(rows, heads, width, size, seed=4), draw(heads, width, size, seed=8)
    return [q, k, v, beta, memory, rest, draw(rows, writes, heads, seed=9).sigmoid()]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 7), st.integers(1, 3), st.data())
def test_a_segment_at_a_time_equals_a_token_at_a_time(rows, segments, length, heads, data):
    """Reads, M and all gradients, with some keys 0, in pieces of at most 3 tokens or in one."""
    inputs = draw_scan(rows, segments, data.draw(st.integers(0, segments)), heads, length, 4, 5)
    inputs[1][..., data.draw(st.integers(0, length - 1)), :] = 0
    with patch.object(ops.delta_rule, "PIECE_LENGTH", data.draw(st.sampled_from((3, 64)))):
        assert_same(ops.scan_delta_rule, ops.scan_delta_rule_naive, inputs, 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize(("length", "width"), [(64, 32), (130, 20)])
def test_the_compiled_kernels_equal_the_rule(dtype: torch.dtype, tolerance: float, length: int, width: int) -> None:
    """Where there are none, the PyTorch form in these dtypes; some β are 0."""
    parts = draw_scan(2, 3, 2, 2, length, width, 24)
    parts[3][..., ::7] = 0
    mine = [t.to(dtype if place < 3 else torch.float32) for place, t in enumerate(parts)]
    assert_same(ops.scan_delta_rule, ops.scan_delta_rule_naive, mine, tolerance, exact=[t.double() for t in mine])


@pytest.mark.parametrize("narrow", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_of_given_lengths(narrow: torch.dtype) -> None:
    wide = torch.promote_types(narrow, torch.float32)
    parts = [draw(3, 5, 40).to(narrow), draw(3, 5, seed=1).to(wide)]

    def scale(x: Tensor, lengths: Tensor) -> Tensor:
        return lengths.unsqueeze(-1) * F.normalize(x, dim=-1)

    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.01}[narrow]
    exact = [t.double() for t in parts]
    assert_same(lambda *given: ops.scale_to_length(*given, dtype=wide), scale, parts, tolerance, exact=exact)
    assert not ops.scale_to_length(torch.zeros(2, 40), torch.ones(2)).any()


def draw_rule(num_tokens: int, width: int = 8) -> list[Tensor]:
    """q, k, v, β, log α and M of 2 rows and 3 heads; β up to 2, where unit keys turn what is held around."""
    q, k, v = (draw(2, 3, num_tokens, width, seed=seed) for seed in (1, 2, 3))
    beta, fading = (draw(2, 3, num_tokens, seed=seed).sigmoid() for seed in (4, 5))
    return [q, F.normalize(k, dim=-1), v, 2 * beta, -4 * fading, draw(2, 3, width, width, seed=6)]


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 8), (torch.float32, 8), (torch.float32, 40)], ids=str)
@pytest.mark.parametrize(("num_tokens", "num_written"), [(1, 1), (5, 3), (32, 0), (37, None), (96, 64), (100, 50)])
def test_chunks_equal_the_rule_with_all_gradients(
    num_tokens: int, num_written: int | None, dtype: torch.dtype, width: int
) -> None:
    def run(*parts: Tensor) -> tuple[Tensor, Tensor]:
        begun = [t[:, :, :num_written] for t in parts[:5]]
        kept = parts[5] if num_written == 0 else ops.gated_delta_rule_naive(*begun, parts[5])[1]
        return ops.gated_delta_rule_naive(*parts)[0], kept

    parts = draw_rule(num_tokens, width)
    narrow, tolerance = [t.to(dtype) for t in parts], 1e-12 if dtype == torch.float64 else 1e-5
    assert_same(
        lambda *given: ops.gated_delta_rule(*given, num_written=num_written), run, narrow, tolerance, exact=parts
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not ops.gated_delta.HAS_FLA, reason="needs a GPU and fla")
def test_the_kernel_of_flash_linear_attention_equals_the_rule() -> None:
    parts = [t.detach().cuda().float() for t in draw_rule(100, 32)]
    narrow = [t.bfloat16() for t in parts[:3]]
    for num_written in (None, 64):
        found = ops.gated_delta_rule(*narrow, *parts[3:], num_written=num_written)
        expected = ops.gated_delta_rule(*(t.float() for t in narrow), *parts[3:], num_written=num_written)
        for one, other in zip(found, expected, strict=True):
            assert (one.float() - other).norm() < 0.02 * other.norm()


def test_the_kernel_is_called_with_the_layout_that_it_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with fla's signature: q, k [B, T, H, K], v [B, T, H, V], log α and β [B, T, H], M [B, H, K, V]."""

    def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
        assert q.dtype == k.dtype == v.dtype
        assert output_final_state
        scale = k.shape[-1] ** -0.5 if scale is None else scale
        parts = (t.transpose(1, 2) for t in (scale * q, k, v, beta, g))
        reads, memory = ops.gated_delta_rule_naive(*parts, initial_state)
        return reads.transpose(1, 2), memory

    kernel = types.SimpleNamespace(chunk_gated_delta_rule=chunk_gated_delta_rule)
    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, kernel if name.endswith("rule") else types.ModuleType(name))
    parts = [t.detach() for t in draw_rule(6)]
    assert_near(ops.gated_delta._run_fla(*parts), ops.gated_delta_rule_naive(*parts), 1e-12)
