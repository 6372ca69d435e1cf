"""Small models of every layer kind and option combination, all parameters random, and real text to read."""

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from new_llm.models import SelectiveOutputLM, TransformerLM
from new_llm.models.layers import LAYER_KINDS, Layer

VOCAB_SIZE = 128
HIDDEN_SIZE = 16
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}
STREAM_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}
DTYPES = tuple(TOLERANCES)

# Abraham Lincoln's address at Gettysburg, 1863; in the public domain.
TEXT = (
    "Four score and seven years ago our fathers brought forth, on this continent, a new nation, "
    "conceived in Liberty, and dedicated to the proposition that all men are created equal. Now we are "
    "engaged in a great civil war, testing whether that nation, or any nation so conceived and so "
    "dedicated, can long endure. We are met on a great battle-field of that war. We have come to "
    "dedicate a portion of that field, as a final resting place for those who here gave their lives that "
    "that nation might live. It is altogether fitting and proper that we should do this. "
)


@dataclass(frozen=True)
class LayerCase:
    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, hidden_size: int = HIDDEN_SIZE, num_heads: int = 2) -> Layer:
        shape = (hidden_size,) if self.kind == "token_memory" else (hidden_size, num_heads, 24)
        return LAYER_KINDS[self.kind](*shape, **self.options)


UNIT_KEYS = {"key_features": "unit", "use_normalizer": False}
TOKEN_RULE = {"use_token_strength": True, "use_token_decay": True}
MEMORY_CASES = {
    "infini": LayerCase("infini"),
    "infini-sum": LayerCase("infini", {"use_delta_rule": False, "num_memory_heads": 4}),
    "infini-alibi": LayerCase("infini", {"use_alibi": True, "alibi_scale": 1.5, "num_memory_heads": 4}),
    "infini-sum-alibi": LayerCase("infini", {"use_delta_rule": False, "use_alibi": True, "use_key_shift": True}),
    "infini-banks": LayerCase("infini", {"num_memory_banks": 3, "segments_per_bank": 2, "num_memory_heads": 4}),
    "infini-sum-banks": LayerCase("infini", {"use_delta_rule": False, "num_memory_banks": 2, "segments_per_bank": 1}),
    "infini-features": LayerCase("infini", {"normalize_keys": True, "use_key_shift": True, "num_memory_banks": 2}),
    "multi_memory": LayerCase("multi_memory", {"num_memories": 3}),
    "multi_memory-sum": LayerCase("multi_memory", {"use_delta_rule": False, "num_memory_heads": 4}),
    "multi_memory-one": LayerCase("multi_memory", {"num_memories": 1, "num_memory_heads": 1, "use_key_shift": True}),
    "multi_memory-features": LayerCase("multi_memory", {"normalize_keys": True, "selection_temperature": 0.25}),
    "multi_memory-standardized": LayerCase("multi_memory", {"router": "standardized", "num_memories": 3}),
    "multi_memory-top1": LayerCase("multi_memory", {"router": "top1", "num_memories": 2, "use_key_shift": True}),
    "multi_memory-top1-sum": LayerCase("multi_memory", {"router": "top1", "num_memories": 3, "use_delta_rule": False}),
    "hierarchical": LayerCase("hierarchical", {"num_memories": 3}),
    "hierarchical-sum": LayerCase("hierarchical", {"use_delta_rule": False, "use_key_shift": True}),
    "hierarchical-one": LayerCase("hierarchical", {"num_memories": 1, "num_memory_heads": 4}),
    "hierarchical-fenwick": LayerCase("hierarchical", {"hierarchy": "fenwick", "num_memories": 3}),
    "hierarchical-fenwick-sum": LayerCase("hierarchical", {"hierarchy": "fenwick", "use_delta_rule": False}),
    "hierarchical-features": LayerCase("hierarchical", {"normalize_keys": True, "router": "standardized"}),
    "infini-softmax": LayerCase(
        "infini", {"local_attention": "softmax", "num_memory_heads": 2, "use_token_gate": True}
    ),
    "infini-delta": LayerCase("infini", {**UNIT_KEYS, **TOKEN_RULE, "num_memory_heads": 2, "convolution_size": 3}),
    "infini-rule-banks": LayerCase(
        "infini",
        {"use_normalizer": False, "use_alibi": True, "num_memory_banks": 2, "segments_per_bank": 1}
        | TOKEN_RULE
        | {"key_features": "softmax", "use_key_shift": True, "num_memory_heads": 2},
    ),
    "multi_memory-rule": LayerCase(
        "multi_memory", {**TOKEN_RULE, "local_attention": "softmax", "use_key_shift": True, "num_memories": 2}
    ),
    "hierarchical-unit": LayerCase(
        "hierarchical", {**UNIT_KEYS, "use_token_decay": True, "use_delta_rule": False, "num_memories": 2}
    ),
}
"""Every option of every compressive layer, with each other option where they meet in the code."""
LAYER_CASES = {
    **MEMORY_CASES,
    "token_memory": LayerCase("token_memory", {"num_memory_heads": 3, "memory_key_size": 4}),
    "token_memory-sum": LayerCase("token_memory", {"num_memory_heads": 2, "use_delta_rule": False}),
    "gated_delta": LayerCase("gated_delta"),
    "gated_delta-plain": LayerCase(
        "gated_delta", {"num_memory_heads": 4, "convolution_size": 0, "use_output_gate": False}
    ),
    "gated_delta-elu": LayerCase("gated_delta", {"key_features": "elu", "use_token_decay": False}),
    "gated_delta-softmax": LayerCase("gated_delta", {"key_features": "softmax", "convolution_size": 2}),
    **{
        f"transformer_xl-{n}": LayerCase(
            "transformer_xl", {"memory_tokens": n, "rotary_pct": 0.5, "detach_memory": False}
        )
        for n in (2, 3, 7)
    },
    **{f"rmt-{n}": LayerCase("rmt", {"num_layers": 2, "num_memory_tokens": n}) for n in (1, 3)},
}
"""Those, and every other layer with memory that has equations of its own."""
_PYTHIA = LayerCase("pythia")
_BANKS = LayerCase("infini", {"num_memory_heads": 4, "num_memory_banks": 2, "segments_per_bank": 1})
MIXED_STACKS = {
    "mixed": [
        _BANKS,
        _PYTHIA,
        LayerCase("multi_memory", {"num_memories": 2}),
        LayerCase("hierarchical", {"num_memories": 3}),
    ],
    "pythia-first": [_PYTHIA, LayerCase("hierarchical"), LayerCase("infini", {"use_alibi": True})],
    "parallel": [
        LayerCase("parallel_infini", {"num_memory_heads": 4, "num_memory_banks": 2, "segments_per_bank": 1}),
        _PYTHIA,
        LayerCase("parallel_infini", {"use_delta_rule": False, "use_alibi": True, "use_key_shift": True}),
    ],
    "mixed-sums": [
        LayerCase("infini", {**_BANKS.options, "use_delta_rule": False}),
        LayerCase("multi_memory", {"num_memories": 2, "use_delta_rule": False}),
        _PYTHIA,
        LayerCase("hierarchical", {"num_memories": 2, "use_delta_rule": False}),
    ],
    "mixed-shifted": [
        LayerCase("infini", {"use_key_shift": True}),
        _PYTHIA,
        LayerCase("multi_memory", {"num_memories": 2, "use_key_shift": True, "use_delta_rule": False}),
    ],
    "tokens": [_PYTHIA, LayerCase("token_memory", {"num_memory_heads": 2})],
    "infini-tokens": [LayerCase("infini", {"use_key_shift": True}), _PYTHIA, LayerCase("token_memory")],
}
MEMORY_STACKS = {**{name: [case, _PYTHIA] for name, case in MEMORY_CASES.items()}, **MIXED_STACKS}
STACKS = {"pythia": [_PYTHIA, _PYTHIA], **MEMORY_STACKS}
"""Models to test: each option set below a Pythia layer, plain Pythia, and mixtures."""


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter a random value: a gate, bias or bank weight left at 0 would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() <= 1 or name.endswith("bank_weights"):
                is_norm_weight = "norm" in name and name.endswith("weight")
                noise = 1 + 0.2 * noise if is_norm_weight else 0.7 * noise
            elif "embed_in" not in name:
                noise = noise / math.sqrt(parameter.shape[1])
            parameter.copy_(noise)


def build_model(layers, *, segment_length=5, dtype=torch.float64, seed=0) -> TransformerLM:
    """A model with random parameters, exactly representable in float32 so that precisions can be compared."""
    model = TransformerLM([case.build() for case in layers], VOCAB_SIZE, segment_length)
    randomize(model, seed)
    return model.to(dtype)


def build_selective(stack: str, skip_interval: int, segment_length: int = 5, **options: Any) -> SelectiveOutputLM:
    """The layers of `STACKS` run several times, as `build_model` makes them."""
    layers = [case.build() for case in STACKS[stack]]
    model = SelectiveOutputLM(layers, VOCAB_SIZE, segment_length, skip_interval=skip_interval, **options)
    randomize(model)
    return model.double().eval()


@functools.cache
def _cached_model(name: str, dtype: torch.dtype) -> TransformerLM:
    return build_model(STACKS[name], dtype=dtype)


def get_model(name: str, *, segment_length: int = 5, dtype: torch.dtype = torch.float64) -> TransformerLM:
    """A model of `STACKS` with one empty shared memory; leave its parameters and banks as they are."""
    model = _cached_model(name, dtype)
    model.segment_length = segment_length
    model.reset_memory()
    return model


def text_ids(rows: int, length: int, start: int = 0) -> Tensor:
    """[rows, length] bytes of the text; each row begins elsewhere."""
    data = TEXT.encode()
    begins = [start + 101 * row for row in range(rows)]
    return torch.tensor([[data[(begin + t) % len(data)] for t in range(length)] for begin in begins])


def assert_near(actual: Any, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_same(fast, naive, inputs: list[Tensor], tolerance: float, exact: list[Tensor] | None = None) -> None:
    """Results and all gradients of two functions are near; `exact` are wider inputs of the naive one."""
    sides = []
    for function, given in ((fast, inputs), (naive, exact or inputs)):
        leaves = [t.detach().clone().requires_grad_() for t in given]
        outputs = function(*leaves)
        outputs = [t for t in ([outputs] if isinstance(outputs, Tensor) else outputs) if t is not None]
        upstream = [draw(*t.shape, seed=20 + place, dtype=t.dtype) for place, t in enumerate(outputs)]
        gradients = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True, materialize_grads=True)
        sides.append([t.detach() for t in (*outputs, *gradients)])
    for one, other in zip(*sides, strict=True):
        assert exact or one.dtype == other.dtype
        assert float((one.double() - other.double()).norm()) <= tolerance * max(1.0, float(other.double().norm()))


def assert_states_near(actual: dict[int, Any], expected: dict[int, Any], tolerance: float) -> None:
    """Equal states, with floating-point tensors compared relative to their largest number; at 0 bit for bit."""
    assert actual.keys() == expected.keys()
    for index in expected:
        assert actual[index].keys() == expected[index].keys()
        for key, value in expected[index].items():
            found, where = actual[index][key], f"{key} of layer {index}"
            if not isinstance(value, Tensor):
                assert found == value, where
                continue
            assert found.dtype == value.dtype, where
            if value.is_floating_point() and tolerance:
                error = float((found - value).abs().max()) / max(1.0, float(value.abs().max()))
                assert error <= tolerance, f"{where} is off by {error:.3g}"
            else:
                assert torch.equal(found, value), where


assert_states_equal = functools.partial(assert_states_near, tolerance=0)
"""Bitwise equal states."""
