"""Layers with memory against the naive float64 reference, for every option combination."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_reference import ALIBI_SLOPES, REFERENCES
from model_cases import DTYPES, HIDDEN_SIZE, LAYER_CASES, TOLERANCES, LayerCase, assert_near, randomize, text_ids
from new_llm.models.layers import InfiniLayer, ReadTokens, Segments, compressive


def draw_hidden(*shape: int) -> Tensor:
    return torch.randn(*shape, HIDDEN_SIZE, generator=torch.Generator().manual_seed(5)).double()


@pytest.mark.parametrize("case", LAYER_CASES.values(), ids=LAYER_CASES)
def test_layer_and_its_gradients_equal_the_equations(case):
    """Seven segments of 3 tokens in one pass, then an odd piece of 2 that reads what they wrote."""
    layer = case.build().double()
    randomize(layer)
    x, ids, head = draw_hidden(2, 23), text_ids(2, 23), draw_hidden(128)
    outputs, memory = [], None
    for part, length in ((slice(0, 21), 3), (slice(21, 23), 2)):
        tokens = ReadTokens(ids[:, part].unflatten(1, (-1, length)), head)
        out, memory = layer(x[:, part].unflatten(1, (-1, length)), memory, Segments(tokens=tokens))
        outputs.append(out.flatten(1, 2))
    actual = torch.cat(outputs, dim=1)
    weights = dict(layer.named_parameters())
    with torch.autograd.graph.allow_mutation_on_saved_tensors():  # the equations write in place
        for row in range(2):
            reference = REFERENCES[case.kind](layer)
            reference.weights = {name.removeprefix("attention."): weight for name, weight in weights.items()}
            expected, end = reference.read_row(x[row], head[ids[row]], 3)
            assert_near(actual[row], expected, 1e-10)
            for name, value in end.items():
                found: Any = getattr(memory, name)[row].detach()
                if isinstance(value, Tensor) and value.is_floating_point():
                    assert_near(found, value.detach(), 1e-10 * max(1.0, float(found.abs().max())))
                else:
                    assert bool((found == value).all()), name
        found, wanted = (
            torch.autograd.grad(one.square().sum(), list(weights.values())) for one in (actual[1], expected)
        )
    for one, other in zip(found, wanted, strict=True):  # also by what earlier segments wrote
        assert_near(one, other, 1e-9 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_segment_runs_in_chunks(dtype, monkeypatch):
    """Beyond the length up to which local attention is one masked product."""
    monkeypatch.setattr(compressive, "CHUNK_LENGTH", 4)
    layer = LayerCase("infini", {"num_memory_heads": 2}).build()
    randomize(layer)
    x = draw_hidden(1, 11)
    expected, _ = REFERENCES["infini"](layer).read_row(x[0], x[0], 11)
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
