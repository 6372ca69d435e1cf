"""The delta rule token by token, M_t = M_{t−1} + k_tᵀ β_t (v_t − k_t M_{t−1}), where segments read M of before them.

Source: arXiv:2406.06484, section 3 (the WY form of a product of Householder matrices, Bischof and Van Loan, 1987). In
a piece of C tokens the rule is a unit lower triangular system: with T = (I + tril(diag(β) K Kᵀ, −1))⁻¹ diag(β) and
W = Kᵀ T the piece writes M ← M + W (V − K M). W of all pieces of a call is made at once; from piece to piece M passes
through two products.

M is M₀ + C: a rest, and what text has changed. Before a segment is written C fades, M ← M₀ + w (M − M₀).

On a GPU, where launches are what takes time, C passes through all pieces in one (`delta_chunks`): with U = V − K M₀ the
piece writes C ← d C + W (U − d K C), where d is w in the first piece of a segment, else 1.

Legend: B rows, n segments, H heads, S tokens of a segment, K and V widths of keys and values, m pieces of C tokens in
a segment.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from new_llm.models.ops import kernels
from new_llm.models.ops.delta_chunks import add_product, chain_chunks, invert

PIECE_LENGTH = 64
"""C at most: the products inside a piece grow with C, the number of steps from piece to piece falls with it."""


def scan_delta_rule_naive(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, change: Tensor, rest: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """`scan_delta_rule` from the equation, a token at a time."""
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
    """Read the memory of before each segment, then let it fade and write the segment.

    Products with M are in q's dtype; W is made, and M kept, in that of M. One M is kept for each segment for backward.

    Args:
        q: queries, each head's weighed as its read is to be, [B, n, H, S, K].
        k: keys, likewise; 0 where nothing is written.
        v: values, which all heads write, [B, n, S, V].
        beta: how much of the error is written, [B, n, H, S]; between 0 and 2 for keys of length 1.
        change: C before the first segment, [B, H, K, V], float32 or wider.
        rest: M₀, [H, K, V], likewise.
        decay: w of each write, [B, w, H], likewise; the first w of the n segments are written.

    Returns:
        Σ_h q_h M_h of each segment [B, n, S, V] in q's dtype, and C after the last write.
    """
    num_writes, num_tokens = decay.shape[1], q.shape[3]
    num_pieces = -(-num_tokens // PIECE_LENGTH)
    takes_kernels = kernels.uses_triton(q) and q.shape[-1] * q.element_size() <= kernels.MAX_KEY_BYTES
    k, v, beta = k[:, :num_writes].to(change.dtype), v[:, :num_writes].to(q.dtype), beta[:, :num_writes]
    missing = -num_tokens % num_pieces  # tokens that are missing to whole pieces are zero, and so write nothing
    if missing:
        k, v, beta = F.pad(k, (0, 0, 0, missing)), F.pad(v, (0, 0, 0, missing)), F.pad(beta, (0, missing))
    # first the segments, then their pieces, so that each is contiguous
    keys = k.unflatten(3, (num_pieces, -1)).permute(1, 3, 0, 2, 4, 5).contiguous()
    strengths = beta.unflatten(3, (num_pieces, -1)).permute(1, 3, 0, 2, 4).contiguous()
    values = v.unflatten(2, (num_pieces, -1)).permute(1, 2, 0, 3, 4)
    queries = q.permute(1, 0, 3, 2, 4).flatten(3)  # all heads' beside one another: one product sums their reads
    scan = _chain_pieces if takes_kernels and num_writes else _Scan.apply
    reads, end = scan(queries, keys, strengths, values, change, rest, decay)
    return reads.transpose(0, 1), end if num_writes else change


def write_delta_rule(k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Tensor:
    """What a text's tokens, written one after the other, add to M.

    Args:
        k: keys, [B, H, T, K]; 0 where nothing is written.
        v: values, [B, T, V].
        beta: [B, H, T].
        memory: M, [B, H, K, V].
    """
    added = torch.zeros_like(memory)
    pieces = (k.split(PIECE_LENGTH, 2), v.unsqueeze(1).split(PIECE_LENGTH, 2), beta.split(PIECE_LENGTH, 2))
    for key, value, strength in zip(*pieces, strict=True):
        bases, _, _ = _solve_writes(key, strength, key.dtype)
        added = added + (bases * strength.unsqueeze(-2)) @ (value - key @ (memory + added))
    return added


def sum_reads(queries: Tensor, memory: Tensor) -> Tensor:
    """Σ_h q_h M_h from all heads' queries beside one another [B, S, H K] and M [B, H, K, V]; [B, S, V]."""
    return queries @ memory.flatten(1, 2)


def _solve_writes(k: Tensor, beta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """W diag(β)⁻¹ = Kᵀ N in `dtype`, N = (I + tril(diag(β) K Kᵀ, −1))⁻¹ likewise, and K Kᵀ."""
    products = k @ k.transpose(-1, -2)
    if k.shape[-2] == 1:  # nothing to solve
        return k.to(dtype).transpose(-1, -2), torch.ones_like(products, dtype=dtype), products
    # the solver never looks at the diagonal, nor at what is above it
    units = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device).expand_as(products)
    inverse = torch.linalg.solve_triangular(beta.unsqueeze(-1) * products, units, upper=False, unitriangular=True)
    inverse = inverse.to(dtype)
    return k.to(dtype).transpose(-1, -2) @ inverse, inverse, products


def _chain_pieces(
    q: Tensor, k: Tensor, beta: Tensor, v: Tensor, change: Tensor, rest: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """What `_Scan` makes, by the kernels of a GPU; arguments as there."""
    dtype, num_pieces = q.dtype, k.shape[1]
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


class _Scan(torch.autograd.Function):
    """W of all pieces, the recurrence from piece to piece, and the reads.

    Going back through the recurrence, with G = ∂L/∂M behind a piece and E = V − K M: E' = Wᵀ G, W' = G Eᵀ,
    K' = −E' Mᵀ and G ← G − Kᵀ E'. Through W = U diag(β), U = Kᵀ N, N = (I + A)⁻¹, A = tril(diag(β) K Kᵀ, −1): with
    Z = N (W' diag(β))ᵀ, K' = Z and A' = −Uᵀ Zᵀ below the diagonal.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, beta: Tensor, v: Tensor, change: Tensor, rest: Tensor, decay: Tensor
    ) -> tuple[Tensor, Tensor]:
        """q [n, B, S, H K]; k [w, m, B, H, C, K] and beta in M's dtype; v [w, m, B, C, V]; the others as in
        `scan_delta_rule`. Returns the reads [n, B, S, V] and C after the last write.
        """
        num_writes, heads, dtype = len(k), k.shape[3], q.dtype
        bases, inverses, products = _solve_writes(k, beta, dtype)
        writes = (bases * beta.unsqueeze(-2)).to(dtype)
        keys = k.to(dtype)
        errors = v.unsqueeze(3).repeat(1, 1, 1, heads, 1, 1)
        reads = q.new_empty(*q.shape[:3], v.shape[-1])
        held = rest + change
        states, narrow = [held], held.to(dtype)
        for index, query in enumerate(q):
            torch.bmm(query, narrow.flatten(1, 2), out=reads[index])
            if index >= num_writes:
                continue
            held = _fade(held, rest, decay[:, index])
            for key, write, error in zip(keys[index], writes[index], errors[index], strict=True):
                error.flatten(0, 1).baddbmm_(key.flatten(0, 1), held.to(dtype).flatten(0, 1), alpha=-1)
                held = add_product(held, write, error)
            states.append(held)
            narrow = held.to(dtype)
        ctx.save_for_backward(q, keys, beta, bases, inverses, products, errors, rest, decay, *states)
        return reads, held - rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, beta, bases, inverses, products, errors, rest, decay, *states = ctx.saved_tensors
        for_reads, g = upstreams
        num_writes, dtype = len(k), q.dtype
        writes = (bases * beta.unsqueeze(-2)).to(dtype)
        for_q, for_k, for_writes, for_errors = (torch.empty_like(t) for t in (q, k, writes, errors))
        for_decay, for_rest = torch.empty_like(decay), -g
        for index in reversed(range(len(q))):
            state = states[min(index, num_writes)]
            if index < num_writes:
                held = [_fade(state, rest, decay[:, index])]
                for write, error in zip(writes[index, :-1], errors[index, :-1], strict=True):
                    held.append(add_product(held[-1], write, error))
                for piece in reversed(range(len(held))):
                    place = index, piece
                    narrow = g.to(dtype)
                    torch.matmul(writes[place].transpose(-1, -2), narrow, out=for_errors[place])
                    torch.matmul(narrow, errors[place].transpose(-1, -2), out=for_writes[place])
                    torch.matmul(for_errors[place], held[piece].to(dtype).transpose(-1, -2), out=for_k[place])
                    g = add_product(g, k[place].transpose(-1, -2), for_errors[place], sign=-1)
                for_decay[:, index] = ((state - rest) * g).sum((-1, -2))
                retained = decay[:, index, :, None, None]
                for_rest.addcmul_(g, 1 - retained)
                g = g * retained
            torch.bmm(for_reads[index], state.to(dtype).flatten(1, 2).transpose(-1, -2), out=for_q[index])
            flat = g.flatten(1, 2)
            g = add_product(flat, q[index].transpose(-1, -2), for_reads[index]).view_as(g)
        for_beta = (for_writes * bases).sum(-2, dtype=beta.dtype)
        through = inverses @ (for_writes * beta.unsqueeze(-2)).to(dtype).transpose(-1, -2)  # Z
        below = (bases.transpose(-1, -2) @ through.transpose(-1, -2)).to(beta.dtype).tril_(-1)  # −A'
        for_beta -= (below * products).sum(-1)
        below *= beta.unsqueeze(-1)
        for_k = through - for_k - (below + below.transpose(-1, -2)).to(dtype) @ k
        return for_q, for_k.to(beta.dtype), for_beta, for_errors.sum(3), g, (for_rest + g).sum(0), for_decay


def _fade(memory: Tensor, rest: Tensor, retained: Tensor) -> Tensor:
    """M₀ + w (M − M₀) of [B, H, K, V], [H, K, V] and [B, H]."""
    return torch.lerp(rest, memory, retained[..., None, None])
