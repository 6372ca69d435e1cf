"""One kernel for local linear attention and for its three gradients.

Forward and gradients are all sums over the tokens of one side of the diagonal,
O_a = Σ_b (x_a·y_b + row_a + col_b) z_b, over b ≤ a or over b ≥ a; see `new_llm.models.ops.linear_attention`.

A program makes a tile of O, BLOCK_A tokens by BLOCK_Z columns. Programs of other columns make the products x·y again:
that costs work but no memory. Dots take tiles of 64 by 64 and sum in float32.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from new_llm.models.ops.triton.shapes import choose_block, choose_operand, choose_precision


@triton.jit
def _sum_kernel(
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
    out = torch.empty_like(z)
    sums = torch.empty(groups, length, dtype=torch.float32, device=z.device)
    products, keys = (out, sums) if initial is None else (t.contiguous() for t in initial)
    block = choose_block(length, 64)
    block_x, block_z = choose_block(x_width, 64), choose_block(z_width, 128)
    grid = (triton.cdiv(length, block), triton.cdiv(z_width, block_z), groups)
    _sum_kernel[grid](
        x, y, z,
        sums if row is None else row.contiguous(), sums if col is None else col.contiguous(),
        products, keys, out, sums,
        length, x_width, z_width, 0.0 if epsilon is None else epsilon,
        FROM_AHEAD=from_ahead, HAS_ROW=row is not None, HAS_COL=col is not None, HAS_INITIAL=initial is not None,
        NORMALIZES=epsilon is not None, PRECISION=choose_precision(x), OPERAND=choose_operand(x),
        BLOCK_A=block, BLOCK_B=block, BLOCK_X=block_x, BLOCK_Z=block_z,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, sums
