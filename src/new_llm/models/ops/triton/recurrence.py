"""The chain of memories over the segments of a call, and the chain of their gradients back.

Legend as in `new_llm.models.ops.chain`: states [B, H, N, K, V], g segments, w of them written.

Columns of M never meet in the recurrence, so a program takes all K rows of some columns of one head's memories and goes
through the segments alone. With K = 512 a tile is [512, 32]: 64 registers of float32 a thread at 8 warps, and 32 KB in
shared memory as a dot's operand. The state lies in global memory between segments, where it stays in the L2 cache.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import triton
import triton.language as tl
from torch import Tensor

from new_llm.models.ops.triton.shapes import choose_block, choose_operand, choose_precision

TILE_SIZE = 512 * 32
"""Numbers of a memory's tile."""


@triton.jit
def _delta_kernel(
    state_ptr, states_ptr, left_ptr, right_ptr, value_ptr, update_ptr, add_ptr, decay_ptr, slot_ptr,
    num_writes, num_states, num_unread, num_added, heads, length, width, value_width,
    N: tl.constexpr, IS_BACKWARD: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_ADD: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64) // heads
    h = tl.program_id(1).to(tl.int64) % heads
    rows = tl.arange(0, BLOCK_K)
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_row = rows < width
    is_column = columns < value_width
    is_tile = is_row[:, None] & is_column[None, :]
    tile = rows[:, None] * value_width + columns[None, :]
    size = width * value_width
    mine = state_ptr + (b * heads + h) * N * size + tile
    for turn in range(num_writes):
        i = turn
        if IS_BACKWARD:
            i = num_writes - 1 - turn
        slot = tl.load(slot_ptr + b * num_writes + i)
        if not IS_BACKWARD:
            for m in range(N):
                seen = tl.load(mine + m * size, mask=is_tile, other=0.0)
                place = states_ptr + (((b * num_states + i) * heads + h) * N + m) * size + tile
                tl.store(place, seen.to(states_ptr.dtype.element_ty), mask=is_tile)
        state = tl.load(mine + slot * size, mask=is_tile, other=0.0)
        narrow = state.to(left_ptr.dtype.element_ty)
        if IS_BACKWARD:
            tl.store(states_ptr + ((b * num_writes + i) * heads + h) * size + tile, narrow, mask=is_tile)
        if HAS_DECAY:
            state *= tl.load(decay_ptr + (b * num_writes + i) * heads + h)
        segment = (b * num_writes + i) * heads + h
        for begin in range(0, length, BLOCK_S):
            tokens = begin + tl.arange(0, BLOCK_S)
            is_token = tokens < length
            keys = (segment * length + tokens[:, None]) * width + rows[None, :]
            is_key = is_token[:, None] & is_row[None, :]
            values = (segment * length + tokens[:, None]) * value_width + columns[None, :]
            is_value = is_token[:, None] & is_column[None, :]
            left = tl.load(left_ptr + keys, mask=is_key, other=0.0)
            right = tl.trans(tl.load(right_ptr + keys, mask=is_key, other=0.0).to(OPERAND))
            read = tl.dot(left.to(OPERAND), narrow.to(OPERAND), input_precision=PRECISION)
            if IS_BACKWARD:
                update = read.to(update_ptr.dtype.element_ty)
                state -= tl.dot(right, update.to(OPERAND), input_precision=PRECISION)
            else:
                value = tl.load(value_ptr + values, mask=is_value, other=0.0).to(tl.float32)
                update = (value - read).to(update_ptr.dtype.element_ty)
                state = tl.dot(right, update.to(OPERAND), acc=state, input_precision=PRECISION)
            tl.store(update_ptr + values, update, mask=is_value)
        tl.debug_barrier()  # all threads have read the state's tile
        tl.store(mine + slot * size, state, mask=is_tile)
        tl.debug_barrier()  # what one thread stores another may load
        if HAS_ADD:
            if i >= num_unread:
                for m in range(N):
                    place = add_ptr + (((b * num_added + i - num_unread) * heads + h) * N + m) * size + tile
                    added = tl.load(place, mask=is_tile, other=0.0).to(tl.float32)
                    summed = tl.load(mine + m * size, mask=is_tile, other=0.0) + added
                    tl.store(mine + m * size, summed, mask=is_tile)
            tl.debug_barrier()


@triton.jit
def _sum_kernel(
    state_ptr, states_ptr, product_ptr, decay_ptr, slot_ptr,
    num_writes, num_states, num_unread, num_added, heads, size,
    N: tl.constexpr, IS_BACKWARD: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64) // heads
    h = tl.program_id(1).to(tl.int64) % heads
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_tile = tile < size
    mine = state_ptr + (b * heads + h) * N * size + tile  # every number is one thread's alone: no barriers
    for turn in range(num_writes):
        i = turn
        if IS_BACKWARD:
            i = num_writes - 1 - turn
        slot = tl.load(slot_ptr + b * num_writes + i)
        if not IS_BACKWARD:
            for m in range(N):
                seen = tl.load(mine + m * size, mask=is_tile, other=0.0)
                place = states_ptr + (((b * num_states + i) * heads + h) * N + m) * size + tile
                tl.store(place, seen.to(states_ptr.dtype.element_ty), mask=is_tile)
        state = tl.load(mine + slot * size, mask=is_tile, other=0.0)
        if IS_BACKWARD:
            place = states_ptr + ((b * num_writes + i) * heads + h) * size + tile
            tl.store(place, state.to(states_ptr.dtype.element_ty), mask=is_tile)
        if HAS_DECAY:
            state *= tl.load(decay_ptr + (b * num_writes + i) * heads + h)
        if not IS_BACKWARD:
            state += tl.load(product_ptr + ((b * num_writes + i) * heads + h) * size + tile, mask=is_tile, other=0.0)
        tl.store(mine + slot * size, state, mask=is_tile)
        if HAS_ADD and i >= num_unread:
            for m in range(N):
                place = product_ptr + (((b * num_added + i - num_unread) * heads + h) * N + m) * size + tile
                added = tl.load(place, mask=is_tile, other=0.0).to(tl.float32)
                summed = tl.load(mine + m * size, mask=is_tile, other=0.0) + added
                tl.store(mine + m * size, summed, mask=is_tile)


def write_with_delta(
    state: Tensor,
    states: Tensor,
    left: Tensor,
    right: Tensor,
    values: Tensor | None,
    decay: Tensor | None,
    slots: Tensor,
    *,
    added: Tensor | None = None,
    num_unread: int = 0,
) -> Tensor:
    """The chain with the delta rule, forwards with values or, without, backwards.

    Forwards: u_i = v_i − left_i X, X ← d_i X + right_iᵀ u_i. Backwards, from the last segment to the first:
    u_i = left_i G, G ← d_i G − right_iᵀ u_i, then all memories' G grow by `added`.

    Args:
        state: X or G, [B, H, N, K, V] float32, changed in place.
        states: takes X of all memories before each segment, [B, g ≥ w, H, N, K, V], or backwards G of the written
            memory before its change, [B, w, H, K, V].
        left: e k forwards, k backwards, [B, w, H, S, K].
        right: k forwards, e k backwards, likewise.
        values: v, [B, w, H, S, V]; None: backwards.
        decay: d, [B, w, H]; None: 1.
        slots: [B, w].
        added: what G grows by, [B, w − num_unread, H, N, K, V].
        num_unread: first segments for which G does not grow.

    Returns:
        u, [B, w, H, S, V] in left's dtype.
    """
    batch, heads, num_memories, width, value_width = state.shape
    num_writes, length = left.shape[1], left.shape[3]
    left, right, slots = left.contiguous(), right.contiguous(), slots.contiguous()
    updates = left.new_empty(batch, num_writes, heads, length, value_width)
    block_k = choose_block(width, triton.next_power_of_2(width))
    block_v = choose_block(value_width, min(64, max(16, TILE_SIZE // block_k)))
    block_s = choose_block(length, 32 if block_k * left.element_size() <= 2048 else 16)
    grid = (triton.cdiv(value_width, block_v), batch * heads)
    _delta_kernel[grid](
        state, states, left, right, updates if values is None else values.contiguous(), updates,
        state if added is None else added.contiguous(), state if decay is None else decay.contiguous(), slots,
        num_writes, states.shape[1], num_unread, 0 if added is None else added.shape[1],
        heads, length, width, value_width,
        N=num_memories, IS_BACKWARD=values is None, HAS_DECAY=decay is not None, HAS_ADD=added is not None,
        PRECISION=choose_precision(left), OPERAND=choose_operand(left),
        BLOCK_S=block_s, BLOCK_K=block_k, BLOCK_V=block_v,
        num_warps=8 if block_k * block_v > 64 * 64 else 4, num_stages=1,
    )  # fmt: skip
    return updates


def write_sums(
    state: Tensor,
    states: Tensor,
    products: Tensor | None,
    decay: Tensor | None,
    slots: Tensor,
    *,
    added: Tensor | None = None,
    num_unread: int = 0,
) -> None:
    """The chain without the delta rule: X ← d_i X + P_i, or backwards G ← d_i G, then all memories' G grow by `added`.

    Args:
        products: P, [B, w, H, K, V] float32; None: backwards.
        state, states, decay, slots, added, num_unread: as in `write_with_delta`.
    """
    batch, heads, num_memories, width, value_width = state.shape
    slots = slots.contiguous()
    operand = products if products is not None else state if added is None else added
    block = choose_block(width * value_width, 1024)
    grid = (triton.cdiv(width * value_width, block), batch * heads)
    _sum_kernel[grid](
        state, states, operand.contiguous(), state if decay is None else decay.contiguous(), slots,
        slots.shape[1], states.shape[1], num_unread, 0 if added is None else added.shape[1],
        heads, width * value_width,
        N=num_memories, IS_BACKWARD=products is None, HAS_DECAY=decay is not None, HAS_ADD=added is not None,
        BLOCK=block, num_warps=4,
    )  # fmt: skip
