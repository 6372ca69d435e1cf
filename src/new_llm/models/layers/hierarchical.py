"""The hierarchical layer: fine memories, their sum as a coarse one, and a learned gate from coarse to fine."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from new_llm.models.layers.compressive import EPSILON, CompressiveAttention
from new_llm.models.layers.multi_memory import MultiMemoryAttention, MultiMemoryLayer, MultiMemoryOptions
from new_llm.models.layers.registry import register_layer
from new_llm.models.ops import ScannedReads, read_memories
from new_llm.models.state import MemoryState


class ExpansionGate(nn.Module):
    """p = sigmoid(W2 GELU(W1 x + b1) + b2), D → D/4 → 1 for each token."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        width = max(1, hidden_size // 4)
        self.dense_in = nn.Linear(hidden_size, width)
        self.dense_out = nn.Linear(width, 1)

    def forward(self, coarse: Tensor) -> Tensor:
        """[B, S, D] to [B, S, 1]."""
        hidden = F.gelu(self.dense_in(coarse.to(self.dense_in.weight.dtype)))
        return torch.sigmoid(self.dense_out(hidden)).to(coarse.dtype)


class HierarchicalAttention(MultiMemoryAttention):
    """A_mem = p · fine + (1 − p) · coarse: fine is multi-memory's read, coarse a read of the sum of its memories."""

    reads_sum: ClassVar[bool] = True

    def __init__(self, hidden_size: int, num_memory_heads: int, options: MultiMemoryOptions) -> None:
        super().__init__(hidden_size, num_memory_heads, options)
        self.expansion_gate = ExpansionGate(hidden_size)

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """The expansion gate."""
        return list(self.expansion_gate.parameters())

    def read(self, q: Tensor, memory: MemoryState) -> Tensor:
        """[B, H, S, K] to [B, H, S, V]."""
        coarse = read_memories(
            q,
            memory.memories.sum(1, keepdim=True),
            memory.norms.sum(1, keepdim=True),
            epsilon=EPSILON,
        )
        return self.combine(ScannedReads(super().read(q, memory), coarse, memory.memories))

    def combine(self, reads: ScannedReads) -> Tensor:
        """[..., H, S, V]; the gate reads all heads of a token."""
        coarse = reads.sum_reads
        assert coarse is not None
        p = self.expansion_gate(coarse.transpose(-2, -3).flatten(-2)).unsqueeze(-3)  # [..., 1, S, 1]
        return p * reads.reads + (1 - p) * coarse


@register_layer("hierarchical", options=MultiMemoryOptions)
class HierarchicalLayer(MultiMemoryLayer):
    """Multi-memory with a coarse memory above it, the sum of the fine ones, and a learned expansion gate.

    p = sigmoid(MLP(coarse read)), computed for each token, weighs the fine memories. Arguments are
    `MultiMemoryLayer`'s.
    """

    key_prefix: ClassVar[str] = "fine_"
    attention_type: ClassVar[type[CompressiveAttention]] = HierarchicalAttention
