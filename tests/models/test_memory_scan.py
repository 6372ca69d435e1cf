"""The scan over segments against its naive form: outputs, gradients, groups, and what it keeps for backward."""

import functools
import itertools

import pytest
import torch
from torch import Tensor

from model_cases import TOLERANCES, assert_near, assert_same, draw
from new_llm.models.layers import InfiniLayer, Segments
from new_llm.models.ops import scan_memories, scan_memories_naive, scan_sums, scan_sums_naive
from new_llm.models.ops.memory_scan import choose_group

ROWS, HEADS, LENGTH, WIDTH, VALUE_WIDTH = 2, 2, 3, 4, 5


# Sums over segments


@pytest.mark.parametrize("number", [1, 2, 13])
@pytest.mark.parametrize("has_decay", [True, False])
def test_scanned_sums_equal_their_naive_form(number, has_decay):
    initial, changes = draw(2, 3, 4, seed=1), draw(2, number, 3, 4, seed=2)
    decay = draw(2, number, 3, 1, seed=3).sigmoid() if has_decay else None
    assert_near(scan_sums(initial, changes, decay), scan_sums_naive(initial, changes, decay), 1e-12)


def test_decay_to_nothing_is_no_division_and_gradients():
    """A scan by dividing through products of the decay would be 0 / 0 here."""
    initial, changes = draw(1, 2, seed=1), draw(1, 400, 2, seed=2)
    decay = torch.full((1, 400, 1), 1e-3, dtype=torch.float64)
    decay[:, 200] = 0
    assert_near(scan_sums(initial, changes, decay), scan_sums_naive(initial, changes, decay), 1e-12)
    parts = initial.requires_grad_(), changes[:, 197:203].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda first, rest: scan_sums(first, rest, decay[:, 197:203]), parts)


# Memories over segments


def draw_call(segments: int, memories: int, writes: int, **options: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors and slots. Options are those of `OPTIONS`; what is left out is not there."""
    tokens, written = (ROWS, segments, HEADS, LENGTH), (ROWS, writes, HEADS, LENGTH)
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
    """Outputs and gradients, all options together, in float64 and float32."""
    monkeypatch.setattr("new_llm.models.ops.memory_scan.choose_group", lambda *_: group)
    for options, dtype in zip(OPTIONS, itertools.cycle((torch.float64, torch.float64, torch.float32)), strict=False):
        if options["is_empty"] and shape[-1] == 0:
            continue  # nothing in, nothing written: a constant
        tensors, slots = draw_call(*shape, **options)

        def run(function, *given, names=tuple(tensors), slots=slots):
            named = dict(zip(names, given, strict=True))
            return function(**{"memories": None, **named}, slots=slots, num_writes=shape[-1])

        fast, naive = (functools.partial(run, function) for function in (scan_memories, scan_memories_naive))
        assert_same(fast, naive, [t.to(dtype) for t in tensors.values()], 10 * TOLERANCES[dtype])


# What backward keeps


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
