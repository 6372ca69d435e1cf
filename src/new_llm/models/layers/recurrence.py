"""A memory layer's recurrence over the segments of a call: what is written where, z, and the scales of the reads.

Which memory a segment is written to is known before anything is read, and so is z, which no value enters: both are made
for all segments at once. What is left is `scan_memories`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from new_llm.models.layers.base import Segments
from new_llm.models.ops import multiply_norms, scan_memories, scan_sums
from new_llm.models.state import MemoryState, find_written_memory

if TYPE_CHECKING:
    from new_llm.models.layers.compressive import CompressiveAttention


@dataclass(frozen=True)
class Schedule:
    """The writes of a call of which the first w segments are written. B rows, N memories.

    Attributes:
        slots: whose turn it is, [B, w] int64.
        chosen: whether a segment is written to a memory, [B, w, N]; nowhere True for a segment without tokens and where
            all memories are frozen.
        num_tokens: tokens that each memory has seen before each segment and after the last, [B, w + 1, N].
        num_segments: segments read after the last, [B].
    """

    slots: Tensor
    chosen: Tensor
    num_tokens: Tensor
    num_segments: Tensor

    def count_writes(self) -> Tensor:
        """Writes to each memory, [B, N]."""
        return self.chosen.sum(1)

    def spread_decay(self, decay: Sequence[float] | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """w of each head at each write, 1 where nothing is written.

        Returns:
            That of the memory whose turn it is, [B, w, H], and those of all memories, [B, w, N, H].
        """
        if decay is None:
            return None, None
        of_heads = like.new_tensor(decay)
        every = torch.where(self.chosen.unsqueeze(-1), of_heads, torch.ones_like(of_heads))
        return every.amin(2), every


def plan_writes(memory: MemoryState, counts: Tensor, segments_per_memory: int) -> Schedule:
    """The schedule of segments with `counts` [B, w] tokens, from the memory before them."""
    has_tokens = counts > 0
    seen = has_tokens.cumsum(1)
    slots = find_written_memory(
        memory.num_segments.unsqueeze(1) + seen - has_tokens.long(), segments_per_memory, memory.frozen
    )
    num_memories = len(memory.frozen)
    numbers = torch.arange(num_memories, device=slots.device)
    chosen = (slots.unsqueeze(-1) == numbers) & has_tokens.unsqueeze(-1)
    if all(memory.frozen):
        chosen = torch.zeros_like(chosen)
    added = (chosen * counts.unsqueeze(-1)).cumsum(1)
    before = memory.num_tokens.unsqueeze(1)
    return Schedule(
        slots=slots,
        chosen=chosen,
        num_tokens=torch.cat((before, before + added), dim=1),
        num_segments=memory.num_segments + has_tokens.sum(1),
    )


def scan_segments(
    attention: CompressiveAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: MemoryState | None,
    segments: Segments,
) -> tuple[Tensor, MemoryState | None]:
    """Read and write all segments of a call.

    Args:
        attention: whose memory it is.
        q: features of the queries, [B, n, H, S, K].
        k: features of the keys, likewise, zero at masked tokens.
        v: values, [B, n, H, S, V].
        memory: the memory before the call; None: empty.
        segments: which tokens are real, and whether the last segment is written.

    Returns:
        A_mem [B, n, H, S, V], and the memory after the last write.
    """
    batch, num_segments, _, length, _ = q.shape
    num_writes = num_segments - (not segments.write_last)
    if memory is None and num_writes == 0:
        return torch.zeros_like(v), None
    counts = segments.count_tokens(batch, num_writes, length, q.device)
    before = attention.empty_memory(batch, v) if memory is None else memory
    schedule = plan_writes(before, counts, attention.segments_per_memory)
    decay, norm_decay = schedule.spread_decay(attention.decay, before.norms)
    # z of all memories before each segment and after the last, [B, w + 1, N, H, K]
    changes = schedule.chosen[..., None, None] * k[:, :num_writes].sum(-2, dtype=before.norms.dtype).unsqueeze(2)
    norms = scan_sums(before.norms, changes, None if norm_decay is None else norm_decay.unsqueeze(-1))
    products = multiply_norms(q, norms[:, :num_segments].transpose(2, 3))  # [B, n, H, S, N]
    weights = attention.weigh(products, schedule.num_tokens[:, :num_segments])
    divisors = products.clamp_min(attention.epsilon)
    delta_scales = None
    if attention.use_delta_rule and num_writes:
        written = _pick_norms(norms[:, :num_writes], schedule.slots).unsqueeze(-2)
        delta_scales = 1 / multiply_norms(k[:, :num_writes], written).squeeze(-1).clamp_min(attention.epsilon)
    reads = scan_memories(
        q,
        k,
        v,
        None if memory is None else memory.memories,
        divisors.reciprocal() if weights is None else weights / divisors,
        schedule.slots,
        num_writes=0 if all(before.frozen) else num_writes,
        sum_scales=products.sum(-1).clamp_min(attention.epsilon).reciprocal() if attention.reads_sum else None,
        delta_scales=delta_scales,
        decay=decay,
    )
    if num_writes:
        memory = MemoryState(
            memories=reads.memories,
            norms=norms[:, -1],
            num_tokens=schedule.num_tokens[:, -1],
            num_segments=schedule.num_segments,
            frozen=before.frozen,
            retained=attention.decay_retained(before, schedule.count_writes()),
        )
    return attention.combine(reads), memory


def _pick_norms(norms: Tensor, slots: Tensor) -> Tensor:
    """z of the memory that each segment is written to: [B, w, N, H, K] to [B, w, H, K]."""
    if norms.shape[2] == 1:
        return norms[:, :, 0]
    return norms.gather(2, slots[:, :, None, None, None].expand(-1, -1, 1, *norms.shape[3:])).squeeze(2)
