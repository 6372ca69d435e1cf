"""Causal linear attention inside one segment.

Legend: B batch (any number of leading dimensions, heads included), S tokens of the segment, K key width, V value width.
All functions take features σ(q), σ(k), not raw queries and keys: a layer maps them once and uses them twice, here and
in the memory.
"""

import torch
from torch import Tensor


def feature_map(x: Tensor) -> Tensor:
    """σ(x) = ELU(x) + 1, which is x + 1 above 0 and exp(x) below; always positive.

    Written as exp(min(x, 0)) + max(x, 0): without the detour over exp(x) − 1, which in 16 bits would round small
    features to 0, and with slope 1 at 0.
    Source: Katharopoulos et al., arXiv:2006.16236, eq. 7.

    Args:
        x: queries or keys, any shape; 16-bit values are mapped in float32 and rounded once.

    Returns:
        The same shape and dtype.
    """
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return (wide.clamp(max=0).exp() + wide.relu()).to(x.dtype)


def local_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    epsilon: float,
    chunk_length: int,
    initial_sums: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A[t] = Σ_{j≤t} (q_t·k_j) v_j / max(Σ_{j≤t} q_t·k_j, ε).

    Quadratic and masked within chunks of `chunk_length` tokens; from chunk to chunk runs a state of constant size, so
    that nothing of size [S, K, V] is ever held.

    Args:
        q: features of the queries, [..., S, K].
        k: features of the keys, [..., S, K]; a row of zeros takes its token out.
        v: values, [..., S, V].
        epsilon: ε, the least divisor.
        chunk_length: tokens up to which the quadratic form is used.
        initial_sums: Σ kᵀv [..., K, V] and Σ k [..., K] of earlier tokens of the segment, at least float32.

    Returns:
        [..., S, V] in v's dtype.
    """
    outputs: list[Tensor] = []
    sums = initial_sums
    num_tokens = q.shape[-2]
    for begin in range(0, num_tokens, chunk_length):
        part = slice(begin, begin + chunk_length)
        q_part, k_part, v_part = q[..., part, :], k[..., part, :], v[..., part, :]
        scores = (q_part @ k_part.transpose(-1, -2)).tril()
        numerator = scores @ v_part
        denominator = scores.sum(-1, keepdim=True, dtype=_wide(scores))
        if sums is not None:
            wide_q = q_part.to(sums[0].dtype)
            numerator = numerator + wide_q @ sums[0]
            denominator = denominator + wide_q @ sums[1].unsqueeze(-1)
        outputs.append((numerator / denominator.clamp_min(epsilon)).to(v.dtype))
        if begin + chunk_length < num_tokens:
            wide_k, wide_v = k_part.to(_wide(k)), v_part.to(_wide(v))
            new = (wide_k.transpose(-1, -2) @ wide_v, wide_k.sum(-2))
            sums = new if sums is None else (sums[0] + new[0], sums[1] + new[1])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-2)


def local_linear_attention_naive(q: Tensor, k: Tensor, v: Tensor, *, epsilon: float) -> Tensor:
    """The equation of `local_linear_attention`, token by token."""
    outputs = []
    for t in range(q.shape[-2]):
        numerator = torch.zeros_like(v[..., 0, :])
        denominator = torch.zeros_like(v[..., 0, 0])
        for j in range(t + 1):
            weight = (q[..., t, :] * k[..., j, :]).sum(-1)
            numerator = numerator + weight.unsqueeze(-1) * v[..., j, :]
            denominator = denominator + weight
        outputs.append(numerator / denominator.clamp_min(epsilon).unsqueeze(-1))
    return torch.stack(outputs, dim=-2)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
