"""The delta rule token by token, a segment at a time: M_t = M_{t−1} + k_tᵀ β_t (v_t − k_t M_{t−1}).

Inside a segment the rule is a triangular system, and over segments a recurrence of matrix products
(arXiv:2406.06484, section 3): with A = I + tril(diag(β) K Kᵀ, −1), U = A⁻¹ diag(β) V and W = A⁻¹ diag(β) K,
M ← M + Kᵀ (U − W M). M is M₀ + C, a rest and what text has changed; before each segment's write C fades, C ← w C.

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
        reads.append(q[:, index] @ (rest + change))
        if index >= decay.shape[1]:
            continue
        change = decay[:, index, :, None, None] * change
        for token in range(q.shape[3]):
            key, value = k[:, index, :, token], v[:, index, :, token]
            held = (key.unsqueeze(-2) @ (rest + change)).squeeze(-2)
            error = beta[:, index, :, token, None] * (value - held)
            change = change + key.unsqueeze(-1) * error.unsqueeze(-2)
    return torch.stack(reads, 1), change


def scan_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, change: Tensor, rest: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """Read the memory of before each segment, then let it fade and write the segment.

    Args:
        q: queries, [B, n, H, S, K].
        k: keys, likewise; 0 where nothing is written.
        v: values, [B, n, H, S, V], or what broadcasts to it.
        beta: how much of the error is written, [B, n, H, S]; between 0 and 2 for keys of length 1.
        change: C before the first segment, [B, H, K, V].
        rest: M₀, [H, K, V].
        decay: w of each write, [B, w, H]; the first w of the n segments are written.

    Returns:
        q M of each segment [B, n, H, S, V], and C after the last write.
    """
    num_writes = decay.shape[1]
    changes, corrections = solve_writes(k[:, :num_writes], v[:, :num_writes], beta[:, :num_writes])
    reads = []
    for index in range(q.shape[1]):
        reads.append(q[:, index] @ (rest + change))
        if index < num_writes:
            change = decay[:, index, :, None, None] * change
            error = changes[:, index] - corrections[:, index] @ (rest + change)
            change = change + k[:, index].transpose(-1, -2) @ error
    return torch.stack(reads, 1), change


def solve_writes(k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """U and W of whole pieces of text: what a piece writes is Kᵀ (U − W M); [..., S, V] and [..., S, K]."""
    weighed = beta.unsqueeze(-1) * k
    earlier = torch.tril(weighed @ k.transpose(-1, -2), diagonal=-1)
    targets = torch.cat((beta.unsqueeze(-1) * v, weighed), dim=-1)
    solved = torch.linalg.solve_triangular(earlier, targets, upper=False, unitriangular=True)
    return solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
