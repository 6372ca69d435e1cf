"""The delta rule token by token, M_t = M_{t−1} + k_tᵀ β_t (v_t − k_t M_{t−1}); a segment reads M from before it.

Source: arXiv:2406.06484, section 3 (the WY form of a product of Householder matrices, Bischof and Van Loan, 1987).
Within a piece of C tokens the rule is a unit lower triangular system: with T = (I + tril(diag(β) K Kᵀ, −1))⁻¹ diag(β)
and W = Kᵀ T, the piece writes M ← M + W (V − K M). W is computed for all pieces of a call at once; only two products
per piece are sequential.

M = M₀ + C: a resting state M₀, and the change C that the text has made. C decays before a segment is written:
M ← M₀ + w (M − M₀).

On a GPU, where kernel launches dominate, one launch takes C through all pieces (`chain_chunks`): with U = V − K M₀, a
piece writes C ← d C + W (U − d K C), where d is w in a segment's first piece and 1 in the others.

Legend: B rows, n segments, H heads, S tokens per segment, K and V widths of keys and values, m pieces of C tokens per
segment.
"""

from ctypes import CDLL
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from new_llm.models.ops import kernels
from new_llm.models.ops.gated_delta import add_product, chain_chunks, find_solver, invert
from new_llm.models.ops.kernels import native

LEAST_STRENGTH = 1e-20
"""Lower bound on β, since backward divides by it."""
PIECE_LENGTH = 64
"""Largest C. With longer pieces the products inside a piece grow; with shorter ones there are more sequential steps."""


def scan_delta_rule_naive(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, change: Tensor, rest: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """`scan_delta_rule` by its equation, token by token."""
    reads = []
    for index in range(q.shape[1]):
        reads.append((q[:, index] @ (rest + change)).sum(1))
        if index >= decay.shape[1]:
            continue
        change = decay[:, index, :, None, None] * change
        for token in range(q.shape[3]):
            key, value = k[:, index, :, token], v[:, index, token].unsqueeze(1)
            held = (key.unsqueeze(-2) @ (rest + change)).squeeze(-2)
            error = beta[:, index, :, token, None] * (value - held)
            change = change + key.unsqueeze(-1) * error.unsqueeze(-2)
    return torch.stack(reads, 1), change


def scan_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, change: Tensor, rest: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """For each segment: read the memory from before it, decay the memory, and write the segment.

    Products with M are in q's dtype; W is computed, and M held, in M's dtype. For backward, M is kept before each
    segment and each piece.

    Args:
        q: queries, already multiplied by each head's weight in the read, [B, n, H, S, K].
        k: keys, [B, n, H, S, K], in q's dtype or M's; 0 where nothing is written.
        v: values, the same for all heads, [B, n, S, V].
        beta: share of the error that is written, [B, n, H, S]; between 0 and 2 for keys of length 1.
        change: C before the first segment, [B, H, K, V], float32 or wider.
        rest: M₀, [H, K, V], in C's dtype.
        decay: w at each write, [B, w, H], in C's dtype; the first w of the n segments are written.

    Returns:
        Σ_h q_h M_h, [B, n, S, V] in q's dtype, and C after the last write.
    """
    num_writes, num_tokens = decay.shape[1], q.shape[3]
    num_pieces = -(-num_tokens // PIECE_LENGTH)
    takes_kernels = kernels.uses_triton(q) and q.shape[-1] * q.element_size() <= kernels.MAX_KEY_BYTES
    k, v, beta = k[:, :num_writes], v[:, :num_writes].to(q.dtype), beta[:, :num_writes]
    missing = -num_tokens % num_pieces  # the last piece is padded with zeros, which write nothing
    if missing:
        k, v, beta = F.pad(k, (0, 0, 0, missing)), F.pad(v, (0, 0, 0, missing)), F.pad(beta, (0, missing))
    # segments and pieces come first, so that each piece is contiguous
    keys = k.unflatten(3, (num_pieces, -1)).permute(1, 3, 0, 2, 4, 5).contiguous()
    strengths = beta.unflatten(3, (num_pieces, -1)).permute(1, 3, 0, 2, 4).contiguous()
    values = v.unflatten(2, (num_pieces, -1)).permute(1, 2, 0, 3, 4)
    queries = q.permute(1, 0, 3, 2, 4).flatten(3)  # all heads concatenated, so that one product sums their reads
    scan = _chain_pieces if takes_kernels and num_writes else _Scan.apply
    reads, end = scan(queries, keys, strengths, values, change, rest, decay)
    return reads.transpose(0, 1), end if num_writes else change


def write_delta_rule(k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Tensor:
    """The change of M when tokens are written one after another, [B, H, K, V].

    Args:
        k: keys, [B, H, T, K]; 0 where nothing is written.
        v: values, [B, T, V].
        beta: [B, H, T].
        memory: M, [B, H, K, V].
    """
    added = torch.zeros_like(memory)
    pieces = (k.split(PIECE_LENGTH, 2), v.unsqueeze(1).split(PIECE_LENGTH, 2), beta.split(PIECE_LENGTH, 2))
    for key, value, strength in zip(*pieces, strict=True):
        solved, _ = _solve_writes(key, strength.contiguous(), key.dtype)
        added = added + key.transpose(-1, -2) @ solved @ (value - key @ (memory + added))
    return added


def sum_reads(queries: Tensor, memory: Tensor) -> Tensor:
    """Σ_h q_h M_h, [B, S, V], from the concatenated queries of all heads [B, S, H K] and M [B, H, K, V]."""
    return queries @ memory.flatten(1, 2)


def _solve_writes(k: Tensor, beta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """N diag(β) in `dtype`, where N = (I + tril(diag(β) K Kᵀ, −1))⁻¹, and K Kᵀ in β's dtype."""
    k = k.to(beta.dtype)
    products = k @ k.transpose(-1, -2)
    found = find_solver(products)
    if found is not None:
        return native.solve_chunks(found, products, beta, dtype), products
    return (invert(beta.unsqueeze(-1) * products) * beta.unsqueeze(-2)).to(dtype), products


def _differentiate_solution(
    below: Tensor, products: Tensor, beta: Tensor, for_writes: Tensor, writes: Tensor
) -> tuple[Tensor, Tensor]:
    """For Q = −diag(β) A' below the diagonal: Q + Qᵀ, and β' = (Σ_k W' ⊙ W − Σ_j Q ⊙ K Kᵀ) / β."""
    found = find_solver(products)
    if found is not None:
        return native.solve_chunks_backward(found, below, products, beta, for_writes, writes)
    below = below.tril(-1)
    for_beta = (for_writes * writes).sum(-2, dtype=beta.dtype) - (below * products).sum(-1)
    return below + below.transpose(-1, -2), for_beta / beta


def _fade(memory: Tensor, rest: Tensor, retained: Tensor, narrow: Tensor) -> None:
    """narrow ← M₀ + w (M − M₀), for M [B, H, K, V], M₀ [H, K, V] and w [B, H]."""
    found = _find_movers(memory, narrow.dtype)
    if found is not None:
        native.move_memories(found, memory, rest, retained, None, narrow)
    else:
        narrow.copy_(torch.lerp(rest, memory, retained[..., None, None]))


def _write(memory: Tensor, rest: Tensor, retained: Tensor | None, product: Tensor, narrow: Tensor) -> Tensor:
    """M₀ + w (M − M₀) + P in M's dtype; w None: 1. Also written to `narrow`, in P's dtype."""
    found = _find_movers(memory, product.dtype)
    if found is not None:
        wide = native.move_memories(found, memory, rest, retained, product, narrow)
        return narrow if wide is None else wide
    memory = (memory if retained is None else torch.lerp(rest, memory, retained[..., None, None])) + product
    narrow.copy_(memory)
    return memory


def _retreat(
    g: Tensor,
    product: Tensor | None,
    added: Tensor | None,
    memory: Tensor,
    rest: Tensor,
    retained: Tensor | None,
    for_retained: Tensor | None,
    for_rest: Tensor,
    narrow: Tensor,
) -> None:
    """The backward of `_write`: G ← w (G − P) + R in place; also written to `narrow`, in M's dtype.

    w' = Σ (M − M₀) (G − P) goes to `for_retained`, and (1 − w) (G − P) is added to `for_rest`. P is `product`, R is
    `added`.
    """
    found = _find_movers(g, memory.dtype)
    if found is not None:
        native.retreat_memories(found, g, product, added, memory, rest, retained, for_retained, for_rest, narrow)
        return
    if product is not None:
        g.sub_(product)
    if retained is not None and for_retained is not None:
        for_retained.copy_(((memory - rest) * g).sum((-1, -2)))
        for_rest.addcmul_(g, 1 - retained[..., None, None])
        g.mul_(retained[..., None, None])
    if added is not None:
        g.add_(added)
    narrow.copy_(g)


def _find_movers(memory: Tensor, dtype: torch.dtype) -> CDLL | None:
    """The C kernels, if they support this memory with products of this dtype."""
    if memory.dtype == torch.float32 and dtype in native.SUFFIXES:
        return native.find_kernels(memory)
    return None


def _chain_pieces(
    q: Tensor, k: Tensor, beta: Tensor, v: Tensor, change: Tensor, rest: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """The same as `_Scan`, with GPU kernels; arguments as in `_Scan.forward`."""
    dtype, num_pieces, k = q.dtype, k.shape[1], k.to(change.dtype)
    solved = invert(beta.unsqueeze(-1) * (k @ k.transpose(-1, -2))) * beta.unsqueeze(-2)  # N diag(β)
    keys = k.to(dtype)
    writes = solved.to(dtype).transpose(-1, -2) @ keys  # Wᵀ
    values = v.unsqueeze(3) - keys @ rest.to(dtype)
    faded = F.pad(decay.transpose(0, 1).unsqueeze(1), (0, 0, 0, 0, 0, num_pieces - 1), value=1.0)  # d, [w, m, B, H]
    left = (faded[..., None, None] * k).to(dtype)
    left, writes, values, faded = (t.flatten(2, 3).flatten(0, 1) for t in (left, writes, values, faded))
    states, end = chain_chunks(left, writes, values, faded, change.flatten(0, 1), len(left))  # [w m, B H, …]
    found = torch.cat((states[::num_pieces], end.to(dtype).expand(len(q) - len(k), -1, -1, -1)))
    found = found.unflatten(1, change.shape[:2]) + rest.to(dtype)
    return q @ found.flatten(2, 3), end.view_as(change)


def _list_read(states: Tensor, num_segments: int) -> Tensor:
    """The memory that each of n segments reads, [n B, H K, V], from the states [w + 1, B, H, K, V]."""
    if num_segments > len(states):  # segments that are not written all read the last state
        states = states[torch.arange(num_segments, device=states.device).clamp(max=len(states) - 1)]
    return states[:num_segments].flatten(0, 1).flatten(1, 2)


class _Scan(torch.autograd.Function):
    """W of all pieces, the recurrence over pieces, and the reads.

    Backward through the recurrence, with G = ∂L/∂M after a piece and E = V − K M: E' = Wᵀ G, W' = G Eᵀ, K' = −E' Mᵀ and
    G ← G − Kᵀ E'. Backward through W = Kᵀ N diag(β), with N = (I + A)⁻¹ and A = tril(diag(β) K Kᵀ, −1): let
    Z = N diag(β) W'ᵀ; then K' = Z and diag(β) A' = −Wᵀ Zᵀ below the diagonal. A prime marks a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, beta: Tensor, v: Tensor, change: Tensor, rest: Tensor, decay: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Reads [n, B, S, V] and C after the last write.

        q [n, B, S, H K]; k [w, m, B, H, C, K]; beta [w, m, B, H, C] in M's dtype; v [w, m, B, C, V]; the others as in
        `scan_delta_rule`.
        """
        num_writes, num_pieces, dtype = *k.shape[:2], q.dtype
        beta, rest, q = beta.clamp(min=LEAST_STRENGTH), rest.contiguous(), q.contiguous()
        retained = decay.transpose(0, 1).contiguous()
        solved, products = _solve_writes(k, beta, dtype)
        keys = k.to(dtype)
        writes = keys.transpose(-1, -2) @ solved
        errors = v.unsqueeze(3).expand(*k.shape[:-1], v.shape[-1]).clone(memory_format=torch.contiguous_format)
        held = rest + change
        # M before each segment and after the last write, and before each piece
        states, pieces = (q.new_empty(number, *held.shape) for number in (num_writes + 1, num_writes * num_pieces))
        states[0] = held
        steps = (t.flatten(2, 3).flatten(0, 1).unbind() for t in (keys, writes, errors))  # [B H, …] for each piece
        for place, (key, write, error, piece) in enumerate(zip(*steps, pieces.unbind(), strict=True)):
            index, number = divmod(place, num_pieces)
            left = None if number else retained[index]
            if left is not None:
                _fade(held, rest, left, piece)
            error.baddbmm_(key, piece.flatten(0, 1), alpha=-1)
            narrow = pieces[place + 1] if number + 1 < num_pieces else states[index + 1]
            held = _write(held, rest, left, torch.bmm(write, error).view_as(held), narrow)
        ctx.save_for_backward(q, k, beta, writes, solved, products, errors, rest, retained, states, pieces)
        return (q.flatten(0, 1) @ _list_read(states, len(q))).unflatten(0, q.shape[:2]), held - rest

    @staticmethod
    @kernels.differentiate_once
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, beta, writes, solved, products, errors, rest, retained, states, pieces = ctx.saved_tensors
        for_reads, g = upstreams
        (num_writes, num_pieces), keys, for_reads = k.shape[:2], k.to(q.dtype), for_reads.flatten(0, 1)
        for_q = (for_reads @ _list_read(states, len(q)).transpose(1, 2)).view_as(q)
        added = (q.flatten(0, 1).transpose(1, 2) @ for_reads).view(len(q), *g.shape)
        for_errors, above = torch.empty_like(errors), q.new_empty(len(pieces) + 1, *g.shape)  # G after each piece
        g, for_rest, for_retained = g.clone(memory_format=torch.contiguous_format), -g, torch.empty_like(retained)
        above[-1] = g
        steps = [t.flatten(2, 3).flatten(0, 1).unbind() for t in (keys, writes, for_errors)]
        for index in reversed(range(len(q))):
            state, product, left, into = states[min(index, num_writes)], None, None, None
            if index < num_writes:
                left, into = retained[index], for_retained[index]
                for place in reversed(range(index * num_pieces, (index + 1) * num_pieces)):
                    key, write, for_error = (t[place] for t in steps)
                    torch.bmm(write.transpose(1, 2), above[place + 1].flatten(0, 1), out=for_error)
                    product = torch.bmm(key.transpose(1, 2), for_error).view_as(state)
                    if place % num_pieces:
                        _retreat(g, product, None, state, rest, None, None, for_rest, above[place])
            narrow = above[min(index, num_writes) * num_pieces]
            _retreat(g, product, added[index], state, rest, left, into, for_rest, narrow)
        for_writes = above[1:].unflatten(0, k.shape[:2]) @ errors.transpose(-1, -2)
        for_k = for_errors @ pieces.unflatten(0, k.shape[:2]).transpose(-1, -2)
        through = solved @ for_writes.transpose(-1, -2)  # Z
        below = writes.transpose(-1, -2) @ through.transpose(-1, -2)  # −diag(β) A'
        symmetric, for_beta = _differentiate_solution(below, products, beta, for_writes, writes)
        for_k = add_product(through, symmetric, keys, sign=-1).sub_(for_k)
        for_v = reduce(torch.add, for_errors.unbind(3))  # several times faster than `sum` in 16 bits
        return for_q, for_k.to(k.dtype), for_beta, for_v, g, (for_rest + g).sum(0), for_retained.transpose(0, 1)
