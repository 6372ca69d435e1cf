"""The delta rule token by token, a segment at a time: M_t = M_{t−1} + k_tᵀ β_t (v_t − k_t M_{t−1}).

Inside a segment the rule is a triangular system, and over segments a recurrence of matrix products
(arXiv:2406.06484, section 3): with T = (I + tril(diag(β) K Kᵀ, −1))⁻¹ diag(β), M ← M + Kᵀ T (V − K M). M is M₀ + C, a
rest and what text has changed; before each segment's write C fades, C ← w C.

Legend: B rows, n segments, S tokens of a segment, H heads, K and V widths of keys and values.
"""

import torch
from torch import Tensor


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

    Args:
        q: queries, each head's weighed as its read is to be, [B, n, H, S, K].
        k: keys, likewise; 0 where nothing is written.
        v: values, which all heads write, [B, n, S, V].
        beta: how much of the error is written, [B, n, H, S]; between 0 and 2 for keys of length 1.
        change: C before the first segment, [B, H, K, V].
        rest: M₀, [H, K, V].
        decay: w of each write, [B, w, H]; the first w of the n segments are written.

    Returns:
        Σ_h q_h M_h of each segment [B, n, S, V], and C after the last write.
    """
    num_writes = decay.shape[1]
    queries = q.transpose(2, 3).flatten(3).unbind(1)  # all heads' beside one another: one product sums their reads
    keys, values = k[:, :num_writes], v[:, :num_writes].unsqueeze(2)
    writes = [t.unbind(1) for t in (solve_writes(keys, beta[:, :num_writes]), keys, values, decay[..., None, None])]
    reads = [sum_reads(queries[0], rest + change)]
    for index, (solved, key, value, retained) in enumerate(zip(*writes, strict=True), start=1):
        change = retained * change
        change = change + key.transpose(-1, -2) @ (solved @ (value - key @ (rest + change)))
        if index < len(queries):
            reads.append(sum_reads(queries[index], rest + change))
    reads += [sum_reads(query, rest + change) for query in queries[num_writes + 1 :]]
    return torch.stack(reads, 1), change


def sum_reads(queries: Tensor, memory: Tensor) -> Tensor:
    """Σ_h q_h M_h from all heads' queries beside one another [B, S, H K] and M [B, H, K, V]; [B, S, V]."""
    return queries @ memory.flatten(1, 2)


def solve_writes(k: Tensor, beta: Tensor) -> Tensor:
    """T of whole pieces of text, [..., S, S]: what a piece writes is Kᵀ T (V − K M)."""
    coefficients = torch.tril(beta.unsqueeze(-1) * (k @ k.transpose(-1, -2)), diagonal=-1)
    return torch.linalg.solve_triangular(coefficients, torch.diag_embed(beta), upper=False, unitriangular=True)
