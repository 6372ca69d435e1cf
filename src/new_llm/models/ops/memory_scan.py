"""The recurrence of memories over the segments of a call; backward makes its states again instead of keeping them.

Legend: B rows, n segments, S tokens of a segment, N memories (or banks), H heads, K key width, V value width. X_i^m is
memory m as segment i finds it; m_i is the memory that segment i is written to.

What is sequential is the chain X_{i+1} = d_i X_i + k'_iᵀ u_i alone, where k' is k or what a write rule makes of it.
Without the delta rule u_i = v_i, so all products are made at once and the chain is a sum; with it u_i needs X_i, two
products per segment. Reads of all segments, and all other products of backward, are batched over a group of segments.
Forward keeps the memories at the first segment of each group, and u; backward makes a group's states again from these
by products that don't wait for one another, so that of n segments' states about 2 √n are held at once. Source of the
trade: Chen et al., arXiv:1604.06174, section 3.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from new_llm.models.ops import kernels
from new_llm.models.ops.memory import sum_outer_products

SMALL_STATES = 2**22
"""Calls whose states take no more bytes than this are one group on a CPU; `kernels.limit_bytes` has a GPU's."""
LONG_SEGMENT = 2**18
"""Numbers of a segment's keys, S K of a head, from which two products of cuBLAS outweigh their launches; estimated."""
FEW_COLUMNS = 66 * 16
"""Columns of all heads' memories with which the kernel's narrowest programs take half of an H100's processors."""


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
    written_keys: Tensor | None = None,
) -> ScannedReads:
    """Read all segments and write the first `num_writes` of them, each into one memory, segment by segment.

    reads_i = Σ_m c_i^m (q_i X_i^m), sum_reads_i = t_i (q_i Σ_m X_i^m), and with m = m_i
    X_{i+1}^m = d_i X_i^m + k'_iᵀ (v_i − e_i k_i X_i^m). The scales c, t, e hold the divisors, which come from z alone.
    Source: Infini-attention, arXiv:2404.07143, eqs. 3 to 5. Arguments as in `scan_memories`.
    """
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
                written = k if written_keys is None else written_keys
                states[slot] = kept + written[b, i].transpose(-1, -2) @ update
        rows.append((torch.stack(reads), torch.stack(sum_reads or reads), torch.stack(states)))
    reads, sum_reads, end = (torch.stack(part) for part in zip(*rows, strict=True))
    return ScannedReads(reads, None if sum_scales is None else sum_reads, end)


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
    written_keys: Tensor | None = None,
) -> ScannedReads:
    """The equations of `scan_memories_naive`, batched over segments and memories.

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
        decay: d of the written segments, [B, num_writes, H]; None: 1.
        written_keys: k' of the written segments, [B, num_writes, H, S, K], zero where k is; None: k.

    Returns:
        The reads and the memories after the last write.
    """
    if num_writes == 0 and memories is not None:
        return _read_unwritten(q, v, memories, read_scales, sum_scales)
    learns = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad
        for t in (q, k, v, memories, read_scales, sum_scales, delta_scales, decay, written_keys)
    )
    # torch.compile sees one operation; outside it a plain function spares the import of all of torch's compiler
    scan = compiled_scan if torch.compiler.is_compiling() else Scan.apply
    reads, sum_reads, end, _, _ = scan(
        q, k, v, memories, read_scales, slots, sum_scales, delta_scales, decay, written_keys, num_writes, learns
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


def choose_group(q: Tensor, num_memories: int, value_width: int) -> int:
    """Segments of a group: √n, or more where the states are small for the device."""
    batch, num_segments, heads, _, width = q.shape
    state_bytes = batch * heads * num_memories * width * value_width * 4
    return max(math.isqrt(num_segments - 1) + 1, kernels.limit_bytes(q, SMALL_STATES) // state_bytes)


def suits_delta_kernel(k: Tensor) -> bool:
    """Whether the delta rule's kernel is for keys [B, n, H, S, K] on a GPU.

    Where segments are long and heads few, its programs would be too few for long loops: two products by cuBLAS per
    segment use the whole GPU.
    """
    batch, _, heads, length, width = k.shape
    is_long = length * width >= LONG_SEGMENT and batch * heads * width <= FEW_COLUMNS
    return not is_long and width * k.element_size() <= kernels.MAX_KEY_BYTES


# The chain of writes


class Gradients(NamedTuple):
    """What backward fills: the gradients of k, v, e, d and k', in their shapes; empty where there is no such tensor."""

    k: Tensor
    v: Tensor
    e: Tensor
    decay: Tensor
    written_keys: Tensor


def find_product_dtype(k: Tensor, wide: torch.dtype) -> torch.dtype:
    """The dtype of products with memories: k's, but in float16, whose range is too small for them, the memories'."""
    return wide if k.dtype == torch.float16 else k.dtype


class Chain:
    """The writes of one call: X_{i+1} = d_i X_i + k'_iᵀ (v_i − e_i k_i X_i) in the memory m_i; shapes as in
    `scan_memories`.
    """

    def __init__(
        self,
        k: Tensor,
        delta_scales: Tensor | None,
        decay: Tensor | None,
        written_keys: Tensor | None,
        slots: Tensor,
        num_memories: int,
        num_writes: int,
        wide: torch.dtype,
    ) -> None:
        self.k = k
        self.written_keys = k if written_keys is None else written_keys
        self.delta_scales = delta_scales
        self.decay = decay
        self.slots = slots
        self.num_memories = num_memories
        self.num_writes = num_writes
        self.wide = wide
        self.dtype = find_product_dtype(k, wide)
        self.uses_triton = kernels.uses_triton(k) and (delta_scales is None or suits_delta_kernel(k))
        self.common_slots = self._find_common_slots()

    def _find_common_slots(self) -> list[int] | None:
        """m_i where it is the same in all rows and known without waiting for a device."""
        if self.num_memories == 1:
            return [0] * self.slots.shape[1]
        if self.slots.device.type == "cpu" and bool((self.slots == self.slots[:1]).all()):
            return self.slots[0].tolist()
        return None

    def begin(self, memories: Tensor | None, v: Tensor) -> Tensor:
        """A state that may be changed in place, from [B, N, H, K, V] (None: empty)."""
        batch, _, heads, _, width = self.k.shape
        if memories is None:
            return self.k.new_zeros(batch, heads, self.num_memories, width, v.shape[-1], dtype=self.wide)
        return memories.transpose(1, 2).clone(memory_format=torch.contiguous_format)

    def advance(self, state: Tensor, v: Tensor, part: slice, *, is_known: bool = False) -> tuple[Tensor, Tensor]:
        """Write the segments of a part, one after the other, into `state`: X at its first segment, afterwards behind
        its last.

        With `is_known` v is the u that was written, so that no product waits for another.

        Returns:
            X as each segment of the part finds it, [B, g, H, N, K, V] in the products' dtype, and u of the written
            ones,
            [B, w, H, S, V] in v's dtype.
        """
        written = self._written(part)
        k, u = self.written_keys[:, written], v[:, written]
        states = state.new_empty(state.shape[0], part.stop - part.start, *state.shape[1:], dtype=self.dtype)
        is_sequential = self.delta_scales is not None and not is_known
        if self.uses_triton and k.shape[1]:
            decay, slots = self._of(self.decay, written), self.slots[:, written]
            if is_sequential:
                u = kernels.load_triton().write_with_delta(state, states, *self._keys(written), u, decay, slots)
            else:
                kernels.load_triton().write_sums(state, states, sum_outer_products(k, u, self.wide), decay, slots)
            states[:, k.shape[1] :] = state.unsqueeze(1)
            return states, u
        products = None if is_sequential else sum_outer_products(k, u, self.wide)
        scaled = self._scale_keys(written) if is_sequential else k
        updates: list[Tensor] = []
        for j in range(states.shape[1]):
            states[:, j] = state
            if j >= k.shape[1]:
                continue
            current = self._take(state, part.start + j)
            if products is None:
                updates.append(u[:, j] - scaled[:, j] @ current.to(self.dtype))
                product = sum_outer_products(k[:, j], updates[-1], self.wide)
            else:
                product = products[:, j]
            if self.decay is not None:
                current.mul_(self.decay[:, part.start + j, :, None, None])
            self._put(state, current.add_(product), part.start + j)
        return states, torch.stack(updates, 1) if updates else u

    def retreat(
        self,
        g: Tensor,
        states: Tensor,
        u: Tensor,
        from_reads: Tensor | None,
        part: slice,
        into: "Gradients",
    ) -> None:
        """The way back: u'_i = k'_i G_{i+1}, G_i = d_i G_{i+1} − (e_i k_i)ᵀ u'_i + what the reads of X_i give.

        Args:
            g: G = ∂L/∂X behind the part; afterwards at its first segment.
            states: what `advance` returned.
            u: what was written, of all segments.
            from_reads: ∂L/∂X of the reads, of the part's last segments.
            part: the segments.
            into: takes the gradients of the writes.
        """
        written = self._written(part)
        num_segments, num_writes = part.stop - part.start, written.stop - written.start
        num_unread = num_segments - (0 if from_reads is None else from_reads.shape[1])
        k, u = self.written_keys[:, written].to(self.dtype), u[:, written].to(self.dtype)
        above = states.new_empty(g.shape[0], num_writes, g.shape[1], *g.shape[3:])  # G_{i+1} of the written memory
        if self.uses_triton and num_writes:
            back = self._retreat_by_kernels(g, above, k, from_reads, written, num_unread)
            self._differentiate_writes(u, back, above, states, written, into)
            return
        scaled = None if self.delta_scales is None else self._scale_keys(written)
        backs: list[Tensor] = []  # u'
        for j in reversed(range(num_segments)):
            if j < num_writes:
                current = self._take(g, part.start + j)
                above[:, j] = current
                if self.decay is not None:
                    current.mul_(self.decay[:, part.start + j, :, None, None])
                if scaled is not None:
                    backs.append(k[:, j] @ above[:, j])
                    current.sub_(scaled[:, j].transpose(-1, -2) @ backs[-1])
                if self.decay is not None or scaled is not None:
                    self._put(g, current, part.start + j)
            if from_reads is not None and j >= num_unread:
                g.add_(from_reads[:, j - num_unread])
        if num_writes:
            back = k @ above if scaled is None else torch.stack(backs[::-1], 1)
            self._differentiate_writes(u, back, above, states, written, into)

    def _retreat_by_kernels(
        self,
        g: Tensor,
        above: Tensor,
        k: Tensor,
        from_reads: Tensor | None,
        written: slice,
        num_unread: int,
    ) -> Tensor:
        """u' of the written segments; `g` and `above` as in `retreat`."""
        num_writes = k.shape[1]
        added = None
        if from_reads is not None:
            last = from_reads.shape[1] + num_unread - num_writes  # segments behind the last write
            g.add_(from_reads[:, from_reads.shape[1] - last :].sum(1))
            added = from_reads[:, : from_reads.shape[1] - last]
            added = added if added.shape[1] else None
        decay, slots = self._of(self.decay, written), self.slots[:, written]
        options = {"added": added, "num_unread": num_unread}
        if self.delta_scales is not None:
            keys = self._keys(written)
            return kernels.load_triton().write_with_delta(g, above, *keys, None, decay, slots, **options)
        kernels.load_triton().write_sums(g, above, None, decay, slots, **options)
        return k @ above

    def _differentiate_writes(
        self, u: Tensor, back: Tensor, above: Tensor, states: Tensor, written: slice, into: "Gradients"
    ) -> None:
        """What follows from u' (`back`) and G (`above`) of the written segments, for all of them at once."""
        into.v[:, written] = back
        into_k = u @ above.transpose(-1, -2)
        if into.written_keys.numel():
            into.written_keys[:, written], into_k = into_k, torch.zeros_like(into_k)
        if self.delta_scales is not None:
            from_states = (back @ self._pick(states, written).transpose(-1, -2)).to(self.wide)
            into_k = into_k - from_states * self.delta_scales[:, written].unsqueeze(-1)
            into.e[:, written] = -(from_states * self.k[:, written].to(self.dtype)).sum(-1)
        into.k[:, written] = into_k
        if into.decay.numel():
            into.decay[:, written] = (above * self._pick(states, written)).sum((-1, -2))

    def _written(self, part: slice) -> slice:
        return slice(part.start, max(part.start, min(part.stop, self.num_writes)))

    @staticmethod
    def _of(t: Tensor | None, part: slice) -> Tensor | None:
        return None if t is None else t[:, part]

    def _keys(self, part: slice) -> tuple[Tensor, Tensor | None, Tensor]:
        """k, k' (None where it is k) and e of some segments."""
        assert self.delta_scales is not None
        written_keys = None if self.written_keys is self.k else self.written_keys[:, part]
        return self.k[:, part], written_keys, self.delta_scales[:, part]

    def _scale_keys(self, part: slice) -> Tensor:
        """e k of some segments, in the products' dtype."""
        assert self.delta_scales is not None
        return (self.k[:, part].to(self.wide) * self.delta_scales[:, part].unsqueeze(-1)).to(self.dtype)

    def _take(self, state: Tensor, i: int) -> Tensor:
        """The memory of `state` that segment i is written to, [B, H, K, V]: a view where all rows have the same."""
        if self.common_slots is not None:
            return state[:, :, self.common_slots[i]]
        return state[torch.arange(state.shape[0], device=state.device), :, self.slots[:, i]]

    def _put(self, state: Tensor, current: Tensor, i: int) -> None:
        if self.common_slots is None:
            state[torch.arange(state.shape[0], device=state.device), :, self.slots[:, i]] = current

    def _pick(self, states: Tensor, written: slice) -> Tensor:
        """The written memory's states, [B, w, H, K, V]."""
        num_writes = written.stop - written.start
        if self.num_memories == 1:
            return states[:, :num_writes, :, 0]
        rows = torch.arange(states.shape[0], device=states.device).unsqueeze(1)
        steps = torch.arange(num_writes, device=states.device)
        return states[rows, steps, :, self.slots[:, written]]


# Forward and backward of a call, group by group


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memories: Tensor | None,
    read_scales: Tensor,
    slots: Tensor,
    sum_scales: Tensor | None,
    delta_scales: Tensor | None,
    decay: Tensor | None,
    written_keys: Tensor | None,
    num_writes: int,
    learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Reads, reads of the sum, end, states at the groups' first segments but the first, u of all written segments."""
    call = Chain(k, delta_scales, decay, written_keys, slots, read_scales.shape[-1], num_writes, read_scales.dtype)
    state = call.begin(memories, v)
    reads = torch.empty_like(v, memory_format=torch.contiguous_format)
    sum_reads = torch.empty_like(reads) if sum_scales is not None else v.new_empty(0)
    kept: list[Tensor] = []
    updates: list[Tensor] = []
    group = choose_group(q, read_scales.shape[-1], v.shape[-1])
    for part, unread in _cut(q.shape[1], group, is_empty=memories is None):
        if part.start and learns:
            kept.append(state.clone())
        states, written = call.advance(state, v, part)
        if learns and delta_scales is not None:
            updates.append(written)
        reads[:, unread] = 0
        if sum_scales is not None:
            sum_reads[:, unread] = 0
        part = slice(unread.stop, part.stop)
        if part.start == part.stop:
            continue
        states = states[:, -(part.stop - part.start) :]
        wide_q = q[:, part].to(state.dtype)
        reads[:, part] = fold_scales(wide_q, read_scales[:, part], states.dtype) @ states.flatten(3, 4)
        if sum_scales is not None:
            scaled = (wide_q * sum_scales[:, part].unsqueeze(-1)).to(states.dtype)
            sum_reads[:, part] = scaled @ states.sum(3)
    checkpoints = torch.stack(kept) if kept else state.new_empty(0)
    end = state.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return reads, sum_reads, end, checkpoints, torch.cat(updates, 1) if updates else v.new_empty(0)


def scan_backward(
    for_reads: Tensor,
    for_sums: Tensor,
    for_end: Tensor,
    q: Tensor,
    k: Tensor,
    updates: Tensor,
    memories: Tensor | None,
    read_scales: Tensor,
    slots: Tensor,
    sum_scales: Tensor | None,
    delta_scales: Tensor | None,
    decay: Tensor | None,
    written_keys: Tensor | None,
    checkpoints: Tensor,
    num_writes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, memories, c, t, e, d and k'; empty for what is None."""
    call = Chain(k, delta_scales, decay, written_keys, slots, read_scales.shape[-1], num_writes, read_scales.dtype)
    g = for_end.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # ∂L/∂X, [B, H, N, K, V]
    for_q, for_c, for_t, *others = (
        g.new_empty(0) if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format)
        for t in (q, read_scales, sum_scales, k, for_reads, delta_scales, decay, written_keys)
    )
    into = Gradients(*others)
    group = choose_group(q, read_scales.shape[-1], for_reads.shape[-1])
    parts = list(_cut(q.shape[1], group, is_empty=memories is None))
    for number, (part, unread) in reversed(list(enumerate(parts))):
        state = checkpoints[number - 1].clone() if number else call.begin(memories, for_reads)
        states, _ = call.advance(state, updates, part, is_known=True)
        reading = slice(unread.stop, part.stop)
        from_reads = None
        if reading.start < reading.stop:
            found = states[:, -(reading.stop - reading.start) :]
            dtype = found.dtype
            upstream, wide_q = for_reads[:, reading].to(dtype), q[:, reading].to(g.dtype)
            # ∂L/∂(c q) = A' Xᵀ
            back = (upstream @ found.flatten(3, 4).transpose(-1, -2)).to(g.dtype).unflatten(-1, found.shape[3:5])
            into_q = (back * read_scales[:, reading].unsqueeze(-1)).sum(-2)
            for_c[:, reading] = (back * wide_q.unsqueeze(-2)).sum(-1)
            folded = fold_scales(wide_q, read_scales[:, reading], dtype)
            from_reads = (folded.transpose(-1, -2) @ upstream).unflatten(-2, found.shape[3:5])
            if sum_scales is not None:
                upstream, scales = for_sums[:, reading].to(dtype), sum_scales[:, reading].unsqueeze(-1)
                back = (upstream @ found.sum(3).transpose(-1, -2)).to(g.dtype)
                into_q = into_q + back * scales
                for_t[:, reading] = (back * wide_q).sum(-1)
                scaled = (wide_q * scales).to(dtype)
                from_reads = from_reads + (scaled.transpose(-1, -2) @ upstream).unsqueeze(3)
            for_q[:, reading] = into_q
        call.retreat(g, states, updates, from_reads, part, into)
    for_memories = (
        g.new_empty(0) if memories is None else g.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    )
    return for_q, into.k, into.v, for_memories, for_c, for_t, into.e, into.decay, into.written_keys


def fold_scales(wide_q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """c q of all memories side by side, [B, g, H, S, N·K], so that one product reads and sums them all."""
    return (wide_q.unsqueeze(-2) * scales.unsqueeze(-1)).to(dtype).flatten(-2)


def _cut(num_segments: int, group: int, *, is_empty: bool) -> list[tuple[slice, slice]]:
    """Groups of segments, and which of each read nothing: the first segment of a call from empty memory."""
    parts = []
    for begin in range(0, num_segments, group):
        parts.append((slice(begin, min(begin + group, num_segments)), slice(begin, begin + (is_empty and begin == 0))))
    return parts


compiled_scan = library.custom_op("new_llm::scan_memories", scan, mutates_args=())
_compiled_backward = library.custom_op("new_llm::scan_memories_backward", scan_backward, mutates_args=())


@compiled_scan.register_fake
def _(q, k, v, memories, read_scales, slots, sum_scales, delta_scales, decay, written_keys, num_writes, learns):
    batch, num_segments, heads, length, width = q.shape
    num_memories, value_width = read_scales.shape[-1], v.shape[-1]
    wide = read_scales.dtype
    reads = v.new_empty(v.shape)
    sum_reads = v.new_empty(v.shape if sum_scales is not None else 0)
    end = v.new_empty((batch, num_memories, heads, width, value_width), dtype=wide)
    num_kept = -(-num_segments // choose_group(q, num_memories, value_width)) - 1 if learns else 0
    kept = (num_kept, batch, heads, num_memories, width, value_width) if num_kept else (0,)
    keeps_updates = learns and delta_scales is not None and num_writes > 0
    updates = (batch, num_writes, heads, length, value_width) if keeps_updates else (0,)
    return reads, sum_reads, end, v.new_empty(kept, dtype=wide), v.new_empty(updates)


@_compiled_backward.register_fake
def _(
    for_reads,
    for_sums,
    for_end,
    q,
    k,
    updates,
    memories,
    read_scales,
    slots,
    sum_scales,
    delta_scales,
    decay,
    written_keys,
    *_,
):
    def like(t: Tensor | None) -> Tensor:
        return for_end.new_empty(0) if t is None else t.new_empty(t.shape)

    rest = (q, k, for_reads, memories, read_scales, sum_scales, delta_scales, decay, written_keys)
    return tuple(like(t) for t in rest)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, num_writes, _ = inputs
    _, _, _, checkpoints, updates = output
    if inputs[7] is not None:  # with the delta rule u takes the place of v
        tensors[2] = updates
    ctx.save_for_backward(*tensors, checkpoints)
    ctx.num_writes = num_writes
    ctx.like = output[0].shape, output[0].dtype, output[2].shape, output[2].dtype
    ctx.set_materialize_grads(False)


def _differentiate_by(
    backward: Callable[..., tuple[Tensor, ...]],
    ctx: Any,
    for_reads: Tensor | None,
    for_sums: Tensor | None,
    for_end: Tensor | None,
    *_: Any,
) -> tuple[Tensor | None, ...]:
    *tensors, checkpoints = ctx.saved_tensors
    q, k, updates, memories, read_scales, slots, sum_scales, delta_scales, decay, written_keys = tensors
    shape, dtype, end_shape, end_dtype = ctx.like
    reads = q.new_zeros(shape, dtype=dtype) if for_reads is None else for_reads
    sums = for_sums
    if sums is None:
        sums = reads.new_zeros(0) if sum_scales is None else torch.zeros_like(reads)
    end = q.new_zeros(end_shape, dtype=end_dtype) if for_end is None else for_end
    for_q, for_k, for_v, for_memories, for_c, *others = backward(
        reads, sums, end, q, k, updates, memories, read_scales, slots, sum_scales, delta_scales, decay, written_keys,
        checkpoints, ctx.num_writes,
    )  # fmt: skip
    given = zip(others, (sum_scales, delta_scales, decay, written_keys), strict=True)
    found = [None if t is None else gradient for gradient, t in given]
    return for_q, for_k, for_v, None if memories is None else for_memories, for_c, None, *found, None, None


# under torch.compile backward, too, must be one operation: traced, it would launch kernels on tensors without memory
compiled_scan.register_autograd(partial(_differentiate_by, _compiled_backward), setup_context=_keep)


class Scan(torch.autograd.Function):
    """`scan` with its derivatives."""

    forward = staticmethod(scan)
    setup_context = staticmethod(_keep)
    backward = staticmethod(once_differentiable(partial(_differentiate_by, scan_backward)))  # pyright: ignore[reportAssignmentType]
