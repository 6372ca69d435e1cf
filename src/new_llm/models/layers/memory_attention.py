"""What the model, its optimiser and its files must know of any attention with memory."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from new_llm.models.layers.base import Attention
from new_llm.models.state import MemoryState


class MemoryAttention(Attention):
    """An attention with N memories of H heads, each a matrix [K, V], and a gate β for each head.

    Attributes:
        head_size: K.
        value_size: V.
    """

    gate: nn.Parameter
    dense: nn.Linear
    num_memories: int
    num_memory_heads: int
    head_size: int
    value_size: int
    segments_per_memory: int
    use_delta_rule: bool
    decay: Sequence[float] | None = None

    def empty_memory(self, rows: int, like: Tensor) -> MemoryState:
        """Empty memories for `rows` rows, on the device of `like` and in its dtype, float32 at least."""
        shape = (self.num_memories, self.num_memory_heads, self.head_size, self.value_size)
        dtype = torch.promote_types(like.dtype, torch.float32)
        return MemoryState.empty(rows, shape, dtype=dtype, device=like.device)

    def initialize_features(self) -> None:
        """Give freshly drawn weights what else they are to begin with."""

    def gate_parameters(self) -> list[nn.Parameter]:
        """Parameters that train at the gates' learning rate, without decay."""
        return [self.gate]

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Matrices that train at the model's learning rate, but without decay."""
        return []
