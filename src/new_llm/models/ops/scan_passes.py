"""Forward and backward of `memory_scan`, group by group; the legend is there."""

from typing import Any

import torch
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from new_llm.models.ops.chain import Chain


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
    num_writes: int,
    group: int,
    learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Reads, reads of the sum, end, states at the groups' first segments but the first, u of all written segments."""
    call = Chain(k, delta_scales, decay, slots, read_scales.shape[-1], num_writes, read_scales.dtype)
    state = call.begin(memories, v)
    reads = torch.empty_like(v, memory_format=torch.contiguous_format)
    sum_reads = torch.empty_like(reads) if sum_scales is not None else v.new_empty(0)
    kept: list[Tensor] = []
    updates: list[Tensor] = []
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
    checkpoints: Tensor,
    num_writes: int,
    group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, memories, c, t and e."""
    call = Chain(k, delta_scales, decay, slots, read_scales.shape[-1], num_writes, read_scales.dtype)
    g = for_end.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # ∂L/∂X, [B, H, N, K, V]
    for_q, for_k = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k))
    for_v = torch.zeros_like(for_reads, memory_format=torch.contiguous_format)
    for_c = torch.zeros_like(read_scales, memory_format=torch.contiguous_format)
    for_t, for_e = (
        g.new_empty(0) if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format)
        for t in (sum_scales, delta_scales)
    )
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
        call.retreat(g, states, updates, from_reads, part, for_k, for_v, for_e)
    for_memories = (
        g.new_empty(0) if memories is None else g.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    )
    return for_q, for_k, for_v, for_memories, for_c, for_t, for_e


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
def _(q, k, v, memories, read_scales, slots, sum_scales, delta_scales, decay, num_writes, group, learns):
    batch, num_segments, heads, length, width = q.shape
    num_memories, value_width = read_scales.shape[-1], v.shape[-1]
    wide = read_scales.dtype
    reads = v.new_empty(v.shape)
    sum_reads = v.new_empty(v.shape if sum_scales is not None else 0)
    end = v.new_empty((batch, num_memories, heads, width, value_width), dtype=wide)
    num_kept = -(-num_segments // group) - 1 if learns else 0
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
    *_,
):
    def like(t: Tensor | None) -> Tensor:
        return for_end.new_empty(0) if t is None else t.new_empty(t.shape)

    return like(q), like(k), like(for_reads), like(memories), like(read_scales), like(sum_scales), like(delta_scales)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, memories, read_scales, slots, sum_scales, delta_scales, decay, num_writes, group, _ = inputs
    _, _, _, checkpoints, updates = output
    updates = v if delta_scales is None else updates
    ctx.save_for_backward(q, k, updates, memories, read_scales, slots, sum_scales, delta_scales, decay, checkpoints)
    ctx.numbers = num_writes, group
    ctx.like = output[0].shape, output[0].dtype, output[2].shape, output[2].dtype
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, for_reads: Tensor | None, for_sums: Tensor | None, for_end: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    q, k, updates, memories, read_scales, slots, sum_scales, delta_scales, decay, checkpoints = ctx.saved_tensors
    shape, dtype, end_shape, end_dtype = ctx.like
    reads = q.new_zeros(shape, dtype=dtype) if for_reads is None else for_reads
    sums = for_sums
    if sums is None:
        sums = reads.new_zeros(0) if sum_scales is None else torch.zeros_like(reads)
    end = q.new_zeros(end_shape, dtype=end_dtype) if for_end is None else for_end
    backward = _compiled_backward if torch.compiler.is_compiling() else scan_backward
    for_q, for_k, for_v, for_memories, for_c, for_t, for_e = backward(
        reads, sums, end, q, k, updates, memories, read_scales, slots, sum_scales, delta_scales, decay,
        checkpoints, *ctx.numbers,
    )  # fmt: skip
    return (
        for_q,
        for_k,
        for_v,
        None if memories is None else for_memories,
        for_c,
        None,
        None if sum_scales is None else for_t,
        None if delta_scales is None else for_e,
        None,
        None,
        None,
        None,
    )


compiled_scan.register_autograd(_differentiate, setup_context=_keep)


class Scan(torch.autograd.Function):
    """`scan` with its derivatives."""

    forward = staticmethod(scan)
    setup_context = staticmethod(_keep)
    backward = staticmethod(once_differentiable(_differentiate))  # pyright: ignore[reportAssignmentType]
