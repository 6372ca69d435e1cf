"""The recurrence of memories over the segments of a call; backward makes its states again instead of keeping them.

Legend: B rows, n segments, S tokens of a segment, N memories (or banks), H heads, K key width, V value width. X_i^m is
memory m as segment i finds it; m_i is the memory that segment i is written to.

What is sequential is the chain X_{i+1} = d_i X_i + k_iᵀ u_i alone. Without the delta rule u_i = v_i, so all products
are made at once and the chain is a sum; with it u_i needs X_i, two products a segment. Reads of all segments, and all
other products of backward, are batched over a group of segments. Forward keeps the memories at the first segment of
each group, and u; backward makes a group's states again from these by products that don't wait for one another, so that
of n segments' states about 2 √n are held at once. Source of the trade: Chen et al., arXiv:1604.06174, section 3.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from new_llm.models.ops.chain import find_product_dtype
from new_llm.models.ops.scan_passes import Scan, compiled_scan, fold_scales

SMALL_STATES = 2**22
"""Bytes of states that are no matter: calls whose states take no more are one group."""


class ScannedReads(NamedTuple):
    """What `scan_memories` returns.

    Attributes:
        reads: what each token reads of its segment's memories, [B, n, H, S, V] in v's dtype.
        sum_reads: what it reads of their sum, likewise; None where that was not wanted.
        memories: X after the last write, [B, N, H, K, V]; without writes the given tensor.
    """

    reads: Tensor
    sum_reads: Tensor | None
    memories: Tensor


def scan_memories(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memories: Tensor | None,
    read_scales: Tensor,
    slots: Tensor,
    *,
    num_writes: int,
    sum_scales: Tensor | None = None,
    delta_scales: Tensor | None = None,
    decay: Tensor | None = None,
) -> ScannedReads:
    """Read all segments and write the first `num_writes` of them, each into one memory.

    reads_i = Σ_m c_i^m (q_i X_i^m), sum_reads_i = t_i (q_i Σ_m X_i^m), and with m = m_i
    X_{i+1}^m = d_i X_i^m + k_iᵀ (v_i − e_i k_i X_i^m). The scales c, t, e hold the divisors, which come from z alone.
    Source: Infini-attention, arXiv:2404.07143, eqs. 3 to 5.

    Products are in q's dtype, in float16 (whose range is too small for a memory) in float32; X is float32 or wider.

    Args:
        q: features of the queries, [B, n, H, S, K].
        k: features of the keys, likewise; a row of zeros takes its token out.
        v: values, [B, n, H, S, V].
        memories: X_0, [B, N, H, K, V]; None: empty.
        read_scales: c, [B, n, H, S, N], in X's dtype.
        slots: m_i of the written segments, [B, num_writes] int64.
        num_writes: segments that are written, n or fewer.
        sum_scales: t, [B, n, H, S]; None: the sum is not read.
        delta_scales: e of the written segments, [B, num_writes, H, S]; None: no delta rule.
        decay: d of the written segments, [B, num_writes, H], which takes no gradient; None: 1.

    Returns:
        The reads and the memories after the last write.
    """
    if num_writes == 0 and memories is not None:
        return _read_unwritten(q, v, memories, read_scales, sum_scales)
    learns = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k, v, memories, read_scales, sum_scales, delta_scales)
    )
    batch, num_segments, heads, _, width = q.shape
    state_bytes = batch * heads * read_scales.shape[-1] * width * v.shape[-1] * 4
    group = choose_group(num_segments, state_bytes)
    # torch.compile sees one operation; outside it a plain function spares the import of all of torch's compiler
    scan = compiled_scan if torch.compiler.is_compiling() else Scan.apply
    reads, sum_reads, end, _, _ = scan(
        q, k, v, memories, read_scales, slots, sum_scales, delta_scales, decay, num_writes, group, learns
    )
    return ScannedReads(reads, None if sum_scales is None else sum_reads, end)


def _read_unwritten(
    q: Tensor, v: Tensor, memories: Tensor, read_scales: Tensor, sum_scales: Tensor | None
) -> ScannedReads:
    """The reads where all segments find the same memories, which need no recurrence."""
    dtype = find_product_dtype(q, memories.dtype)
    states = memories.transpose(1, 2).unsqueeze(1)
    wide_q = q.to(memories.dtype)
    reads = fold_scales(wide_q, read_scales, dtype) @ states.flatten(3, 4).to(dtype)
    sum_reads = None
    if sum_scales is not None:
        sum_reads = ((wide_q * sum_scales.unsqueeze(-1)).to(dtype) @ states.sum(3).to(dtype)).to(v.dtype)
    return ScannedReads(reads.to(v.dtype), sum_reads, memories)


def choose_group(num_segments: int, state_bytes: int) -> int:
    """Segments of a group: √n, or more where the states are small."""
    return max(math.isqrt(num_segments - 1) + 1, SMALL_STATES // state_bytes)


def scan_memories_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memories: Tensor | None,
    read_scales: Tensor,
    slots: Tensor,
    *,
    num_writes: int,
    sum_scales: Tensor | None = None,
    delta_scales: Tensor | None = None,
    decay: Tensor | None = None,
) -> ScannedReads:
    """The equations of `scan_memories`, row by row and segment by segment."""
    batch, num_segments, heads, _, width = q.shape
    if memories is None:
        memories = q.new_zeros(batch, read_scales.shape[-1], heads, width, v.shape[-1])
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for b in range(batch):
        states = list(memories[b].unbind(0))  # N of [H, K, V]
        reads, sum_reads = [], []
        for i in range(num_segments):
            found = torch.stack([q[b, i] @ state for state in states], dim=-1)  # [H, S, V, N]
            reads.append((found * read_scales[b, i].unsqueeze(-2)).sum(-1))
            if sum_scales is not None:
                sum_reads.append(found.sum(-1) * sum_scales[b, i].unsqueeze(-1))
            if i < num_writes:
                slot = int(slots[b, i])
                update = v[b, i]
                if delta_scales is not None:
                    update = update - delta_scales[b, i].unsqueeze(-1) * (k[b, i] @ states[slot])
                kept = states[slot] if decay is None else decay[b, i][:, None, None] * states[slot]
                states[slot] = kept + k[b, i].transpose(-1, -2) @ update
        rows.append((torch.stack(reads), torch.stack(sum_reads or reads), torch.stack(states)))
    reads, sum_reads, end = (torch.stack(part) for part in zip(*rows, strict=True))
    return ScannedReads(reads, None if sum_scales is None else sum_reads, end)
