"""Triton kernels: the chain of memories over the segments of a call, forwards and back, and local linear attention.

Legend as in `new_llm.models.ops.memory_scan`: states [B, H, N, K, V], g segments, w of them written.

Columns of M never meet in the recurrence, so a program takes all K rows of some columns of one head's memories and goes
through the segments alone. With K = 512 a tile is [512, 32]: 64 registers of float32 a thread at 8 warps, and 32 KB in
shared memory as a dot's operand. The state lies in global memory between segments, where it stays in the L2 cache.

Local attention and its gradients are all sums over the tokens on one side of the diagonal,
O_a = Σ_b (x_a·y_b + row_a + col_b) z_b, over b ≤ a or over b ≥ a. A program makes a tile of O, BLOCK_A tokens by
BLOCK_Z columns. Programs of other columns make the products x·y again: that costs work but no memory.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from new_llm.models.ops.kernels import TRITON_DTYPES, check_tensor

LEAST_BLOCK = 16
"""The least side of a tile that a dot takes."""
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
def _plain_kernel(
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
    values = None if values is None else values.contiguous()
    for name, t in (("left", left), ("right", right)):
        _check_operand(name, t, (batch, num_writes, heads, length, width), left.dtype, state.device)
    if values is not None:
        _check_operand("values", values, (batch, num_writes, heads, length, value_width), values.dtype, state.device)
    added, decay = _check_chain(
        state, states, slots, decay, added, num_writes, num_unread, is_forward=values is not None
    )
    updates = left.new_empty(batch, num_writes, heads, length, value_width)
    block_k = choose_block(width, triton.next_power_of_2(width))
    block_v = choose_block(value_width, min(64, max(16, TILE_SIZE // block_k)))
    block_s = choose_block(length, 32 if block_k * left.element_size() <= 2048 else 16)
    grid = (triton.cdiv(value_width, block_v), batch * heads)
    _delta_kernel[grid](
        state, states, left, right, updates if values is None else values, updates,
        state if added is None else added, state if decay is None else decay, slots,
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
    slots, num_writes = slots.contiguous(), slots.shape[1]
    products = None if products is None else products.contiguous()
    if products is not None:
        check_tensor("products", products, (batch, num_writes, heads, width, value_width), torch.float32, state.device)
    is_forward = products is not None
    added, decay = _check_chain(state, states, slots, decay, added, num_writes, num_unread, is_forward=is_forward)
    operand = products if products is not None else state if added is None else added
    block = choose_block(width * value_width, 1024)
    grid = (triton.cdiv(width * value_width, block), batch * heads)
    _plain_kernel[grid](
        state, states, operand, state if decay is None else decay, slots,
        num_writes, states.shape[1], num_unread, 0 if added is None else added.shape[1],
        heads, width * value_width,
        N=num_memories, IS_BACKWARD=products is None, HAS_DECAY=decay is not None, HAS_ADD=added is not None,
        BLOCK=block, num_warps=4,
    )  # fmt: skip


def _check_operand(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check_tensor(name, t, shape, dtype, device)
    if dtype not in TRITON_DTYPES:
        raise ValueError(f"{name}: {dtype} is not one of the kernels' dtypes, {TRITON_DTYPES}")


def _check_chain(
    state: Tensor,
    states: Tensor,
    slots: Tensor,
    decay: Tensor | None,
    added: Tensor | None,
    num_writes: int,
    num_unread: int,
    *,
    is_forward: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Check what both chains take, and return `added` and `decay`, contiguous."""
    batch, heads, num_memories, width, value_width = state.shape
    check_tensor("state", state, state.shape, torch.float32, state.device)
    memories = (num_memories,) if is_forward else ()
    shape = (batch, states.shape[1], heads, *memories, width, value_width)
    _check_operand("states", states, shape, states.dtype, state.device)
    if states.shape[1] < num_writes:
        raise ValueError(f"states: room for {states.shape[1]} segments; {num_writes} are written")
    check_tensor("slots", slots, (batch, num_writes), torch.int64, state.device)
    if decay is not None:
        decay = decay.contiguous()
        check_tensor("decay", decay, (batch, num_writes, heads), torch.float32, state.device)
    if added is not None:
        added = added.contiguous()
        shape = (batch, num_writes - num_unread, heads, num_memories, width, value_width)
        _check_operand("added", added, shape, added.dtype, state.device)
    return added, decay


# Local attention


@triton.jit
def _attention_kernel(
    x_ptr, y_ptr, z_ptr, row_ptr, col_ptr, products_ptr, keys_ptr, out_ptr, sum_ptr,
    length, x_width, z_width, epsilon,
    FROM_AHEAD: tl.constexpr, HAS_ROW: tl.constexpr, HAS_COL: tl.constexpr, HAS_INITIAL: tl.constexpr,
    NORMALIZES: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    x_ptr += batch * length * x_width
    y_ptr += batch * length * x_width
    z_ptr += batch * length * z_width
    out_ptr += batch * length * z_width
    a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    columns = tl.program_id(1) * BLOCK_Z + tl.arange(0, BLOCK_Z)
    is_a = a < length
    is_column = columns < z_width
    out = tl.zeros((BLOCK_A, BLOCK_Z), tl.float32)
    sums = tl.zeros((BLOCK_A,), tl.float32)
    row = tl.zeros((BLOCK_A,), tl.float32)
    if HAS_ROW:
        row = tl.load(row_ptr + batch * length + a, mask=is_a, other=0.0)
    if HAS_INITIAL:
        for x_begin in range(0, x_width, BLOCK_X):
            inner = x_begin + tl.arange(0, BLOCK_X)
            is_inner = inner < x_width
            x = tl.load(
                x_ptr + a[:, None] * x_width + inner[None, :], mask=is_a[:, None] & is_inner[None, :], other=0.0
            ).to(tl.float32)
            products = tl.load(
                products_ptr + batch * x_width * z_width + inner[:, None] * z_width + columns[None, :],
                mask=is_inner[:, None] & is_column[None, :],
                other=0.0,
            )
            keys = tl.load(keys_ptr + batch * x_width + inner, mask=is_inner, other=0.0)
            out = tl.dot(x, products, acc=out, input_precision=PRECISION)
            sums += tl.sum(x * keys[None, :], axis=1)
    first = 0
    last = tl.minimum(length, (tl.program_id(0) + 1) * BLOCK_A)
    if FROM_AHEAD:
        first = (tl.program_id(0) * BLOCK_A) // BLOCK_B * BLOCK_B
        last = length
    for b_begin in range(first, last, BLOCK_B):
        b = b_begin + tl.arange(0, BLOCK_B)
        is_b = b < length
        scores = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
        for x_begin in range(0, x_width, BLOCK_X):
            inner = x_begin + tl.arange(0, BLOCK_X)
            is_inner = inner < x_width
            x = tl.load(
                x_ptr + a[:, None] * x_width + inner[None, :], mask=is_a[:, None] & is_inner[None, :], other=0.0
            )
            y = tl.load(
                y_ptr + b[:, None] * x_width + inner[None, :], mask=is_b[:, None] & is_inner[None, :], other=0.0
            )
            scores = tl.dot(x.to(OPERAND), tl.trans(y.to(OPERAND)), acc=scores, input_precision=PRECISION)
        if HAS_ROW:
            scores += row[:, None]
        if HAS_COL:
            scores += tl.load(col_ptr + batch * length + b, mask=is_b, other=0.0)[None, :]
        is_seen = b[None, :] >= a[:, None] if FROM_AHEAD else b[None, :] <= a[:, None]
        scores = tl.where(is_seen & is_b[None, :], scores, 0.0)
        z = tl.load(z_ptr + b[:, None] * z_width + columns[None, :], mask=is_b[:, None] & is_column[None, :], other=0.0)
        weights = scores.to(z_ptr.dtype.element_ty).to(OPERAND)
        out = tl.dot(weights, z.to(OPERAND), acc=out, input_precision=PRECISION)
        sums += tl.sum(scores, axis=1)
    if NORMALIZES:
        out = out / tl.maximum(sums, epsilon)[:, None]
        if tl.program_id(1) == 0:
            tl.store(sum_ptr + batch * length + a, sums, mask=is_a)
    place = out_ptr + a[:, None] * z_width + columns[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=is_a[:, None] & is_column[None, :])


def sum_causally(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    *,
    row: Tensor | None = None,
    col: Tensor | None = None,
    initial: tuple[Tensor, Tensor] | None = None,
    epsilon: float | None = None,
    from_ahead: bool = False,
) -> tuple[Tensor, Tensor]:
    """O_a = Σ_b (x_a·y_b + row_a + col_b) z_b over b ≤ a, or over b ≥ a.

    Args:
        x: [G, S, X].
        y: [G, S, X].
        z: [G, S, Z].
        row: [G, S] float32.
        col: [G, S] float32.
        initial: P [G, X, Z] and s [G, X], float32: O_a grows by x_a P, and the sum of weights by x_a·s.
        epsilon: divide O_a by its sum of weights, at least ε; None: don't.
        from_ahead: sum over b ≥ a.

    Returns:
        O in z's dtype, and with `epsilon` the sums of weights [G, S], float32.
    """
    x, y, z = (t.contiguous() for t in (x, y, z))
    groups, length, x_width = x.shape
    z_width = z.shape[-1]
    _check_operand("x", x, x.shape, x.dtype, z.device)
    _check_operand("y", y, x.shape, y.dtype, z.device)
    _check_operand("z", z, (groups, length, z_width), z.dtype, z.device)
    row, col = (None if t is None else t.contiguous() for t in (row, col))
    for name, t in (("row", row), ("col", col)):
        if t is not None:
            check_tensor(name, t, (groups, length), torch.float32, z.device)
    out = torch.empty_like(z)
    sums = torch.empty(groups, length, dtype=torch.float32, device=z.device)
    products, keys = (out, sums) if initial is None else (t.contiguous() for t in initial)
    if initial is not None:
        check_tensor("products", products, (groups, x_width, z_width), torch.float32, z.device)
        check_tensor("keys", keys, (groups, x_width), torch.float32, z.device)
    block = choose_block(length, 64)
    block_x, block_z = choose_block(x_width, 64), choose_block(z_width, 128)
    grid = (triton.cdiv(length, block), triton.cdiv(z_width, block_z), groups)
    _attention_kernel[grid](
        x, y, z,
        sums if row is None else row, sums if col is None else col,
        products, keys, out, sums,
        length, x_width, z_width, 0.0 if epsilon is None else epsilon,
        FROM_AHEAD=from_ahead, HAS_ROW=row is not None, HAS_COL=col is not None, HAS_INITIAL=initial is not None,
        NORMALIZES=epsilon is not None, PRECISION=choose_precision(x), OPERAND=choose_operand(x),
        BLOCK_A=block, BLOCK_B=block, BLOCK_X=block_x, BLOCK_Z=block_z,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, sums


# Tiles


def choose_block(size: int, most: int) -> int:
    """The power of 2 that holds `size`, within 16 … `most`."""
    return min(max(triton.next_power_of_2(size), LEAST_BLOCK), most)


def choose_precision(t: Tensor) -> str:
    """How dots of float32 multiply: as torch's own products do. Other dtypes don't ask."""
    allows_tf32 = t.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allows_tf32 else "ieee"


def choose_operand(t: Tensor) -> Any:
    """The type of the dots' operands: the tensors' own, but float32 in the interpreter, which can't multiply bfloat16.

    Numbers are rounded to the tensors' type first, so that both give the same but for the order of sums.
    """
    is_interpreted = triton.knobs.runtime.interpret
    return tl.bfloat16 if t.dtype == torch.bfloat16 and not is_interpreted else tl.float32
