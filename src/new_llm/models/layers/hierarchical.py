"""The hierarchical layer: fine and coarse memories.

Two forms: fine memories and their sum, mixed by a learned gate; or a Fenwick tree, whose memories hold 1, 2, 4, 8 …
segments, the newest segment in the smallest.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from new_llm.config import UserError
from new_llm.config.sections import section, short
from new_llm.models.layers.base import Segments, register_layer
from new_llm.models.layers.compressive import EPSILON, CompressiveAttention
from new_llm.models.layers.multi_memory import (
    MultiMemoryAttention,
    MultiMemoryLayer,
    SelectingAttention,
    SelectionOptions,
    score_features,
)
from new_llm.models.ops import ScannedReads, multiply_norms, read_memories, write_memory
from new_llm.models.state import MemoryState


@section
class HierarchicalOptions(SelectionOptions):
    """The options of a hierarchical layer."""

    hierarchy: Annotated[Literal["sum", "fenwick"], short("--hierarchy")] = "sum"
    """sum: fine memories written in turn, and their sum as the coarse memory. fenwick: memory ℓ holds a block of 2^ℓ
    segments, so the recent past is fine and the distant past coarse; the last of num_memories holds everything
    older."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router == "top1":
            raise UserError("router: top1 is for multi_memory only; allowed here: relevance, standardized")
        if self.hierarchy == "fenwick" and self.router != "relevance":
            raise UserError(
                f"router: {self.router} needs hierarchy sum; fenwick weighs its levels by learned weights instead"
            )


class ExpansionGate(nn.Module):
    """p = sigmoid(W2 GELU(W1 x + b1) + b2) per token, with widths D → D/4 → 1."""

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

    def __init__(self, hidden_size: int, num_memory_heads: int, options: Any) -> None:
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
            epsilon=self.epsilon,
        )
        return self.combine(ScannedReads(super().read(q, memory), coarse, memory.memories))

    def combine(self, reads: ScannedReads) -> Tensor:
        """A_mem, [..., H, S, V]; the gate sees the coarse reads of all of a token's heads."""
        coarse = reads.sum_reads
        assert coarse is not None
        p = self.expansion_gate(coarse.transpose(-2, -3).flatten(-2)).unsqueeze(-3)  # [..., 1, S, 1]
        return p * reads.reads + (1 - p) * coarse


@dataclass(frozen=True)
class TreeMemory(MemoryState):
    """A Fenwick tree of memories. After c segments, memory ℓ holds a block of 2^ℓ segments if bit ℓ of c is 1.

    Otherwise memory ℓ is empty. The blocks are consecutive, the largest being the oldest. The last memory also takes
    the blocks of all higher bits.
    """

    def age(self, num_segments: Tensor, left: Tensor | None = None) -> "TreeMemory":
        """Overrides `MemoryState.age`: the blocks merged as after `num_segments` [R] segments; there is no decay."""
        num_levels = self.norms.shape[1]
        levels = torch.arange(num_levels, device=self.norms.device)
        first = self.num_segments.unsqueeze(1) >> (levels + 1) << (levels + 1)  # a segment of each level's block
        moved = find_level(first, num_segments.unsqueeze(1), num_levels)
        moves = F.one_hot(moved.masked_fill(levels == num_levels - 1, num_levels - 1), num_levels)  # [R, from, to]
        return replace(
            self,
            memories=torch.einsum("rmn,rmhkv->rnhkv", moves.to(self.memories.dtype), self.memories),
            norms=torch.einsum("rmn,rmhk->rnhk", moves.to(self.norms.dtype), self.norms),
            num_tokens=(moves * self.num_tokens.unsqueeze(-1)).sum(1),
            num_segments=num_segments,
        )


def find_level(segment: Tensor, num_segments: Tensor, num_levels: int) -> Tensor:
    """The level of a segment's block after `num_segments`: the highest bit in which both differ, but at most N − 1."""
    powers = 2 ** torch.arange(1, num_levels, device=segment.device)
    return ((segment ^ num_segments).unsqueeze(-1) >= powers).sum(-1)


class FenwickAttention(SelectingAttention):
    """A_mem[t] = Σ_ℓ λ_tℓ σ(q_t) M_ℓ / max(Σ_ℓ λ_tℓ σ(q_t) z_ℓ, ε), λ_t = softmax over ℓ of W_λ LN(σ(q_t)) + b.

    M_ℓ and z_ℓ are the blocks of a `TreeMemory`. Writing a segment completes a block: all smaller blocks are added up
    into it, together with the segment's write; with the delta rule, r is read from their sum. With equal λ, A_mem is a
    read of the sum of all memories. LN is a LayerNorm without weights over the features of all heads.
    Source: log-linear attention, arXiv:2506.04761, which works token by token and has no z.
    """

    takes_token_rules: ClassVar[bool] = False

    def __init__(self, hidden_size: int, num_memory_heads: int, options: Any) -> None:
        super().__init__(
            hidden_size, num_memory_heads, options, num_memories=options.num_memories, segments_per_memory=1
        )
        self.level_weights = nn.Linear(hidden_size, num_memory_heads * options.num_memories)

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """W_λ and b."""
        return list(self.level_weights.parameters())

    def empty_memory(self, rows: int, like: Tensor) -> TreeMemory:
        """See `MemoryAttention.empty_memory`."""
        return TreeMemory(**vars(super().empty_memory(rows, like)))

    def read(self, q: Tensor, memory: MemoryState) -> Tensor:
        """[B, H, S, K] to [B, H, S, V]."""
        scores = score_features(self.level_weights, q, memory.norms.dtype)
        levels = scores.unflatten(-1, (self.num_memory_heads, -1)).softmax(-1).transpose(1, 2)  # [B, H, S, N]
        products = multiply_norms(q, memory.norms.transpose(1, 2))
        weights = levels * products.clamp_min(EPSILON) / (levels * products).sum(-1, keepdim=True).clamp_min(EPSILON)
        is_filled = memory.num_tokens > 0
        self._watch(weights * is_filled[:, None, None], is_filled.sum(-1)[:, None, None])
        return read_memories(q, memory.memories, memory.norms, epsilon=EPSILON, weights=weights.movedim(-1, 1))

    def _scan(
        self, q: Tensor, k: Tensor, v: Tensor, memory: MemoryState | None, segments: Segments, rule: Any = None
    ) -> tuple[Tensor, MemoryState | None]:
        """See `CompressiveAttention._scan`; runs segment by segment, since blocks move between memories."""
        batch, num_segments, _, length, _ = q.shape
        num_writes = num_segments - (not segments.write_last)
        counts = segments.count_tokens(batch, num_writes, length, q.device)
        reads = []
        for i in range(num_segments):
            reads.append(torch.zeros_like(v[:, i]) if memory is None else self.read(q[:, i], memory))
            if i < num_writes:
                before = self.empty_memory(batch, v) if memory is None else memory
                settings: dict[str, Any] = {"use_delta_rule": self.use_delta_rule, "epsilon": EPSILON}
                written, norm = write_memory(k[:, i], v[:, i], *self._current(before), **settings)
                memory = self._replace(before, written, norm, counts[:, i])
        return torch.stack(reads, dim=1), memory

    def _current(self, memory: MemoryState) -> tuple[Tensor, Tensor]:
        """The sum of the blocks that the next segment will be added to."""
        joined, level = self._join(memory, torch.ones_like(memory.num_segments))
        rows = torch.arange(memory.rows, device=level.device)
        return joined.memories[rows, level], joined.norms[rows, level]

    def _add_write(
        self, memory: MemoryState, written: Tensor, norm: Tensor, count: Tensor, fade: Tensor | None
    ) -> MemoryState:
        held, norms = self._current(memory)
        return self._replace(memory, held + written, norms + norm, count)

    def _replace(self, memory: MemoryState, written: Tensor, norm: Tensor, count: Tensor) -> MemoryState:
        """The memory after a segment of `count` [B] tokens, with the block that it completed at that block's level."""
        has_tokens = count > 0
        joined, level = self._join(memory, has_tokens)
        chosen = F.one_hot(level, self.num_memories).bool() & has_tokens.unsqueeze(1)  # [B, N]
        return replace(
            joined,
            memories=torch.where(chosen[..., None, None, None], written.unsqueeze(1), joined.memories),
            norms=torch.where(chosen[..., None, None], norm.unsqueeze(1), joined.norms),
            num_tokens=joined.num_tokens + chosen * count.unsqueeze(1),
            segments_seen=memory.segments_seen + has_tokens,
        )

    def _join(self, memory: MemoryState, added: Tensor) -> tuple[TreeMemory, Tensor]:
        """The blocks merged as they are after `added` [B] (0 or 1) more segments, and the level of the next segment."""
        assert isinstance(memory, TreeMemory)
        level = find_level(memory.num_segments, memory.num_segments + 1, self.num_memories)
        return memory.age(memory.num_segments + added), level


@register_layer("hierarchical", options=HierarchicalOptions)
class HierarchicalLayer(MultiMemoryLayer):
    """Fine and coarse memories.

    With `hierarchy: sum`, multi-memory plus a coarse memory, the sum of the fine ones. A learned expansion gate
    p = sigmoid(MLP(coarse read)) mixes the two reads for each token. With `fenwick`, a tree of memories of 1, 2, 4 …
    segments, with a learned weight per token and level.

    The arguments are `MultiMemoryLayer`'s.
    """

    key_prefix: ClassVar[str] = "fine_"
    attention_type: ClassVar[type[CompressiveAttention]] = HierarchicalAttention

    def choose_attention(self, options: Any) -> type[CompressiveAttention]:
        """See `CompressiveLayer.choose_attention`."""
        return FenwickAttention if options.hierarchy == "fenwick" else self.attention_type
