"""Triton kernels: the memory recurrence and its backward, chunk inverses, local linear attention, and the head's loss.

Legend as in `new_llm.models.ops.memory_scan`: states [B, H, N, K, V], g segments, w of them written.

Memory recurrence: the columns of M are independent, so each program takes all K rows of some columns of one head's
memories and runs through all segments. A single memory stays in registers throughout: with K = 512, a [512, 32] tile
takes 64 float32 registers per thread at 8 warps. With several memories, the one written is loaded and stored at each
segment and stays in the L2 cache. The next tokens' keys are loaded while the current ones are multiplied.

Local attention and its gradients are sums over the tokens on one side of the diagonal,
O_a = Σ_b (x_a·y_b + row_a + col_b) z_b, over b ≤ a or b ≥ a. Each program computes a tile of O, BLOCK_A tokens by
BLOCK_Z columns. Up to 512 columns fit in one tile, so the products x·y are computed once.

The head's loss has one program per row of logits. It passes over the vocabulary twice: once for the sum, once to
replace the logits by their gradients, when the row is still in the L2 cache.

All grids have a single axis, because only the first axis has a limit (2³¹ − 1) that no call reaches; the others are
limited to 65,535.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from new_llm.models.ops.kernels import TRITON_DTYPES, check_tensor

LEAST_BLOCK = 16
"""Minimum side of a tile in `tl.dot`."""
TILE_SIZE = 512 * 32
"""Maximum number of elements in a memory's tile, unless K > 1024."""
KEY_TILE_BYTES = 2**15
"""Maximum bytes of a tile of keys; two tiles, the current and the next, are in shared memory."""
HALF_OF_PROCESSORS = 66
"""Half of an H100's 132 multiprocessors; with fewer programs than that, tiles are made narrower."""


@triton.jit
def _add_to_memories(mine, added, is_tile, size, N: tl.constexpr):
    """Add the values at `added` to all N memories."""
    for m in range(N):
        change = tl.load(added + m * size, mask=is_tile, other=0.0).to(tl.float32)
        grown = tl.load(mine + m * size, mask=is_tile, other=0.0) + change
        tl.debug_barrier()  # as in `_end_turn`
        tl.store(mine + m * size, grown, mask=is_tile)


@triton.jit
def _copy_memories(mine, states, is_tile, size, N: tl.constexpr):
    """Copy all N memories, as they are before a segment, to `states`, rounded to its dtype."""
    for m in range(N):
        seen = tl.load(mine + m * size, mask=is_tile, other=0.0)
        tl.store(states + m * size, seen.to(states.dtype.element_ty), mask=is_tile)


@triton.jit
def _end_turn(state, mine, added, is_tile, slot, size, grows, N: tl.constexpr, HAS_ADD: tl.constexpr):
    """Store the memory written, if there are several (a single one stays in registers); if `grows`, add `added`."""
    if N > 1:
        tl.debug_barrier()  # all threads must have read: loads and stores split a tile between threads differently
        tl.store(mine + slot * size, state, mask=is_tile)
        tl.debug_barrier()  # what one thread has stored, another may load
        if HAS_ADD and grows:
            _add_to_memories(mine, added, is_tile, size, N)
        tl.debug_barrier()
    elif HAS_ADD and grows:
        state += tl.load(added, mask=is_tile, other=0.0).to(tl.float32)
    return state


@triton.jit
def _write_block(
    state, narrow, left_ptr, right_ptr, scale_ptr, value_ptr, update_ptr, segment, begin, rows, columns, length,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, IS_BACKWARD: tl.constexpr, SHARES_KEYS: tl.constexpr,
    HAS_SCALE: tl.constexpr, OPERAND: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The memory's tile after writing BLOCK_S tokens of a segment; their errors are computed from `narrow`."""
    tokens = begin + tl.arange(0, BLOCK_S)
    is_token = tokens < length
    keys = (segment * length + tokens[:, None]) * WIDTH + rows[None, :]
    is_key = is_token[:, None] & (rows < WIDTH)[None, :]
    values = (segment * length + tokens[:, None]) * VALUE_WIDTH + columns[None, :]
    is_value = is_token[:, None] & (columns < VALUE_WIDTH)[None, :]
    left = tl.load(left_ptr + keys, mask=is_key, other=0.0).to(OPERAND)
    right = left
    if not SHARES_KEYS:
        right = tl.load(right_ptr + keys, mask=is_key, other=0.0).to(OPERAND)
    read = tl.dot(left, narrow.to(OPERAND), input_precision="tf32x3")
    scaled = read
    if HAS_SCALE:
        scaled *= tl.load(scale_ptr + segment * length + tokens, mask=is_token, other=0.0)[:, None]
    if IS_BACKWARD:
        update = read.to(update_ptr.dtype.element_ty)
        written = (-scaled).to(update_ptr.dtype.element_ty)
    else:
        value = tl.load(value_ptr + values, mask=is_value, other=0.0).to(tl.float32)
        update = (value - scaled).to(update_ptr.dtype.element_ty)
        written = update
    tl.store(update_ptr + values, update, mask=is_value)
    return tl.dot(tl.trans(right), written.to(OPERAND), acc=state, input_precision="tf32x3")


# With num_writes specialised to 1, Triton 3.6 would unroll the loop, and ptxas 12.8 then generates code that reads an
# uninitialised register.
@triton.jit(do_not_specialize=["num_writes"])
def _delta_kernel(
    state_ptr, states_ptr, left_ptr, right_ptr, scale_ptr, value_ptr, update_ptr, add_ptr, decay_ptr, slot_ptr,
    num_writes, num_states, num_unread, num_added, heads, length,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, N: tl.constexpr,
    IS_BACKWARD: tl.constexpr, SHARES_KEYS: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_ADD: tl.constexpr,
    HAS_SCALE: tl.constexpr, IS_ONE_BLOCK: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    num_columns: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    b = (tl.program_id(0) // num_columns).to(tl.int64) // heads
    h = (tl.program_id(0) // num_columns).to(tl.int64) % heads
    rows = tl.arange(0, BLOCK_K)
    columns = tl.program_id(0) % num_columns * BLOCK_V + tl.arange(0, BLOCK_V)
    is_row = rows < WIDTH
    is_column = columns < VALUE_WIDTH
    is_tile = is_row[:, None] & is_column[None, :]
    tile = rows[:, None] * VALUE_WIDTH + columns[None, :]
    size: tl.constexpr = WIDTH * VALUE_WIDTH
    mine = state_ptr + (b * heads + h) * N * size + tile
    if N == 1:
        state = tl.load(mine, mask=is_tile, other=0.0)
    for turn in range(num_writes):
        i = turn
        if IS_BACKWARD:
            i = num_writes - 1 - turn
        segment = (b * num_writes + i) * heads + h
        found = states_ptr + ((b * num_states + i) * heads + h) * (1 if IS_BACKWARD else N) * size + tile
        slot = 0
        if N > 1:
            slot = tl.load(slot_ptr + b * num_writes + i)
            if not IS_BACKWARD:
                _copy_memories(mine, found, is_tile, size, N)
            state = tl.load(mine + slot * size, mask=is_tile, other=0.0)
        narrow = state.to(states_ptr.dtype.element_ty)
        if N == 1 or IS_BACKWARD:
            tl.store(found, narrow, mask=is_tile)
        if HAS_DECAY:
            state *= tl.load(decay_ptr + segment)
        if IS_ONE_BLOCK:  # without an inner loop, the next segment's keys are loaded while these are multiplied
            state = _write_block(
                state, narrow, left_ptr, right_ptr, scale_ptr, value_ptr, update_ptr, segment, 0, rows, columns, length,
                WIDTH, VALUE_WIDTH, IS_BACKWARD, SHARES_KEYS, HAS_SCALE, OPERAND, BLOCK_S,
            )  # fmt: skip
        else:
            for begin in range(0, length, BLOCK_S):
                state = _write_block(
                    state, narrow, left_ptr, right_ptr, scale_ptr, value_ptr, update_ptr, segment, begin, rows, columns,
                    length, WIDTH, VALUE_WIDTH, IS_BACKWARD, SHARES_KEYS, HAS_SCALE, OPERAND, BLOCK_S,
                )  # fmt: skip
        added = add_ptr + ((b * num_added + i - num_unread) * heads + h) * N * size + tile
        state = _end_turn(state, mine, added, is_tile, slot, size, i >= num_unread, N, HAS_ADD)
    if N == 1:
        tl.store(mine, state, mask=is_tile)


@triton.jit
def _plain_kernel(
    state_ptr, states_ptr, product_ptr, add_ptr, decay_ptr, slot_ptr,
    num_writes, num_states, num_unread, num_added, heads, size,
    N: tl.constexpr, IS_BACKWARD: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(size, BLOCK)
    b = (tl.program_id(0) // num_tiles).to(tl.int64) // heads
    h = (tl.program_id(0) // num_tiles).to(tl.int64) % heads
    tile = tl.program_id(0) % num_tiles * BLOCK + tl.arange(0, BLOCK)
    is_tile = tile < size
    mine = state_ptr + (b * heads + h) * N * size + tile
    if N == 1:
        state = tl.load(mine, mask=is_tile, other=0.0)
    for turn in range(num_writes):
        i = turn
        if IS_BACKWARD:
            i = num_writes - 1 - turn
        segment = (b * num_writes + i) * heads + h
        found = states_ptr + ((b * num_states + i) * heads + h) * (1 if IS_BACKWARD else N) * size + tile
        slot = 0
        if N > 1:
            slot = tl.load(slot_ptr + b * num_writes + i)
            if not IS_BACKWARD:
                _copy_memories(mine, found, is_tile, size, N)
            state = tl.load(mine + slot * size, mask=is_tile, other=0.0)
        if N == 1 or IS_BACKWARD:
            tl.store(found, state.to(states_ptr.dtype.element_ty), mask=is_tile)
        if HAS_DECAY:
            state *= tl.load(decay_ptr + segment)
        if not IS_BACKWARD:
            state += tl.load(product_ptr + segment * size + tile, mask=is_tile, other=0.0)
        added = add_ptr + ((b * num_added + i - num_unread) * heads + h) * N * size + tile
        state = _end_turn(state, mine, added, is_tile, slot, size, i >= num_unread, N, HAS_ADD)
    if N == 1:
        tl.store(mine, state, mask=is_tile)


def write_with_delta(
    state: Tensor,
    states: Tensor,
    keys: Tensor,
    written_keys: Tensor | None,
    scales: Tensor | None,
    values: Tensor | None,
    decay: Tensor | None,
    slots: Tensor,
    *,
    added: Tensor | None = None,
    num_unread: int = 0,
) -> Tensor:
    """The chain with the delta rule: forward if values are given, else backward.

    Forward: u_i = v_i − e_i k_i X, X ← d_i X + k'_iᵀ u_i. Backward, from the last segment to the first: u_i = k'_i G,
    G ← d_i G − k_iᵀ e_i u_i, then `added` is added to G of all memories.

    Args:
        state: X or G, [B, H, N, K, V] float32, changed in place.
        states: output, in the keys' dtype. Forward: X of all memories before each segment, [B, g ≥ w, H, N, K, V].
            Backward: G of the written memory before its change, [B, w, H, K, V].
        keys: k, [B, w, H, S, K].
        written_keys: k', [B, w, H, S, K]; None: k.
        scales: e, [B, w, H, S] float32; None: 1.
        values: v, [B, w, H, S, V]; None: backward.
        decay: d, [B, w, H]; None: 1.
        slots: index of the memory that each segment is written to, [B, w].
        added: gradients from the reads, [B, w − num_unread, H, N, K, V].
        num_unread: number of first segments without such gradients.

    Returns:
        u, [B, w, H, S, V] in the keys' dtype.
    """
    batch, heads, _, width, value_width = state.shape
    num_writes, length = keys.shape[1], keys.shape[3]
    right = keys if written_keys is None else written_keys
    left, right = (keys, right) if values is not None else (right, keys)
    left, right = left.contiguous(), right.contiguous()
    scales = None if scales is None else scales.contiguous()
    values = None if values is None else values.contiguous()
    for name, t in (("keys", left), ("written keys", right)):
        _check_operand(name, t, (batch, num_writes, heads, length, width), states.dtype, state.device)
    if scales is not None:
        check_tensor("scales", scales, (batch, num_writes, heads, length), torch.float32, state.device)
    if values is not None:
        _check_operand("values", values, (batch, num_writes, heads, length, value_width), values.dtype, state.device)
    updates = left.new_empty(batch, num_writes, heads, length, value_width)
    block_k = choose_block(width, triton.next_power_of_2(width))
    most = min(64, max(LEAST_BLOCK, TILE_SIZE // block_k))
    block_v = choose_block(value_width, most)
    while block_v > LEAST_BLOCK and batch * heads * triton.cdiv(value_width, block_v) <= HALF_OF_PROCESSORS:
        block_v //= 2
    # with 64 tokens both products can use warp groups; at K = 512 such tiles would leave too few registers
    block_s = choose_block(length, max(LEAST_BLOCK, min(64, KEY_TILE_BYTES // (block_k * left.element_size()))))
    _launch_chain(
        _delta_kernel, batch * heads * triton.cdiv(value_width, block_v),
        state, states,
        (left, right, state if scales is None else scales, updates if values is None else values, updates),
        decay, slots, added, num_unread, (length,), is_forward=values is not None,
        WIDTH=width, VALUE_WIDTH=value_width, SHARES_KEYS=written_keys is None, HAS_SCALE=scales is not None,
        IS_ONE_BLOCK=state.shape[2] == 1 and length <= block_s, OPERAND=choose_operand(left),
        BLOCK_S=block_s, BLOCK_K=block_k, BLOCK_V=block_v,
        num_warps=8 if block_k * block_v > 64 * 64 else 4, num_stages=2,
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
    """The chain without the delta rule: X ← d_i X + P_i; backward G ← d_i G, then `added` is added to all memories' G.

    Args:
        products: P, [B, w, H, K, V] float32; None: backward.
        state, states, decay, slots, added, num_unread: as in `write_with_delta`.
    """
    batch, heads, _, width, value_width = state.shape
    products = None if products is None else products.contiguous()
    if products is not None:
        shape = (batch, slots.shape[1], heads, width, value_width)
        check_tensor("products", products, shape, torch.float32, state.device)
    block = choose_block(width * value_width, 1024)
    _launch_chain(
        _plain_kernel, batch * heads * triton.cdiv(width * value_width, block),
        state, states, (state if products is None else products,),
        decay, slots, added, num_unread, (width * value_width,), is_forward=products is not None,
        BLOCK=block, num_warps=4,
    )  # fmt: skip


def _launch_chain(
    kernel: Any,
    num_programs: int,
    state: Tensor,
    states: Tensor,
    operands: tuple[Tensor, ...],
    decay: Tensor | None,
    slots: Tensor,
    added: Tensor | None,
    num_unread: int,
    sizes: tuple[int, ...],
    *,
    is_forward: bool,
    **options: Any,
) -> None:
    """Check the arguments common to both chains, and launch `kernel`."""
    batch, heads, num_memories, width, value_width = state.shape
    num_writes = slots.shape[1]
    check_tensor("state", state, state.shape, torch.float32, state.device)
    memories = (num_memories,) if is_forward else ()
    shape = (batch, states.shape[1], heads, *memories, width, value_width)
    _check_operand("states", states, shape, states.dtype, state.device)
    if states.shape[1] < num_writes:
        raise ValueError(f"states: room for {states.shape[1]} segments, but {num_writes} are written")
    slots = slots.contiguous()
    check_tensor("slots", slots, (batch, num_writes), torch.int64, state.device)
    if decay is not None:
        decay = decay.contiguous()
        check_tensor("decay", decay, (batch, num_writes, heads), torch.float32, state.device)
    if added is not None:
        added = added.contiguous()
        shape = (batch, num_writes - num_unread, heads, num_memories, width, value_width)
        _check_operand("added", added, shape, added.dtype, state.device)
    kernel[(num_programs,)](
        state, states, *operands, state if added is None else added, state if decay is None else decay, slots,
        num_writes, states.shape[1], num_unread, 0 if added is None else added.shape[1], heads, *sizes,
        N=num_memories, IS_BACKWARD=not is_forward, HAS_DECAY=decay is not None, HAS_ADD=added is not None, **options,
    )  # fmt: skip


def _check_operand(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check_tensor(name, t, shape, dtype, device)
    if dtype not in TRITON_DTYPES:
        raise ValueError(f"{name}: {dtype} is not one of the kernels' dtypes, {TRITON_DTYPES}")


# The inverse of a chunk's system, for the token-by-token delta rule


@triton.jit
def _inverse_kernel(coefficient_ptr, inverse_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    num_columns: tl.constexpr = (SIZE + BLOCK_N - 1) // BLOCK_N
    matrix = (tl.program_id(0) // num_columns).to(tl.int64) * SIZE * SIZE
    rows = tl.arange(0, BLOCK)
    columns = tl.program_id(0) % num_columns * BLOCK_N + tl.arange(0, BLOCK_N)
    inverse = tl.where(rows[:, None] == columns[None, :], 1.0, 0.0)
    for i in range(1, SIZE):  # row i of N is e_i − Σ_{j<i} A_ij N_j
        row = tl.load(coefficient_ptr + matrix + i * SIZE + rows, mask=rows < i, other=0.0)
        change = tl.sum(row[:, None] * inverse, axis=0)
        inverse -= tl.where(rows[:, None] == i, change[None, :], 0.0)
    is_inside = (rows < SIZE)[:, None] & (columns < SIZE)[None, :]
    tl.store(inverse_ptr + matrix + rows[:, None] * SIZE + columns[None, :], inverse, mask=is_inside)


def invert(coefficients: Tensor) -> Tensor:
    """(I + A)⁻¹, where A is `coefficients` [..., C, C] float32 below the diagonal."""
    coefficients = coefficients.contiguous()
    size = coefficients.shape[-1]
    check_tensor("coefficients", coefficients, (*coefficients.shape[:-1], size), torch.float32, coefficients.device)
    inverses = torch.empty_like(coefficients)
    # one warp per program: each of its 32 threads holds a whole column, so sums need no communication
    _inverse_kernel[(coefficients.shape[:-2].numel() * triton.cdiv(size, 32),)](
        coefficients, inverses, SIZE=size, BLOCK=triton.next_power_of_2(size), BLOCK_N=32, num_warps=1
    )
    return inverses


# Local attention


@triton.jit
def _attention_kernel(
    x_ptr, y_ptr, z_ptr, row_ptr, col_ptr, products_ptr, keys_ptr, out_ptr, sum_ptr, length, epsilon,
    X_WIDTH: tl.constexpr, Z_WIDTH: tl.constexpr,
    FROM_AHEAD: tl.constexpr, HAS_ROW: tl.constexpr, HAS_COL: tl.constexpr, HAS_INITIAL: tl.constexpr,
    NORMALIZES: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    num_columns: tl.constexpr = (Z_WIDTH + BLOCK_Z - 1) // BLOCK_Z
    num_blocks = tl.cdiv(length, BLOCK_A)
    block = tl.program_id(0) // num_columns % num_blocks
    batch = (tl.program_id(0) // num_columns // num_blocks).to(tl.int64)
    x_ptr += batch * length * X_WIDTH
    y_ptr += batch * length * X_WIDTH
    z_ptr += batch * length * Z_WIDTH
    out_ptr += batch * length * Z_WIDTH
    a = block * BLOCK_A + tl.arange(0, BLOCK_A)
    columns = tl.program_id(0) % num_columns * BLOCK_Z + tl.arange(0, BLOCK_Z)
    is_a = a < length
    is_column = columns < Z_WIDTH
    out = tl.zeros((BLOCK_A, BLOCK_Z), tl.float32)
    sums = tl.zeros((BLOCK_A,), tl.float32)
    if HAS_INITIAL:
        sums = tl.load(keys_ptr + batch * length + a, mask=is_a, other=0.0)
        for x_begin in range(0, X_WIDTH, BLOCK_X):
            inner = x_begin + tl.arange(0, BLOCK_X)
            is_inner = inner < X_WIDTH
            is_x = is_a[:, None] & is_inner[None, :]
            x = tl.load(x_ptr + a[:, None] * X_WIDTH + inner[None, :], mask=is_x, other=0.0)
            place = products_ptr + batch * X_WIDTH * Z_WIDTH + inner[:, None] * Z_WIDTH + columns[None, :]
            products = tl.load(place, mask=is_inner[:, None] & is_column[None, :], other=0.0)
            out = tl.dot(x.to(OPERAND), products.to(OPERAND), acc=out, input_precision="tf32x3")
    first = 0
    last = tl.minimum(length, (block + 1) * BLOCK_A)
    if FROM_AHEAD:
        first = block * BLOCK_A // BLOCK_B * BLOCK_B
        last = length
    for b_begin in range(first, last, BLOCK_B):
        b = b_begin + tl.arange(0, BLOCK_B)
        is_b = b < length
        scores = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
        for x_begin in range(0, X_WIDTH, BLOCK_X):
            inner = x_begin + tl.arange(0, BLOCK_X)
            is_inner = inner < X_WIDTH
            is_x, is_y = is_a[:, None] & is_inner[None, :], is_b[:, None] & is_inner[None, :]
            x = tl.load(x_ptr + a[:, None] * X_WIDTH + inner[None, :], mask=is_x, other=0.0)
            y = tl.load(y_ptr + b[:, None] * X_WIDTH + inner[None, :], mask=is_y, other=0.0)
            scores = tl.dot(x.to(OPERAND), tl.trans(y.to(OPERAND)), acc=scores, input_precision="tf32x3")
        if HAS_ROW:
            scores += tl.load(row_ptr + batch * length + a, mask=is_a, other=0.0)[:, None]
        if HAS_COL:
            scores += tl.load(col_ptr + batch * length + b, mask=is_b, other=0.0)[None, :]
        is_seen = b[None, :] >= a[:, None] if FROM_AHEAD else b[None, :] <= a[:, None]
        scores = tl.where(is_seen & is_b[None, :], scores, 0.0)
        z = tl.load(z_ptr + b[:, None] * Z_WIDTH + columns[None, :], mask=is_b[:, None] & is_column[None, :], other=0.0)
        weights = scores.to(z_ptr.dtype.element_ty).to(OPERAND)
        out = tl.dot(weights, z.to(OPERAND), acc=out, input_precision="tf32x3")
        sums += tl.sum(scores, axis=1)
    if NORMALIZES:
        out = out / tl.maximum(sums, epsilon)[:, None]
        if tl.program_id(0) % num_columns == 0:
            tl.store(sum_ptr + batch * length + a, sums, mask=is_a)
    place = out_ptr + a[:, None] * Z_WIDTH + columns[None, :]
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
        initial: P [G, X, Z] in z's dtype and s [G, S] float32: x_a P is added to O_a, and s_a to the sum of weights.
        epsilon: ε, divide O_a by max(sum of weights, ε); None: do not divide.
        from_ahead: sum over b ≥ a instead of b ≤ a.

    Returns:
        O in z's dtype, and the sums of weights [G, S], float32 (undefined without `epsilon`).
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
        check_tensor("products", products, (groups, x_width, z_width), z.dtype, z.device)
        check_tensor("sums of weights", keys, (groups, length), torch.float32, z.device)
    block = choose_block(length, 64)
    block_x, block_z = choose_block(x_width, 64), choose_block(z_width, 512)
    _attention_kernel[(groups * triton.cdiv(length, block) * triton.cdiv(z_width, block_z),)](
        x, y, z, sums if row is None else row, sums if col is None else col, products, keys, out, sums,
        length, 0.0 if epsilon is None else epsilon, X_WIDTH=x_width, Z_WIDTH=z_width,
        FROM_AHEAD=from_ahead, HAS_ROW=row is not None, HAS_COL=col is not None, HAS_INITIAL=initial is not None,
        NORMALIZES=epsilon is not None, OPERAND=choose_operand(x),
        BLOCK_A=block, BLOCK_B=block, BLOCK_X=block_x, BLOCK_Z=block_z,
        num_warps=8 if block_z > 64 else 4, num_stages=2,
    )  # fmt: skip
    return out, sums


# The head's loss


@triton.jit
def _loss_kernel(
    logits_ptr, target_ptr, weight_ptr, loss_ptr, num_words,
    HAS_WEIGHT: tl.constexpr, WRITES_GRADIENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * num_words
    target = tl.load(target_ptr + row)
    chosen = tl.load(logits_ptr + tl.maximum(target, 0)).to(tl.float32)
    weight = tl.where(target >= 0, 1.0, 0.0)
    if HAS_WEIGHT:
        weight *= tl.load(weight_ptr + row).to(tl.float32)
    greatest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)  # Σ exp(x − greatest), for each of the BLOCK lanes
    for begin in range(0, num_words, BLOCK):
        words = begin + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + words, mask=words < num_words, other=float("-inf")).to(tl.float32)
        greater = tl.maximum(greatest, x)
        shift = tl.where(greater == float("-inf"), 0.0, greater)
        total = total * tl.exp(greatest - shift) + tl.exp(x - shift)
        greatest = greater
    top = tl.max(greatest, axis=0)
    logsumexp = top + tl.log(tl.sum(total * tl.exp(greatest - top), axis=0))
    tl.store(loss_ptr + row, tl.where(target >= 0, (logsumexp - chosen) * weight, 0.0))
    if WRITES_GRADIENTS:
        tl.debug_barrier()  # all threads must have read the target's logit
        for begin in range(0, num_words, BLOCK):
            words = begin + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + words, mask=words < num_words, other=0.0).to(tl.float32)
            gradients = weight * (tl.exp(x - logsumexp) - tl.where(words == target, 1.0, 0.0))
            gradients = tl.where(target >= 0, gradients, 0.0)  # 0 without a target, even if that row's logits are NaN
            tl.store(logits_ptr + words, gradients.to(logits_ptr.dtype.element_ty), mask=words < num_words)


def score_rows(logits: Tensor, targets: Tensor, weights: Tensor | None, *, write_gradients: bool) -> Tensor:
    """Losses [n] float32 of rows of logits [n, Z]; see `head_loss.score_logits`."""
    num_rows, num_words = logits.shape
    targets = targets.contiguous()
    weights = None if weights is None else weights.contiguous()
    check_tensor("logits", logits, logits.shape, logits.dtype, logits.device)
    check_tensor("targets", targets, (num_rows,), torch.int64, logits.device)
    if weights is not None:
        check_tensor("weights", weights, (num_rows,), None, logits.device)
    losses = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        _loss_kernel[(num_rows,)](
            logits, targets, losses if weights is None else weights, losses, num_words,
            HAS_WEIGHT=weights is not None, WRITES_GRADIENTS=write_gradients, BLOCK=choose_block(num_words, 4096),
            num_warps=8,
        )  # fmt: skip
    return losses


# Tiles


def choose_block(size: int, most: int) -> int:
    """The smallest power of 2 that is at least `size`, but at least `LEAST_BLOCK` and at most `most`."""
    return min(max(triton.next_power_of_2(size), LEAST_BLOCK), most)


def choose_operand(t: Tensor) -> Any:
    """The dtype of `tl.dot` operands: the tensor's, but float32 in the interpreter, which can't multiply bfloat16.

    Values are rounded to the tensor's dtype first, so both give the same results up to the order of sums. float32
    products are computed as three tf32 products ("tf32x3"), whatever precision torch is set to.
    """
    is_compiled = isinstance(_copy_memories, triton.JITFunction)
    return tl.bfloat16 if t.dtype == torch.bfloat16 and is_compiled else tl.float32
