"""Triton kernels for decoding one token in a few rows, with three launches per block; launches dominate a step's time.

`project` applies the LayerNorms and computes q, k, v and the MLP's inner activations; `attend` or `recall` mixes
tokens; `merge` projects both branches back and adds them to the input. Each kernel runs about as long as it takes to
read its weights. All sums are float32, even where the layers' own `step` rounds to 16 bits in between.

Legend: B rows, D hidden size, H heads, K width of a head, C slots of a cache.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from new_llm.models.ops.kernels import check_tensor

ROWS = 16
"""Rows per tile: the minimum of `tl.dot`. Missing rows are masked."""
PIECE = 64
"""Number of earlier tokens that one program attends to."""


@triton.jit
def _load_rows(x_ptr, begin, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Columns begin … begin + BLOCK − 1 of x [rows, WIDTH]; 0 outside x."""
    row = tl.arange(0, ROWS)
    column = begin + tl.arange(0, BLOCK)
    is_there = (row < rows)[:, None] & (column < WIDTH)[None, :]
    return tl.load(x_ptr + row[:, None] * WIDTH + column[None, :], mask=is_there, other=0.0)


@triton.jit
def _add_product(
    acc, x, weight_ptr, begin, output, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """acc + x Wᵀ over columns begin … begin + BLOCK − 1 of W [SIZE, WIDTH], for the rows `output` of W."""
    column = begin + tl.arange(0, BLOCK)
    is_there = (output < SIZE)[:, None] & (column < WIDTH)[None, :]
    weight = tl.load(weight_ptr + output[:, None] * WIDTH + column[None, :], mask=is_there, other=0.0)
    return tl.dot(x, tl.trans(weight), acc=acc, input_precision="ieee")


@triton.jit
def _project_tile(
    x_ptr, gain_ptr, shift_ptr, weight_ptr, bias_ptr, out_ptr, tile, rows, epsilon,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, HAS_GELU: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the outputs of W LN(x) + b, followed by GELU if `HAS_GELU`."""
    total = tl.zeros([ROWS], tl.float32)
    for begin in range(0, WIDTH, BLOCK_K):
        total += tl.sum(_load_rows(x_ptr, begin, rows, WIDTH, ROWS, BLOCK_K).to(tl.float32), 1)
    mean = total / WIDTH
    squares = tl.zeros([ROWS], tl.float32)
    for begin in range(0, WIDTH, BLOCK_K):
        centred = _load_rows(x_ptr, begin, rows, WIDTH, ROWS, BLOCK_K).to(tl.float32) - mean[:, None]
        centred = tl.where((begin + tl.arange(0, BLOCK_K) < WIDTH)[None, :], centred, 0.0)
        squares += tl.sum(centred * centred, 1)
    scale = 1 / tl.sqrt(squares / WIDTH + epsilon)
    output = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for begin in range(0, WIDTH, BLOCK_K):
        x = _load_rows(x_ptr, begin, rows, WIDTH, ROWS, BLOCK_K)
        column = begin + tl.arange(0, BLOCK_K)
        gain = tl.load(gain_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        normed = (x.to(tl.float32) - mean[:, None]) * scale[:, None] * gain[None, :] + shift[None, :]
        acc = _add_product(acc, normed.to(x.dtype), weight_ptr, begin, output, SIZE, WIDTH, BLOCK_K)
    acc += tl.load(bias_ptr + output, mask=output < SIZE, other=0.0).to(tl.float32)[None, :]
    if HAS_GELU:
        acc = 0.5 * acc * (1 + tl.erf(acc * 0.7071067811865476))
    row = tl.arange(0, ROWS)
    is_there = (row < rows)[:, None] & (output < SIZE)[None, :]
    tl.store(out_ptr + row[:, None] * SIZE + output[None, :], acc.to(out_ptr.dtype.element_ty), mask=is_there)


@triton.jit
def _project_kernel(
    x_ptr, gain_ptr, shift_ptr, weight_ptr, bias_ptr, out_ptr, epsilon,
    inner_gain_ptr, inner_shift_ptr, inner_weight_ptr, inner_bias_ptr, inner_out_ptr, inner_epsilon, rows,
    SIZE: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    num_tiles: tl.constexpr = (SIZE + BLOCK_N - 1) // BLOCK_N
    if tile < num_tiles:
        _project_tile(
            x_ptr, gain_ptr, shift_ptr, weight_ptr, bias_ptr, out_ptr, tile, rows, epsilon,
            SIZE, WIDTH, False, ROWS, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _project_tile(
            x_ptr, inner_gain_ptr, inner_shift_ptr, inner_weight_ptr, inner_bias_ptr, inner_out_ptr,
            tile - num_tiles, rows, inner_epsilon,
            INNER, WIDTH, True, ROWS, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _merge_kernel(
    x_ptr, mixed_ptr, weight_ptr, bias_ptr, inner_ptr, inner_weight_ptr, inner_bias_ptr, out_ptr, rows,
    WIDTH: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for begin in range(0, WIDTH, BLOCK_K):
        mixed = _load_rows(mixed_ptr, begin, rows, WIDTH, ROWS, BLOCK_K)
        acc = _add_product(acc, mixed, weight_ptr, begin, output, WIDTH, WIDTH, BLOCK_K)
    for begin in range(0, INNER, BLOCK_K):
        inner = _load_rows(inner_ptr, begin, rows, INNER, ROWS, BLOCK_K)
        acc = _add_product(acc, inner, inner_weight_ptr, begin, output, WIDTH, INNER, BLOCK_K)
    acc += tl.load(bias_ptr + output, mask=output < WIDTH, other=0.0).to(tl.float32)[None, :]
    acc += tl.load(inner_bias_ptr + output, mask=output < WIDTH, other=0.0).to(tl.float32)[None, :]
    row = tl.arange(0, ROWS)
    is_there = (row < rows)[:, None] & (output < WIDTH)[None, :]
    place = row[:, None] * WIDTH + output[None, :]
    acc += tl.load(x_ptr + place, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=is_there)


@triton.jit
def _rotate(x_ptr, cos, sin, ROTARY: tl.constexpr, WIDTH: tl.constexpr):
    """Load a query or key [WIDTH] and rotate its first ROTARY dimensions."""
    column = tl.arange(0, WIDTH)
    half: tl.constexpr = ROTARY // 2
    partner = tl.where(column < half, column + half, column - half)
    x = tl.load(x_ptr + column).to(tl.float32)
    turned = tl.load(x_ptr + partner, mask=column < ROTARY, other=0.0).to(tl.float32)
    return x * cos + tl.where(column < half, -turned, turned) * sin


@triton.jit
def _attend_kernel(
    mixed_ptr, keys_ptr, values_ptr, place_ptr, cos_ptr, sin_ptr, out_ptr, part_ptr, sum_ptr, done_ptr,
    heads, slots, pieces, scale,
    ROTARY: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) // pieces
    piece = tl.program_id(0) % pieces
    place = tl.load(place_ptr + pair // heads)
    num_filled = tl.maximum((place + BLOCK - 1) // BLOCK, 1)  # pieces with earlier tokens
    if piece < num_filled:
        column = tl.arange(0, WIDTH)
        is_rotated = column < ROTARY
        cos = tl.load(cos_ptr + place * ROTARY + column, mask=is_rotated, other=1.0)
        sin = tl.load(sin_ptr + place * ROTARY + column, mask=is_rotated, other=0.0)
        own = mixed_ptr + pair * 3 * WIDTH
        keys = keys_ptr + pair * slots * WIDTH
        values = values_ptr + pair * slots * WIDTH
        slot = piece * BLOCK + tl.arange(0, BLOCK)
        is_there = slot < place
        tile = slot[:, None] * WIDTH + column[None, :]
        earlier_keys = tl.load(keys + tile, mask=is_there[:, None], other=0.0).to(tl.float32)
        earlier_values = tl.load(values + tile, mask=is_there[:, None], other=0.0).to(tl.float32)
        query = _rotate(own, cos, sin, ROTARY, WIDTH) * scale
        scores = tl.where(is_there, tl.sum(query[None, :] * earlier_keys, 1), float("-inf"))
        greatest = tl.max(scores, 0)
        if piece == 0:  # the first piece also handles the new token itself
            key = _rotate(own + WIDTH, cos, sin, ROTARY, WIDTH).to(keys_ptr.dtype.element_ty)
            value = tl.load(own + 2 * WIDTH + column)
            tl.store(keys + place * WIDTH + column, key)
            tl.store(values + place * WIDTH + column, value)
            own_score = tl.sum(query * key.to(tl.float32), 0)
            greatest = tl.maximum(greatest, own_score)
            own_share = tl.exp(own_score - greatest)
            acc = own_share * value.to(tl.float32)
        else:
            own_share = 0.0
            acc = tl.zeros([WIDTH], tl.float32)
        shares = tl.exp(scores - greatest)
        total = tl.sum(shares, 0) + own_share
        acc += tl.sum(shares[:, None] * earlier_values, 0)
        out = out_ptr + pair * WIDTH + column
        if num_filled == 1:
            tl.store(out, (acc / total).to(out_ptr.dtype.element_ty))
        else:
            tl.store(part_ptr + (pair * pieces + piece) * WIDTH + column, acc)
            tl.store(sum_ptr + (pair * pieces + piece) * 2, greatest)
            tl.store(sum_ptr + (pair * pieces + piece) * 2 + 1, total)
            tl.debug_barrier()  # all threads must have stored before the program counts itself as done
            if tl.atomic_add(done_ptr + pair, 1) == num_filled - 1:  # the last program adds up all parts, in order
                number = tl.arange(0, PIECES)
                is_filled = number < num_filled
                sums = sum_ptr + (pair * pieces + number) * 2
                greatests = tl.load(sums, mask=is_filled, other=float("-inf"), cache_modifier=".cg")
                totals = tl.load(sums + 1, mask=is_filled, other=0.0, cache_modifier=".cg")
                parts = part_ptr + (pair * pieces + number)[:, None] * WIDTH + column[None, :]
                accs = tl.load(parts, mask=is_filled[:, None], other=0.0, cache_modifier=".cg")
                weights = tl.exp(greatests - tl.max(greatests, 0))
                acc = tl.sum(weights[:, None] * accs, 0) / tl.sum(weights * totals, 0)
                tl.store(out, acc.to(out_ptr.dtype.element_ty))
                tl.store(done_ptr + pair, 0)


@triton.jit
def _load_features(x_ptr, place):
    """ELU + 1 of queries or keys, rounded to their dtype."""
    x = tl.load(x_ptr + place)
    wide = x.to(tl.float32)
    return (tl.exp(tl.minimum(wide, 0.0)) + tl.maximum(wide, 0.0)).to(x.dtype).to(tl.float32)


@triton.jit
def _recall_kernel(
    mixed_ptr, products_ptr, keys_ptr, writes_ptr, count_ptr, memories_ptr, norms_ptr, gate_ptr, out_ptr,
    heads, epsilon, IS_DELTA: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    own = mixed_ptr + pair * 3 * WIDTH
    query = _load_features(own, place)
    key = _load_features(own + WIDTH, place)
    value = tl.load(own + 2 * WIDTH + place).to(tl.float32)
    tile = pair * WIDTH * WIDTH + place[:, None] * WIDTH + place[None, :]
    products = tl.load(products_ptr + tile) + key[:, None] * value[None, :]
    tl.store(products_ptr + tile, products)
    keys = tl.load(keys_ptr + pair * WIDTH + place) + key
    tl.store(keys_ptr + pair * WIDTH + place, keys)
    local = tl.sum(query[:, None] * products, 0) / tl.maximum(tl.sum(query * keys, 0), epsilon)
    memory = tl.load(memories_ptr + tile)
    norm = tl.load(norms_ptr + pair * WIDTH + place)
    read = tl.sum(query[:, None] * memory, 0) / tl.maximum(tl.sum(query * norm, 0), epsilon)
    written = value
    if IS_DELTA:
        written -= tl.sum(key[:, None] * memory, 0) / tl.maximum(tl.sum(key * norm, 0), epsilon)
    writes = tl.load(writes_ptr + tile) + key[:, None] * written[None, :]
    tl.store(writes_ptr + tile, writes)
    gate = tl.sigmoid(tl.load(gate_ptr + pair % heads).to(tl.float32))
    mixed = gate * read + (1 - gate) * local
    tl.store(out_ptr + pair * WIDTH + place, mixed.to(out_ptr.dtype.element_ty))
    if pair % heads == 0:
        count = count_ptr + pair // heads
        tl.store(count, tl.load(count) + 1)


def project(
    hidden: Tensor, norm: nn.LayerNorm, linear: nn.Linear, inner_norm: nn.LayerNorm, inner_linear: nn.Linear
) -> tuple[Tensor, Tensor]:
    """W LN(x) + b and GELU(W' LN'(x) + b') for x [B, 1, D] with B at most `ROWS`."""
    rows, _, width = hidden.shape
    size, inner = linear.out_features, inner_linear.out_features
    check_tensor("hidden", hidden, (rows, 1, width), hidden.dtype, hidden.device)
    out, inner_out = hidden.new_empty(rows, 1, size), hidden.new_empty(rows, 1, inner)
    block = 16 if width <= 512 else 32
    _project_kernel[(-(-size // block) + -(-inner // block),)](
        *(hidden, norm.weight, norm.bias, linear.weight, linear.bias, out, norm.eps),
        *(inner_norm.weight, inner_norm.bias, inner_linear.weight, inner_linear.bias, inner_out, inner_norm.eps, rows),
        SIZE=size,
        INNER=inner,
        WIDTH=width,
        ROWS=ROWS,
        BLOCK_N=block,
        BLOCK_K=min(128, triton.next_power_of_2(max(width, 16))),
        num_warps=4,
        num_stages=4,
    )
    return out, inner_out


def merge(hidden: Tensor, mixed: Tensor, linear: nn.Linear, inner: Tensor, inner_linear: nn.Linear) -> Tensor:
    """x + W a + b + W' m + b' for x and a [B, 1, D] and m [B, 1, intermediate_size]."""
    rows, _, width = hidden.shape
    for name, tensor in (("mixed", mixed), ("inner", inner)):
        check_tensor(name, tensor, (rows, 1, tensor.shape[2]), hidden.dtype, hidden.device)
    out = torch.empty_like(hidden)
    _merge_kernel[(-(-width // 16),)](
        *(hidden, mixed, linear.weight, linear.bias, inner, inner_linear.weight, inner_linear.bias, out, rows),
        WIDTH=width,
        INNER=inner.shape[2],
        ROWS=ROWS,
        BLOCK_N=16,
        BLOCK_K=min(512 // hidden.element_size(), triton.next_power_of_2(max(width, 16))),
        num_warps=4,
        num_stages=4,
    )
    return out


def attend(
    mixed: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Tensor,
    angles: tuple[Tensor, Tensor],
    rotary_dim: int,
    done: Tensor,
) -> Tensor:
    """softmax(q kᵀ / √K) v over earlier tokens and the new token, whose key and value join the cache; [B, 1, H K].

    One program handles `PIECE` tokens of a head; the program that finishes last combines the results of all pieces.

    Args:
        mixed: q, k and v of each head, concatenated, [B, 1, H · 3 K].
        keys: rotated keys, [B, H, C, K].
        values: [B, H, C, K].
        places: each row's slot for the new token, [B] int64, below C.
        angles: cos and sin for all positions, [longest, rotary_dim] float32 each; `places` must be below `longest`.
        rotary_dim: number of rotated dimensions per head.
        done: counters, [B · H] int32; must be zero, and are zero again afterwards.
    """
    rows, heads, slots, width = keys.shape
    pieces = -(-len(angles[0]) // PIECE)
    check_tensor("mixed", mixed, (rows, 1, 3 * heads * width), keys.dtype, keys.device)
    for name, tensor in (("keys", keys), ("values", values)):
        check_tensor(name, tensor, (rows, heads, slots, width), mixed.dtype, mixed.device)
    check_tensor("places", places, (rows,), torch.int64, mixed.device)
    check_tensor("done", done, (rows * heads,), torch.int32, mixed.device)
    out = mixed.new_empty(rows, 1, heads * width)
    parts = mixed.new_empty(rows * heads, pieces, width, dtype=torch.float32)
    sums = mixed.new_empty(rows * heads, pieces, 2, dtype=torch.float32)
    _attend_kernel[(rows * heads * pieces,)](
        *(mixed, keys, values, places, *angles, out, parts, sums, done, heads, slots, pieces, width**-0.5),
        ROTARY=rotary_dim,
        WIDTH=width,
        BLOCK=PIECE,
        PIECES=triton.next_power_of_2(pieces),
        num_warps=4,
    )
    return out


def recall(
    mixed: Tensor,
    products: Tensor,
    keys: Tensor,
    writes: Tensor,
    counts: Tensor,
    memories: Tensor,
    norms: Tensor,
    gate: Tensor,
    *,
    epsilon: float,
    use_delta_rule: bool,
) -> Tensor:
    """g A_mem + (1 − g) A_loc of a compressive memory, [B, 1, H K]; adds the token to the segment's sums in place.

    Args:
        mixed: q, k and v of each head, concatenated, before the feature map, [B, 1, H · 3 K].
        products: Σ kᵀv, [B, H, K, K] float32; updated.
        keys: Σ k, [B, H, K] float32; updated.
        writes: Σ kᵀ(v − r), [B, H, K, K] float32; updated.
        counts: number of tokens in the segment, [B] int64; updated.
        memories: M, [B, 1, H, K, K] float32.
        norms: z, [B, 1, H, K] float32.
        gate: β, [H].
        epsilon: ε.
        use_delta_rule: whether r is what the memory returns for the key; else r = 0.
    """
    rows, heads, width = keys.shape
    check_tensor("mixed", mixed, (rows, 1, 3 * heads * width), mixed.dtype, keys.device)
    shape, wide = (rows, heads, width, width), torch.float32
    for name, tensor, expected in (
        ("products", products, shape),
        ("keys", keys, shape[:3]),
        ("writes", writes, shape),
        ("memories", memories, (rows, 1, *shape[1:])),
        ("norms", norms, (rows, 1, heads, width)),
    ):
        check_tensor(name, tensor, expected, wide, mixed.device)
    check_tensor("counts", counts, (rows,), torch.int64, mixed.device)
    out = mixed.new_empty(rows, 1, heads * width)
    _recall_kernel[(rows * heads,)](
        *(mixed, products, keys, writes, counts, memories, norms, gate, out, heads, epsilon),
        IS_DELTA=use_delta_rule,
        WIDTH=width,
        num_warps=8 if width <= 64 else 16,
    )
    return out
