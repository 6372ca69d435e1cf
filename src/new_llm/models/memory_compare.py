"""How far two memories of the same layers are apart."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from new_llm.models.memory_record import MemoryRecord


@dataclass(frozen=True)
class Distance:
    """Two tensors A and B side by side.

    Attributes:
        norm_a: ‖A‖, Frobenius.
        norm_b: ‖B‖.
        relative: ‖A − B‖ / ‖A‖; 0 where both are zero, infinite where only A is.
        cosine: ⟨A, B⟩ / (‖A‖ ‖B‖); NaN where one is zero.
    """

    norm_a: float
    norm_b: float
    relative: float
    cosine: float


@dataclass(frozen=True)
class MemoryComparison:
    """One memory of one layer (and row) in two files.

    Attributes:
        layer: the layer's index.
        row: the row; None where all rows share the memory.
        memory: the memory's index in the layer.
        memories: the distance of M.
        norms: the distance of z.
        tokens: tokens seen, in each.
    """

    layer: int
    row: int | None
    memory: int
    memories: Distance
    norms: Distance
    tokens: tuple[int, int]


@dataclass(frozen=True)
class MemoryTensors:
    """One memory of one layer (and row): M [H, K, V], z [H, K], and its tokens."""

    layer: int
    row: int | None
    memory: int
    memories: Tensor
    norms: Tensor
    num_tokens: int


def list_memories(record: MemoryRecord, state: dict[int, dict[str, Any]]) -> list[MemoryTensors]:
    """Every memory of every layer and row of a state."""
    listed: list[MemoryTensors] = []
    for layer in record.layers:
        memories_key, norms_key = layer.facts.key("memories"), layer.facts.key("norms")
        entry = state[layer.layer]
        tensors = [entry[key] for key in (memories_key, norms_key, "token_counts")]
        for row in [None] if record.rows is None else range(record.rows):
            memories, norms, counts = tensors if row is None else [tensor[row] for tensor in tensors]
            listed += [
                MemoryTensors(layer.layer, row, n, memories[n], norms[n], int(counts[n]))
                for n in range(layer.num_memories)
            ]
    return listed


def compare_memories(a: list[MemoryTensors], b: list[MemoryTensors]) -> list[MemoryComparison]:
    """Compare two lists of `list_memories` memory by memory.

    Raises:
        ValueError: they hold memories of other layers, rows or shapes.
    """
    places = [[(m.layer, m.row, m.memory, tuple(m.memories.shape)) for m in memories] for memories in (a, b)]
    if places[0] != places[1]:
        raise ValueError(f"other layers, rows or shapes: {_describe(a)} against {_describe(b)}")
    return [
        MemoryComparison(
            one.layer,
            one.row,
            one.memory,
            measure_distance(one.memories, other.memories),
            measure_distance(one.norms, other.norms),
            (one.num_tokens, other.num_tokens),
        )
        for one, other in zip(a, b, strict=True)
    ]


def measure_distance(a: Tensor, b: Tensor) -> Distance:
    """The distance of two tensors of one shape, in float64."""
    a, b = a.double(), b.double()
    norm_a, norm_b, apart = float(a.norm()), float(b.norm()), float((a - b).norm())
    relative = apart / norm_a if norm_a else (math.inf if apart else 0.0)
    cosine = float((a * b).sum()) / (norm_a * norm_b) if norm_a and norm_b else math.nan
    return Distance(norm_a, norm_b, relative, cosine)


def _describe(memories: list[MemoryTensors]) -> str:
    first = memories[0]
    return f"{len(memories)} memories, the first of layer {first.layer} with shape {list(first.memories.shape)}"
