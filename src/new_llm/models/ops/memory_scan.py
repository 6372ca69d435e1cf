"""The recurrence of memories over the segments of a call; backward recomputes the states instead of keeping them.

Legend: B rows, n segments, S tokens per segment, N memories (or banks), H heads, K key width, V value width. X_i^m is
memory m before segment i; m_i is the memory that segment i is written to.

Only the chain X_{i+1} = d_i X_i + k'_iᵀ u_i is sequential, where k' is k or the keys that a write rule derives from k.
Without the delta rule u_i = v_i, so all products are computed at once and the chain is a sum. With it u_i needs X_i,
and each segment takes two products in turn. Reads, and all other products of backward, are batched over a group of
segments. Forward keeps the memories before each group, and u. From these, backward recomputes a group's states by
products that do not depend on each other, so only about 2 √n states are held at once. This trade of time for memory is
that of Chen et al., arXiv:1604.06174, section 3.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from new_llm.models.ops import kernels
from new_llm.models.ops.memory import sum_outer_products

SMALL_STATES = 2**22
"""Bytes of states that a group may always hold on a CPU; for a GPU see `kernels.limit_bytes`."""
LONG_SEGMENT = 2**18
"""Elements of a head's keys in a segment, S K, from which two cuBLAS products are worth their launches; an estimate."""
FEW_COLUMNS = 66 * 16
"""Columns over all heads' memories with which the kernel's narrowest programs occupy half of an H100's processors."""


class ScannedReads(NamedTuple):
    """The result of `scan_memories`.

    Attributes:
        reads: each token's weighted read of the memories, [B, n, H, S, V] in v's dtype.
        sum_reads: each token's read of the memories' sum, in the same form; None without `sum_scales`.
        memories: X after the last write, [B, N, H, K, V].
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
    """Segment by segment: read all memories, then write one of them, in the first `num_writes` segments.

    reads_i = Σ_m c_i^m (q_i X_i^m), sum_reads_i = t_i (q_i Σ_m X_i^m), and for m = m_i
    X_{i+1}^m = d_i X_i^m + k'_iᵀ (v_i − e_i k_i X_i^m). The scales c, t and e contain the divisors, which depend only
    on z. Source: Infini-attention, arXiv:2404.07143, eqs. 3 to 5. Arguments as in `scan_memories`.
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

    Products are in q's dtype, but in X's for float16, whose range is too small for a memory. X is float32 or wider.

    Args:
        q: features of the queries, [B, n, H, S, K].
        k: features of the keys, [B, n, H, S, K]; a token with a zero key is not written.
        v: values, [B, n, H, S, V].
        memories: X_0, [B, N, H, K, V]; None: empty.
        read_scales: c, [B, n, H, S, N], in X's dtype.
        slots: m_i of the written segments, [B, num_writes] int64.
        num_writes: number of segments to write, at most n.
        sum_scales: t, [B, n, H, S]; None: the sum is not read.
        delta_scales: e of the written segments, [B, num_writes, H, S]; None: no delta rule.
        decay: d of the written segments, [B, num_writes, H]; None: 1.
        written_keys: k' of the written segments, [B, num_writes, H, S, K], zero where k is; None: k.
    """
    if num_writes == 0:
        return _read_unwritten(q, v, memories, read_scales, sum_scales)
    learns = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad
        for t in (q, k, v, memories, read_scales, sum_scales, delta_scales, decay, written_keys)
    )
    # a custom op for torch.compile; in eager mode a plain autograd function, which does not import torch's compiler
    scan = compiled_scan if torch.compiler.is_compiling() else Scan.apply
    reads, sum_reads, end, _, _ = scan(
        q, k, v, memories, read_scales, slots, sum_scales, delta_scales, decay, written_keys, num_writes, learns
    )
    return ScannedReads(reads, None if sum_scales is None else sum_reads, end)


def _read_unwritten(
    q: Tensor, v: Tensor, memories: Tensor | None, read_scales: Tensor, sum_scales: Tensor | None
) -> ScannedReads:
    """The reads of a call that writes nothing, which needs no recurrence."""
    if memories is None:
        memories = _begin(q, v, None, read_scales).transpose(1, 2)
    dtype = find_product_dtype(q, memories.dtype)
    states = memories.transpose(1, 2).unsqueeze(1)
    folded = (q.unsqueeze(-2) * read_scales.unsqueeze(-1)).to(dtype).flatten(-2)
    reads = folded @ states.flatten(3, 4).to(dtype)
    sum_reads = None
    if sum_scales is not None:
        sum_reads = ((q * sum_scales.unsqueeze(-1)).to(dtype) @ states.sum(3).to(dtype)).to(v.dtype)
    return ScannedReads(reads.to(v.dtype), sum_reads, memories)


def choose_group(q: Tensor, num_memories: int, value_width: int) -> int:
    """Number of segments in a group: √n, or more if their states fit in the device's limit."""
    batch, num_segments, heads, _, width = q.shape
    state_bytes = batch * heads * num_memories * width * value_width * 4
    return max(math.isqrt(num_segments - 1) + 1, kernels.limit_bytes(q, SMALL_STATES) // state_bytes)


# The chain of writes


def find_product_dtype(k: Tensor, wide: torch.dtype) -> torch.dtype:
    """The dtype of products with memories: k's, but the memories' for float16, whose range is too small for them."""
    return wide if k.dtype == torch.float16 else k.dtype


class Chain:
    """The writes of a group's first w segments: X_{i+1} = d_i X_i + k'_iᵀ (v_i − e_i k_i X_i) in memory m_i.

    Args:
        part: the group's g segments.
        k, delta_scales, decay, written_keys, slots, num_writes: arguments of the `scan_memories` call.
        num_memories: N.
        wide: X's dtype.
    """

    def __init__(
        self,
        part: slice,
        k: Tensor,
        delta_scales: Tensor | None,
        decay: Tensor | None,
        written_keys: Tensor | None,
        slots: Tensor,
        num_writes: int,
        num_memories: int,
        wide: torch.dtype,
    ) -> None:
        self.written = slice(part.start, max(part.start, min(part.stop, num_writes)))
        self.num_segments, self.num_writes = part.stop - part.start, self.written.stop - self.written.start
        self.num_memories, self.wide, self.dtype = num_memories, wide, find_product_dtype(k, wide)
        # With long segments and few heads, the delta rule's kernel would run a few programs with long loops, whereas
        # two cuBLAS products per segment use the whole GPU.
        batch, _, heads, length, width = k.shape
        is_long = length * width >= LONG_SEGMENT and batch * heads * width <= FEW_COLUMNS
        has_kernel = delta_scales is None or (not is_long and width * k.element_size() <= kernels.MAX_KEY_BYTES)
        self.uses_triton = kernels.uses_triton(k) and has_kernel and self.num_writes > 0
        # the written segments' keys in the products' dtype, made contiguous once for the kernels
        picked = [None if t is None else t[:, self.written].to(self.dtype) for t in (k, written_keys)]
        own, self.given_keys = (t.contiguous() if t is not None and self.uses_triton else t for t in picked)
        assert own is not None
        self.k, self.written_keys = own, own if self.given_keys is None else self.given_keys
        self.delta_scales = None if delta_scales is None else delta_scales[:, self.written].contiguous()
        self.decay = None if decay is None else decay[:, self.written]
        self.slots = slots[:, self.written]
        # m_i, if it is the same in all rows and known without synchronising
        self.common_slots: list[int] | None = None
        if num_memories == 1:
            self.common_slots = [0] * self.num_writes
        elif slots.device.type == "cpu" and bool((self.slots == self.slots[:1]).all()):
            self.common_slots = self.slots[0].tolist()

    def advance(self, state: Tensor, v: Tensor, *, is_known: bool = False) -> tuple[Tensor, Tensor]:
        """Write the segments one after another into `state`, in place: X before the group becomes X after it.

        With `is_known`, v is the u of an earlier call, so that no product has to wait for another.

        Returns:
            X before each segment, [B, g, H, N, K, V] in the products' dtype, and u of the written segments,
            [B, w, H, S, V] in v's dtype.
        """
        states = state.new_empty(state.shape[0], self.num_segments, *state.shape[1:], dtype=self.dtype)
        is_sequential = self.delta_scales is not None and not is_known
        products = None if is_sequential else sum_outer_products(self.written_keys, v, self.wide)
        if self.uses_triton and products is None:
            keys = self.k, self.given_keys, self.delta_scales
            v = kernels.load_triton().write_with_delta(state, states, *keys, v, self.decay, self.slots)
        elif self.uses_triton:
            kernels.load_triton().write_sums(state, states, products, self.decay, self.slots)
        else:
            scaled = keys = ()
            if products is None:
                scaled, keys = by_segment(self._scale_keys()), by_segment(self.written_keys)
            updates = list(v.unbind(1))
            for j in range(self.num_writes):
                states[:, j] = state
                current = self._take(state, j)
                if products is None:
                    updates[j] = updates[j] - scaled[j] @ current.to(self.dtype)
                    product = sum_outer_products(keys[j], updates[j], self.wide)
                else:
                    product = products[:, j]
                if self.decay is not None:
                    current.mul_(self.decay[:, j, :, None, None])
                self._put(state, current.add_(product), j)
            v = torch.stack(updates, 1) if products is None and updates else v
        if self.num_writes < self.num_segments:
            states[:, self.num_writes :] = state.unsqueeze(1)
        return states, v

    def retreat(self, g: Tensor, states: Tensor, u: Tensor, from_reads: Tensor) -> tuple[Tensor | None, ...]:
        """Backward: ∂u_i = k'_i G_{i+1}, G_i = d_i G_{i+1} − (e_i k_i)ᵀ ∂u_i + the gradient from the reads of X_i.

        Args:
            g: G = ∂L/∂X after the group; changed in place to G before its first segment.
            states: X as returned by `advance`.
            u: u as returned by `advance`.
            from_reads: ∂L/∂X from the reads of the group's last segments, [B, g or fewer, H, N, K, V].

        Returns:
            The gradients of k, v, e, d and k' of the written segments; None for what has no gradient.
        """
        num_writes, u = self.num_writes, u.to(self.dtype)
        above = states.new_empty(len(g), num_writes, g.shape[1], *g.shape[3:])  # G_{i+1} of the written memory
        num_unread = self.num_segments - from_reads.shape[1]
        for j in reversed(range(max(num_writes, num_unread), self.num_segments)):
            g.add_(from_reads[:, j - num_unread])
        added = from_reads[:, : num_writes - num_unread] if num_writes > num_unread else None
        options: dict[str, Any] = {"added": added, "num_unread": num_unread}
        if self.uses_triton and self.delta_scales is not None:
            keys = self.k, self.given_keys, self.delta_scales
            back = kernels.load_triton().write_with_delta(g, above, *keys, None, self.decay, self.slots, **options)
        elif self.uses_triton:
            kernels.load_triton().write_sums(g, above, None, self.decay, self.slots, **options)
            back = self.written_keys @ above
        else:
            keys, scaled, backs = by_segment(self.written_keys), None, list[Tensor]()
            if self.delta_scales is not None:
                scaled = by_segment(self._scale_keys())
            for j in reversed(range(num_writes)):
                current = self._take(g, j)
                narrow = current.to(self.dtype)
                above[:, j] = narrow
                if scaled is not None:
                    backs.append(keys[j] @ narrow)
                if self.decay is not None:
                    current.mul_(self.decay[:, j, :, None, None])
                if scaled is not None:
                    current.sub_(scaled[j].transpose(-1, -2) @ backs[-1])
                self._put(g, current, j)
                if j >= num_unread:
                    g.add_(from_reads[:, j - num_unread])
            back = torch.stack(backs[::-1], 1) if backs else self.written_keys @ above
        return self._differentiate(u, back, above, states)

    def _differentiate(
        self, u: Tensor, back: Tensor, above: Tensor, states: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of all written segments at once, from ∂u (`back`) and G (`above`); see `retreat`."""
        for_written = u @ above.transpose(-1, -2)
        for_k, for_given = (for_written, None) if self.given_keys is None else (None, for_written)
        picked = None if self.delta_scales is None and self.decay is None else self._pick(states)
        for_e = for_decay = None
        if self.delta_scales is not None and picked is not None:
            from_states = (back @ picked.transpose(-1, -2)).to(self.wide)
            change = from_states * self.delta_scales.unsqueeze(-1)
            for_k = change.neg_() if for_k is None else for_k - change
            for_e = (from_states * self.k).sum(-1).neg_()
        if self.decay is not None and picked is not None:
            for_decay = (above * picked).sum((-1, -2))
        return for_k, back, for_e, for_decay, for_given

    def _scale_keys(self) -> Tensor:
        """e k in the products' dtype."""
        assert self.delta_scales is not None
        return multiply(self.k, self.delta_scales.unsqueeze(-1), self.dtype)

    def _take(self, state: Tensor, j: int) -> Tensor:
        """The memory in `state` that segment j is written to, [B, H, K, V]; a view if it is the same in all rows."""
        if self.common_slots is not None:
            return state[:, :, self.common_slots[j]]
        return state[torch.arange(len(state), device=state.device), :, self.slots[:, j]]

    def _put(self, state: Tensor, current: Tensor, j: int) -> None:
        if self.common_slots is None:
            state[torch.arange(len(state), device=state.device), :, self.slots[:, j]] = current

    def _pick(self, states: Tensor) -> Tensor:
        """The states of the memory that each segment is written to, [B, w, H, K, V]."""
        if self.num_memories == 1:
            return states[:, : self.num_writes, :, 0]
        rows = torch.arange(len(states), device=states.device).unsqueeze(1)
        steps = torch.arange(self.num_writes, device=states.device)
        return states[rows, steps, :, self.slots]


def by_segment(t: Tensor) -> tuple[Tensor, ...]:
    """Split [B, w, ...] into segments, each contiguous."""
    return t.transpose(0, 1).contiguous().unbind()


def multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, computed in the wider of their dtypes and rounded once to `dtype`; not differentiable."""
    product = torch.empty(torch.broadcast_shapes(a.shape, b.shape), dtype=dtype, device=a.device)
    return torch.mul(a, b, out=product)


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
    """Reads, reads of the sum, memories after the last write, states before each group but the first, and u."""
    call = k, delta_scales, decay, written_keys, slots, num_writes, read_scales.shape[-1], read_scales.dtype
    state = _begin(q, v, memories, read_scales)
    reads = sum_reads = None
    kept: list[Tensor] = []
    updates: list[Tensor] = []
    for part, reading in _cut(q, v, memories, read_scales):
        if part.start and learns:
            kept.append(state.clone())
        chain = Chain(part, *call)
        states, written = chain.advance(state, v[:, chain.written])
        if learns and delta_scales is not None:
            updates.append(written)
        states = states[:, reading.start - part.start :]
        reads = _place(reads, v, reading, fold(q, read_scales, reading, states.dtype) @ states.flatten(3, 4))
        if sum_scales is not None:
            scaled = multiply(q[:, reading], sum_scales[:, reading].unsqueeze(-1), states.dtype)
            sum_reads = _place(sum_reads, v, reading, scaled @ states.sum(3))
    checkpoints = torch.stack(kept) if kept else state.new_empty(0)
    # missing parts are separate empty tensors, since a custom op may not return the same tensor twice
    u = torch.cat(updates, 1) if len(updates) > 1 else updates[0] if updates else v.new_empty(0)
    sum_reads = v.new_empty(0) if sum_reads is None else sum_reads
    assert reads is not None
    return reads, sum_reads, state.transpose(1, 2).contiguous(), checkpoints, u


def scan_backward(
    for_reads: Tensor,
    for_sums: Tensor | None,
    for_end: Tensor | None,
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
    """Gradients of q, k, v, memories, c, t, e, d and k'; an empty tensor for each argument that is None."""
    call = k, delta_scales, decay, written_keys, slots, num_writes, read_scales.shape[-1], read_scales.dtype
    g = _begin(q, for_reads, for_end, read_scales)  # ∂L/∂X, [B, H, N, K, V]
    likes = q, read_scales, sum_scales, k, for_reads, delta_scales, decay, written_keys
    gradients: list[Tensor | None] = [None] * len(likes)
    for number, (part, reading) in reversed(list(enumerate(_cut(q, for_reads, memories, read_scales)))):
        chain = Chain(part, *call)
        state = checkpoints[number - 1].clone() if number else _begin(q, for_reads, memories, read_scales)
        u = updates[:, chain.written]
        states, _ = chain.advance(state, u, is_known=True)
        found = states[:, reading.start - part.start :]
        *from_reads, for_states = _differentiate_reads(for_reads, for_sums, q, read_scales, sum_scales, found, reading)
        from_writes = chain.retreat(g, states, u, for_states)
        pieces = [(reading, piece) for piece in from_reads] + [(part, piece) for piece in from_writes]
        for i, (like, (place, piece)) in enumerate(zip(likes, pieces, strict=True)):
            if like is not None and piece is not None:
                gradients[i] = _place(gradients[i], like, place, piece)
    for_q, for_c, for_t, for_k, *others = (
        q.new_empty(0) if like is None else torch.zeros_like(like) if found is None else found
        for like, found in zip(likes, gradients, strict=True)
    )
    for_memories = g.new_empty(0) if memories is None else g.transpose(1, 2).contiguous()
    return for_q, for_k, others[0], for_memories, for_c, for_t, *others[1:]  # pyright: ignore[reportReturnType]


def _differentiate_reads(
    for_reads: Tensor,
    for_sums: Tensor | None,
    q: Tensor,
    read_scales: Tensor,
    sum_scales: Tensor | None,
    states: Tensor,
    part: slice,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The gradients of q, c, t and X from the reads of the segments `part`; see `scan_memories_naive`."""
    dtype, wide, mine = states.dtype, read_scales.dtype, q[:, part]
    upstream, scales = for_reads[:, part].to(dtype), read_scales[:, part].unsqueeze(-1)
    # ∂L/∂(c q) = ∂L/∂reads Xᵀ
    back = (upstream @ states.flatten(3, 4).transpose(-1, -2)).to(wide).unflatten(-1, states.shape[3:5])
    for_q, for_c, for_t = back * scales, (back * mine.unsqueeze(-2)).sum(-1), None
    for_q = for_q.sum(-2) if for_q.shape[-2] > 1 else for_q.squeeze(-2)
    for_states = (fold(q, read_scales, part, dtype).transpose(-1, -2) @ upstream).unflatten(-2, states.shape[3:5])
    if sum_scales is not None and for_sums is not None:
        upstream, scales = for_sums[:, part].to(dtype), sum_scales[:, part].unsqueeze(-1)
        back = (upstream @ states.sum(3).transpose(-1, -2)).to(wide)
        for_q, for_t = for_q + back * scales, (back * mine).sum(-1)
        for_states = for_states + (multiply(mine, scales, dtype).transpose(-1, -2) @ upstream).unsqueeze(3)
    return for_q, for_c, for_t, for_states


def fold(q: Tensor, scales: Tensor, part: slice, dtype: torch.dtype) -> Tensor:
    """c q for all memories, concatenated to [B, g, H, S, N·K], so that one product reads all memories and sums."""
    return multiply(q[:, part].unsqueeze(-2), scales[:, part].unsqueeze(-1), dtype).flatten(-2)


def _begin(q: Tensor, v: Tensor, memories: Tensor | None, read_scales: Tensor) -> Tensor:
    """A new state [B, H, N, K, V], safe to change in place, from memories [B, N, H, K, V]; None: zeros."""
    if memories is not None:
        return memories.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    batch, _, heads, _, width = q.shape
    return read_scales.new_zeros(batch, heads, read_scales.shape[-1], width, v.shape[-1])


def _place(whole: Tensor | None, like: Tensor, part: slice, piece: Tensor) -> Tensor:
    """Copy a group's `piece` into `whole`, which has the form of `like` and starts as zeros (None: not yet created)."""
    if piece.shape == like.shape:
        return piece.to(like.dtype)
    if whole is None:
        whole = torch.zeros_like(like, memory_format=torch.contiguous_format)
    whole[:, part.start : part.start + piece.shape[1]] = piece
    return whole


def _cut(q: Tensor, v: Tensor, memories: Tensor | None, read_scales: Tensor) -> list[tuple[slice, slice]]:
    """The segments of each group, and which of them are read.

    On a CPU, the first segment of a call with empty memory is not read, since the result is zeros. On a GPU it is: one
    more segment costs less than copying the tensors without their first segment.
    """
    group, num_segments = choose_group(q, read_scales.shape[-1], v.shape[-1]), q.shape[1]
    parts = [slice(begin, min(begin + group, num_segments)) for begin in range(0, num_segments, group)]
    first = int(memories is None and q.device.type == "cpu")
    return [(part, slice(max(first, part.start), part.stop)) for part in parts]


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
    keeps_updates = learns and delta_scales is not None
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
        return q.new_empty(0) if t is None else t.new_empty(t.shape)

    rest = (q, k, for_reads, memories, read_scales, sum_scales, delta_scales, decay, written_keys)
    return tuple(like(t) for t in rest)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, num_writes, _ = inputs
    _, _, _, checkpoints, updates = output
    if inputs[7] is not None:  # with the delta rule, save u instead of v
        tensors[2] = updates
    ctx.save_for_backward(*tensors, checkpoints)
    ctx.num_writes = num_writes
    ctx.like = output[0].shape, output[0].dtype
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
    shape, dtype = ctx.like
    reads = q.new_zeros(shape, dtype=dtype) if for_reads is None else for_reads
    for_q, for_k, for_v, for_memories, for_c, *others = backward(
        reads, for_sums, for_end, q, k, updates, memories, read_scales, slots, sum_scales, delta_scales, decay,
        written_keys, checkpoints, ctx.num_writes,
    )  # fmt: skip
    given = zip(others, (sum_scales, delta_scales, decay, written_keys), strict=True)
    found = [None if t is None else gradient for gradient, t in given]
    return for_q, for_k, for_v, None if memories is None else for_memories, for_c, None, *found, None, None


# Under torch.compile backward must be a custom op, too: tracing it would launch kernels on fake tensors.
compiled_scan.register_autograd(partial(_differentiate_by, _compiled_backward), setup_context=_keep)


class Scan(torch.autograd.Function):
    """`scan` with its backward."""

    forward = staticmethod(scan)
    setup_context = staticmethod(_keep)
    backward = staticmethod(kernels.differentiate_once(partial(_differentiate_by, scan_backward)))  # pyright: ignore[reportAssignmentType]
