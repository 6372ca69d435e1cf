"""Reads, selection and writes of compressive memories for one segment, and decayed sums over many segments.

Legend: B rows, N memories (or banks), H heads, S tokens, K key width, V value width, n segments. Keys and queries are
features σ(·). M is `memories` [B, N, H, K, V] and z is `norms` [B, N, H, K], both float32 or wider whatever the dtype
of q, k and v. `write_memory` is one step of the recurrence that `memory_scan` runs over all segments of a call.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

HAS_WIDE_SUMS = "dtype" in torch.ops.aten.bmm.overloads()
"""Whether a GPU product of 16-bit tensors can return its float32 sums without float32 copies of them (torch 2.8)."""

LEAST_DEVIATION = 1e-6
"""Its square is added to the variance when scores are standardised."""


def read_memories(
    q: Tensor, memories: Tensor, norms: Tensor, *, epsilon: float | None, weights: Tensor | None = None
) -> Tensor:
    """A = Σ_n w_n (q M_n) / max(q z_n, ε); an empty memory (M = 0, z = 0) contributes 0.

    Source: Infini-attention, arXiv:2404.07143, eq. 3. Weights and divisors are folded into the queries, so that one
    product reads all memories. With 16-bit queries each M is first divided by the mean of its z, so that it can't
    overflow however much has been written.

    Args:
        q: features of the queries, [B, H, S, K].
        memories: M, [B, N, H, K, V].
        norms: z, [B, N, H, K].
        epsilon: ε, the smallest divisor; None: no divisor, Σ_n w_n (q M_n).
        weights: w, broadcastable to [B, N, H, S]; None: 1.

    Returns:
        [B, H, S, V] in q's dtype.

    Raises:
        ValueError: the widths of q and the memories differ.
    """
    if q.shape[-1] != memories.shape[-2]:
        raise ValueError(f"queries of width {q.shape[-1]} can't read a memory with keys of width {memories.shape[-2]}")
    wide_q = q.to(norms.dtype)
    if epsilon is None:
        coefficients = norms.new_ones(()) if weights is None else weights
        coefficients = coefficients.expand(len(q), norms.shape[1], *q.shape[1:3])
        scaled_q = (wide_q.unsqueeze(1) * coefficients.unsqueeze(-1)).to(q.dtype)
        return torch.einsum("bnhsk,bnhkv->bhsv", scaled_q, memories.to(q.dtype))
    divisors = torch.einsum("bhsk,bnhk->bnhs", wide_q, norms).clamp_min(epsilon)
    coefficients = divisors.reciprocal() if weights is None else weights / divisors
    if q.dtype != memories.dtype:
        scale = norms.mean(-1).clamp_min(epsilon)  # [B, N, H]
        memories = memories / scale[..., None, None]
        coefficients = coefficients * scale.unsqueeze(-1)
    scaled_q = (wide_q.unsqueeze(1) * coefficients.unsqueeze(-1)).to(q.dtype)  # [B, N, H, S, K]
    if memories.shape[1] == 1:
        return scaled_q[:, 0] @ memories[:, 0].to(q.dtype)
    all_q = scaled_q.permute(0, 2, 3, 1, 4).flatten(-2)  # [B, H, S, N·K]
    all_memories = memories.transpose(1, 2).flatten(2, 3).to(q.dtype)  # [B, H, N·K, V]
    return all_q @ all_memories


def read_memories_naive(
    q: Tensor, memories: Tensor, norms: Tensor, *, epsilon: float, weights: Tensor | None = None
) -> Tensor:
    """The equation of `read_memories`, memory by memory and token by token."""
    rows, num_memories, heads = memories.shape[:3]
    result = torch.zeros(*q.shape[:3], memories.shape[-1], dtype=q.dtype)
    if weights is None:
        weights = torch.ones((), dtype=q.dtype)
    weights = weights.expand(rows, num_memories, heads, q.shape[2])
    for b in range(rows):
        for h in range(heads):
            for t in range(q.shape[2]):
                for n in range(num_memories):
                    divisor = (q[b, h, t] @ norms[b, n, h]).clamp_min(epsilon)
                    result[b, h, t] += weights[b, n, h, t] * (q[b, h, t] @ memories[b, n, h]) / divisor
    return result


def weigh_memories(
    products: Tensor,
    num_tokens: Tensor,
    *,
    width: int,
    temperature: float | Tensor = 1.0,
    standardize: bool = False,
) -> Tensor:
    """w = softmax(s / τ) over the non-empty memories, with s_n = q·(z_n / c_n) / √K.

    A token's weights depend only on that token and on the past; nothing is averaged over time.

    Args:
        products: q·z_n, which a read needs anyway, [..., H, S, N].
        num_tokens: c_n, the number of tokens that memory n has seen, [..., N]; 0: an empty memory.
        width: K.
        temperature: τ, a number or [H].
        standardize: replace s_n by (s_n − mean) / standard deviation over the token's non-empty memories, so that even
            small differences between scores can decide.

    Returns:
        [..., H, S, N]; equal weights if all memories are empty (their reads are 0 anyway).
    """
    counts = num_tokens[..., None, None, :]
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None, None].to(products.dtype)
    if standardize:
        scores = (
            _standardize(products / (counts.clamp_min(1).to(products.dtype) * width**0.5), counts > 0) / temperature
        )
    else:
        scores = products / (counts.clamp_min(1).to(products.dtype) * (temperature * width**0.5))
    return scores.masked_fill(counts == 0, torch.finfo(scores.dtype).min).softmax(dim=-1)


def _standardize(scores: Tensor, is_filled: Tensor) -> Tensor:
    """(s − mean) / standard deviation over the filled entries of the last dimension; 0 if only one is filled."""
    number = is_filled.sum(-1, keepdim=True).clamp_min(1)
    mean = (scores * is_filled).sum(-1, keepdim=True) / number
    centred = (scores - mean) * is_filled
    variance = centred.square().sum(-1, keepdim=True) / number
    return centred * (variance + LEAST_DEVIATION**2).rsqrt()


def multiply_norms(q: Tensor, norms: Tensor) -> Tensor:
    """q·z_n in z's precision: [..., S, K] and [..., N, K] to [..., S, N].

    If q is narrower, backward widens it again instead of keeping a wide copy.
    """
    return q @ norms.transpose(-1, -2) if q.dtype == norms.dtype else _WideProduct.apply(q, norms)


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, norms: Tensor) -> Tensor:
        ctx.save_for_backward(q, norms)
        return q.to(norms.dtype) @ norms.transpose(-1, -2)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, norms = ctx.saved_tensors
        return (upstream @ norms).to(q.dtype), upstream.transpose(-1, -2) @ q.to(norms.dtype)


def weigh_memories_naive(
    products: Tensor, num_tokens: Tensor, *, width: int, temperature: float | Tensor = 1.0, standardize: bool = False
) -> Tensor:
    """The equation of `weigh_memories`, token by token: [B, H, S, N]."""
    weights, temperature = torch.zeros_like(products), torch.as_tensor(temperature).expand(products.shape[1])
    for b, h, t in itertools.product(*map(range, products.shape[:3])):
        filled = [n for n in range(products.shape[3]) if num_tokens[b, n] > 0] or list(range(products.shape[3]))
        scores = torch.stack([products[b, h, t, n] / max(float(num_tokens[b, n]), 1.0) / width**0.5 for n in filled])
        if standardize:
            scores = (scores - scores.mean()) / (scores.var(correction=0) + LEAST_DEVIATION**2).sqrt()
        weights[b, h, t, filled] = torch.softmax(scores / temperature[h], 0)
    return weights


def sum_outer_products(k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_t k_tᵀ v_t in `dtype`, the memory's: [..., S, K] and [..., S, V] to [..., K, V]."""
    if HAS_WIDE_SUMS and k.is_cuda and k.dtype == v.dtype == torch.bfloat16 and dtype == torch.float32:
        return _WideSums.apply(k.flatten(0, -3), v.flatten(0, -3)).unflatten(0, k.shape[:-2])
    return k.to(dtype).transpose(-1, -2) @ v.to(dtype)


class _WideSums(torch.autograd.Function):
    """kᵀ v in float32 of bfloat16 tensors [G, S, K] and [G, S, V]; torch's `bmm` with `out_dtype` has no backward."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(k, v)
        if not k.is_cuda:  # only in tests
            return k.float().transpose(1, 2) @ v.float()
        return torch.bmm(k.transpose(1, 2), v, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        k, v = ctx.saved_tensors
        narrow = upstream.to(k.dtype)
        return v @ narrow.transpose(1, 2), k @ narrow


def add_outer_products(sums: Tensor, k: Tensor, v: Tensor) -> None:
    """Add Σ_t k_tᵀ v_t to `sums` [..., K, V] in place, in its dtype; k and v as in `sum_outer_products`."""
    k, v = k.to(sums.dtype), v.to(sums.dtype)
    if k.shape[-2] == 1:
        sums.addcmul_(k.transpose(-1, -2), v)
    else:
        sums.add_(k.transpose(-1, -2) @ v)


def write_memory(
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    norm: Tensor,
    *,
    use_delta_rule: bool,
    epsilon: float,
    decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """M ← w M + Σ_t k_tᵀ (v_t − r_t),  z ← w z + Σ_t k_t;  r_t = k_t M / max(k_t z, ε) with the delta rule, else 0.

    Source: Infini-attention, arXiv:2404.07143, eqs. 4 and 5. r is read from the memory as it was before the segment.

    Args:
        k: features of the keys, [B, H, S, K]; a token with a zero key is not written.
        v: values, [B, H, S, V].
        memory: M, [B, H, K, V].
        norm: z, [B, H, K].
        use_delta_rule: write only what the memory does not return yet.
        epsilon: ε, the smallest divisor.
        decay: w, [H]; None: 1.

    Returns:
        The new M and z; the arguments are not changed.
    """
    if use_delta_rule:
        v = v - read_memories(k, memory.unsqueeze(1), norm.unsqueeze(1), epsilon=epsilon)
    new_memory = sum_outer_products(k, v, memory.dtype)
    new_norm = k.sum(-2, dtype=norm.dtype)
    if decay is not None:
        memory, norm = memory * decay[:, None, None], norm * decay[:, None]
    return memory + new_memory, norm + new_norm


def write_memory_naive(
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    norm: Tensor,
    *,
    use_delta_rule: bool,
    epsilon: float,
    decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The equations of `write_memory`, token by token."""
    rows, heads, length, _ = k.shape
    w = torch.ones(heads, dtype=memory.dtype) if decay is None else decay
    new_memory, new_norm = memory * w[:, None, None], norm * w[:, None]
    for b in range(rows):
        for h in range(heads):
            for t in range(length):
                key, value = k[b, h, t], v[b, h, t]
                if use_delta_rule:
                    value = value - key @ memory[b, h] / (key @ norm[b, h]).clamp_min(epsilon)
                new_memory[b, h] += torch.outer(key, value)
                new_norm[b, h] += key
    return new_memory, new_norm


def scan_sums(initial: Tensor, changes: Tensor, decay: Tensor | None = None) -> Tensor:
    """y_0 = `initial`, y_{i+1} = d_i y_i + x_i, for all i in log2(n) rounds of whole-tensor operations.

    Each round combines pairs (d, x): (d1, x1) followed by (d2, x2) is (d1 d2, d2 x1 + x2), which is associative.
    Source: Blelloch, Prefix Sums and Their Applications, CMU-CS-90-190, section 1.4; rounds as in Hillis and Steele.

    Args:
        initial: y_0, [B, ...].
        changes: x, [B, n, ...].
        decay: d, [B, n, ...], broadcastable to x; None: 1.

    Returns:
        y_0 … y_n, [B, n + 1, ...].
    """
    sums = torch.cat((initial.unsqueeze(1), changes), dim=1)
    if decay is None:
        return sum_prefixes(sums, 1)
    decay = torch.cat((torch.ones_like(decay[:, :1]), decay), dim=1)
    reach = 1
    while reach < sums.shape[1]:
        joined = sums[:, reach:] + decay[:, reach:] * sums[:, :-reach]
        sums = torch.cat((sums[:, :reach], joined), dim=1)
        decay = torch.cat((decay[:, :reach], decay[:, reach:] * decay[:, :-reach]), dim=1)
        reach *= 2
    return sums


def sum_prefixes(values: Tensor, dim: int) -> Tensor:
    """`cumsum`, but deterministic on a GPU if torch's deterministic algorithms are on.

    torch has no deterministic cumsum of floating-point numbers on a GPU, so `add_in_rounds` replaces it there.
    """
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return add_in_rounds(values, dim)
    return values.cumsum(dim)


def add_in_rounds(values: Tensor, dim: int) -> Tensor:
    """`cumsum` in the rounds of `scan_sums`; each round is one addition of whole tensors."""
    sums, reach = values, 1
    length = values.shape[dim]
    while reach < length:
        first, rest = sums.split((reach, length - reach), dim)
        sums = torch.cat((first, rest + sums.narrow(dim, 0, length - reach)), dim)
        reach *= 2
    return sums


def scan_sums_naive(initial: Tensor, changes: Tensor, decay: Tensor | None = None) -> Tensor:
    """The equation of `scan_sums`, segment by segment."""
    sums = [initial]
    for i in range(changes.shape[1]):
        before = sums[-1] if decay is None else decay[:, i] * sums[-1]
        sums.append(before + changes[:, i])
    return torch.stack(sums, dim=1)
