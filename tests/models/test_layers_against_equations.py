"""Whole layers and models of them against the naive float64 reference, for every option combination."""

import math

import pytest
import torch
from torch import Tensor

from memory_reference import ALIBI_SLOPES, ReferenceLayer, ReferenceMemory
from model_cases import (
    DTYPES,
    HIDDEN_SIZE,
    MEMORY_CASES,
    NUM_HEADS,
    TOLERANCES,
    LayerCase,
    assert_near,
    randomize,
)
from new_llm.models.layers import InfiniLayer, Layer, compressive
from new_llm.models.state import MemoryState

ROWS = 2
by_case = pytest.mark.parametrize("case", MEMORY_CASES.values(), ids=MEMORY_CASES)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make_reference(layer: Layer, case: LayerCase) -> ReferenceLayer:
    return ReferenceLayer(layer, case.kind, HIDDEN_SIZE, NUM_HEADS, case.options)


def draw_hidden(*shape: int) -> Tensor:
    return torch.randn(*shape, HIDDEN_SIZE, generator=torch.Generator().manual_seed(5)).double()


def assert_memories_near(state: MemoryState | None, references: list[ReferenceMemory], tolerance: float) -> None:
    assert state is not None
    for row, reference in enumerate(references):
        for actual, expected in ((state.memories[row], reference.M), (state.norms[row], reference.z)):
            assert_near(actual.double(), expected, tolerance * max(1.0, float(expected.abs().max())))
        assert torch.equal(state.num_tokens[row], reference.tokens)
        assert int(state.num_segments[row]) == reference.segments


@by_case
def test_layer_equals_its_equations(case):
    """Seven segments of 3 tokens in one pass, then an odd piece of 2 that reads what they wrote."""
    layer = case.build().double()
    randomize(layer)
    x, length, tail = draw_hidden(ROWS, 7 * 3 + 2), 3, 2
    reference = make_reference(layer, case)
    with torch.no_grad():
        whole, memory = layer(x[:, :-tail].unflatten(1, (-1, length)))
        last, memory = layer(x[:, None, -tail:], memory)
    actual = torch.cat((whole.flatten(1, 2), last[:, 0]), dim=1)
    rows = [reference.read_row(x[row], reference.empty_memory(), length) for row in range(ROWS)]
    expected = torch.stack([output for output, _ in rows])
    assert_near(actual, expected, 1e-10)
    assert_memories_near(memory, [memory for _, memory in rows], 1e-10)


@by_dtype
def test_a_long_segment_runs_in_chunks(dtype, monkeypatch):
    """Beyond the length up to which local attention is one masked product."""
    monkeypatch.setattr(compressive, "CHUNK_LENGTH", 4)
    case = LayerCase("infini", {"num_memory_heads": 2})
    layer = case.build()
    randomize(layer)
    x = draw_hidden(1, 11)
    reference = make_reference(layer, case)
    expected, _ = reference.read_row(x[0], reference.empty_memory(), 11)
    with torch.no_grad():
        actual, _ = layer.to(dtype)(x[:, None].to(dtype))
    assert_near(actual[0, 0], expected.to(dtype), TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        *ALIBI_SLOPES.items(),
        (8, [2.0**-i for i in range(1, 9)]),
        # No power of 2: the slopes of the next lower one, then every second of the next higher one.
        (3, [2**-4, 2**-8, 2**-2]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
    ],
)
def test_decay_of_each_head_follows_alibi(heads, slopes):
    layer = InfiniLayer(48, 4, 24, num_memory_heads=heads, use_alibi=True, alibi_scale=2.0)
    assert layer.attention.decay == pytest.approx([math.exp(-2.0 * slope) for slope in slopes], rel=1e-12)
