"""Causal attention within one segment: linear for memory layers, softmax for Pythia layers.

Legend: B rows, H heads, S tokens per segment, K key width, V value width. Linear attention takes features σ(q) and σ(k)
instead of raw queries and keys, so that a layer computes them once for local attention and memory.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from new_llm.models.ops import kernels
from new_llm.models.ops.kernels import native
from new_llm.models.ops.memory import sum_outer_products, sum_prefixes

BLOCK_QUERIES = 256
"""Largest number of queries in a block of softmax attention."""
BLOCK_SCORES = 2**22
"""Scores computed at once, so that they stay in cache; decides how many batch rows are processed together."""
MIN_SCORES = 2**18
"""Smallest number of scores, over all rows and heads, for which the fast softmax attention is used; for fewer it saves
nothing."""

# Linear attention


def feature_map(x: Tensor) -> Tensor:
    """σ(x) = ELU(x) + 1: x + 1 above 0 and exp(x) below, always positive.

    Computed as exp(min(x, 0)) + max(x, 0). Computing ELU first would go through exp(x) − 1, which in 16 bits rounds
    small features to 0.
    Source: Katharopoulos et al., arXiv:2006.16236, eq. 7.

    Args:
        x: queries or keys, of any shape; 16-bit values are mapped in float32 and rounded once.
    """
    return _FeatureMap.apply(x)


LEAST_NORM = 1e-12
"""Lower bound on the length that a vector is divided by."""


def map_features(x: Tensor, kind: str) -> Tensor:
    """Features of queries or keys: "elu", σ(x); "unit", x / ‖x‖, which keeps signs; "softmax", over the last dimension.

    Features of length at most 1 ("unit", "softmax") keep a delta rule stable (arXiv:2406.06484, section 2.2). Positive
    features ("elu", "softmax") allow reads to be divided by q z.
    """
    if kind == "unit":
        return scale_to_length(x)
    return x.softmax(-1) if kind == "softmax" else feature_map(x)


def scale_to_length(x: Tensor, lengths: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """l x / ‖x‖ in `dtype` (None: x's), for x [..., K] and lengths l [...] (None: 1); computed at least in float32."""
    return _ScaleToLength.apply(x, lengths, x.dtype if dtype is None else dtype)


class _ScaleToLength(torch.autograd.Function):
    """y = f x with f = l / ‖x‖. Gradients: x' = f (y' − x (x·y') / ‖x‖²) and l' = (x·y') / ‖x‖."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Tensor | None, dtype: torch.dtype) -> Tensor:
        x, lengths = x.contiguous(), None if lengths is None else lengths.contiguous()
        found = native.find_kernels(x, x.new_empty(0, dtype=dtype), x if lengths is None else lengths)
        if found is not None:
            y, norms = native.scale_rows(found, x, lengths, dtype, least=LEAST_NORM)
            ctx.save_for_backward(x, norms, lengths)
            return y
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min_(LEAST_NORM)
        ctx.save_for_backward(x, norms, lengths)
        return (wide / norms if lengths is None else wide * (lengths.unsqueeze(-1) / norms)).to(dtype)

    @staticmethod
    @kernels.differentiate_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, norms, lengths = ctx.saved_tensors
        if norms.dim() < x.dim():
            found = native.load_kernels()
            assert found is not None
            return *native.scale_rows_backward(found, x, lengths, norms, upstream.contiguous()), None
        wide, upstream = x.to(norms.dtype), upstream.to(norms.dtype)
        along = (wide * upstream).sum(-1, keepdim=True).div_(norms)
        factors = norms.reciprocal() if lengths is None else lengths.unsqueeze(-1) / norms
        for_x = (upstream * factors).addcmul_(wide, along / norms * factors, value=-1)
        return for_x.to(x.dtype), None if lengths is None else along.squeeze(-1).to(lengths.dtype), None


class _FeatureMap(torch.autograd.Function):
    """σ; its slope is min(σ, 1), so backward needs only the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        y = wide.clamp(max=0).exp_().add_(wide.clamp(min=0)).to(x.dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (y,) = ctx.saved_tensors
        return upstream * y.clamp(max=1)


def local_linear_attention_naive(q: Tensor, k: Tensor, v: Tensor, *, epsilon: float) -> Tensor:
    """A[t] = Σ_{j≤t} (q_t·k_j) v_j / max(Σ_{j≤t} q_t·k_j, ε), token by token; see `local_linear_attention`."""
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

    Masked products of quadratic cost within chunks of `chunk_length` tokens; each chunk starts from the sums over
    earlier chunks, so that nothing of size [S, K, V] is ever held.

    Args:
        q: features of the queries, [..., S, K].
        k: features of the keys, [..., S, K]; a token with a zero key is ignored.
        v: values, [..., S, V].
        epsilon: ε, the smallest divisor.
        chunk_length: longest chunk in tokens; ignored on a GPU, where `choose_chunk` decides.
        initial_sums: Σ kᵀv [..., K, V] and Σ k [..., K] over earlier tokens of the segment, at least float32.

    Returns:
        [..., S, V] in v's dtype.
    """
    if v.is_cuda:
        chunk_length = choose_chunk(q.shape[-2], q.shape[-1], v.shape[-1])
    if q.shape[-2] > chunk_length:
        return _attend_in_chunks(q, k, v, epsilon, chunk_length, initial_sums)
    if kernels.uses_triton(v):
        return _attend_by_kernels(q, k, v, epsilon, initial_sums)
    scores = (q @ k.transpose(-1, -2)).tril()
    numerator = scores @ v
    denominator = scores.sum(-1, keepdim=True, dtype=_wide(scores))
    if initial_sums is not None:
        wide_q = q.to(initial_sums[0].dtype)
        numerator = numerator + wide_q @ initial_sums[0]
        denominator = denominator + wide_q @ initial_sums[1].unsqueeze(-1)
    return (numerator / denominator.clamp_min(epsilon)).to(v.dtype)


def choose_chunk(num_tokens: int, width: int, value_width: int) -> int:
    """Chunk length C on a GPU: the wider of K and V, but 64 to 256; all tokens in one chunk if that is less work.

    A token costs C (K + V) / 2 multiplications within its chunk, and 2 K V for the state between chunks, which is
    written and read.
    """
    chunk = min(max(width, value_width, 64), 256)
    is_less_work = (num_tokens - chunk) * (width + value_width) <= 4 * width * value_width
    return num_tokens if is_less_work else chunk


def _attend_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, epsilon: float, chunk_length: int, sums: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Process all chunks at once, each with the sums over the chunks before it."""
    axis, num_tokens = q.dim() - 2, q.shape[-2]
    num_chunks = -(-num_tokens // chunk_length)
    missing = num_chunks * chunk_length - num_tokens
    q, k, v = (F.pad(t, (0, 0, 0, missing)).unflatten(-2, (num_chunks, chunk_length)) for t in (q, k, v))
    first_k, first_v = (t.narrow(axis, 0, num_chunks - 1) for t in (k, v))  # nothing reads the last chunk's sums
    steps = sum_outer_products(first_k, first_v, _wide(k)), first_k.sum(-2, dtype=_wide(k))
    earlier = tuple(sum_prefixes(F.pad(t, (0, 0) * (t.dim() - axis - 1) + (1, 0)), axis) for t in steps)
    if sums is not None:
        earlier = tuple(t + first.unsqueeze(axis) for t, first in zip(earlier, sums, strict=True))
    mixed = local_linear_attention(
        q, k, v, epsilon=epsilon, chunk_length=chunk_length, initial_sums=(earlier[0], earlier[1])
    )
    return mixed.flatten(-3, -2)[..., :num_tokens, :]


def _attend_by_kernels(q: Tensor, k: Tensor, v: Tensor, epsilon: float, sums: tuple[Tensor, Tensor] | None) -> Tensor:
    """One chunk. The initial sums of weights, q·Σ k, are computed outside the kernel to save registers inside it."""
    products = weights = None
    if sums is not None:
        products = sums[0].to(v.dtype).flatten(0, -3)
        weights = (q.to(sums[1].dtype) @ sums[1].unsqueeze(-1)).squeeze(-1).flatten(0, -2)
    mixed, _ = _attend_locally(*(t.flatten(0, -3) for t in (q, k, v)), products, weights, epsilon)
    return mixed.view(v.shape)


@library.custom_op("new_llm::local_attention", mutates_args=())
def _attend_locally(
    q: Tensor, k: Tensor, v: Tensor, products: Tensor | None, weights: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """A = n / max(s, ε) with n = q P + Σ (q·k) v and s = w + Σ q·k; returns A and s.

    The gradients are sums of the same form. With n' = A' / max(s, ε), and s' = −A'·A / max(s, ε) if s ≥ ε, else 0:
    q'_t = n'_t Pᵀ + Σ_{j≤t} (n'_t·v_j + s'_t) k_j,  k'_j = Σ_{t≥j} (n'_t·v_j + s'_t) q_t,
    v'_j = Σ_{t≥j} (q_t·k_j) n'_t,  P' = Σ_t q_tᵀ n'_t,  w' = s'.

    q, k [G, S, K], v [G, S, V], P [G, K, V], w and s [G, S].
    """
    initial = None if products is None or weights is None else (products, weights)
    return kernels.load_triton().sum_causally(q, k, v, initial=initial, epsilon=epsilon)


@library.custom_op("new_llm::local_attention_backward", mutates_args=())
def _attend_locally_backward(
    upstream: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    products: Tensor | None,
    mixed: Tensor,
    sums: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, P (an empty tensor if P is None) and w."""
    sum_causally = kernels.load_triton().sum_causally
    wide = upstream.float() / sums.clamp_min(epsilon).unsqueeze(-1)
    for_sums = -(wide * mixed).sum(-1) * (sums >= epsilon)
    for_mixed = wide.to(v.dtype)
    for_q, _ = sum_causally(for_mixed, v, k, row=for_sums)
    for_k, _ = sum_causally(v, for_mixed, q, col=for_sums, from_ahead=True)
    for_v, _ = sum_causally(k, q, for_mixed, from_ahead=True)
    if products is None:
        return for_q, for_k, for_v, v.new_empty(0), for_sums
    for_q += for_mixed @ products.transpose(-1, -2)
    return for_q, for_k, for_v, q.transpose(-1, -2) @ for_mixed, for_sums


@_attend_locally.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, products: Tensor | None, weights: Tensor | None, epsilon: float):
    return v.new_empty(v.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@_attend_locally_backward.register_fake
def _(upstream, q, k, v, products, mixed, sums, epsilon):
    parts = (q, k, v, v.new_empty(0) if products is None else products, sums)
    return tuple(t.new_empty(t.shape) for t in parts)


def _keep_locally(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, ctx.epsilon = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate_locally(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _attend_locally_backward(upstream, *ctx.saved_tensors, ctx.epsilon)
    for_q, for_k, for_v, for_products, for_weights = gradients
    if ctx.saved_tensors[3] is None:
        return for_q, for_k, for_v, None, None, None
    return for_q, for_k, for_v, for_products, for_weights, None


_attend_locally.register_autograd(_differentiate_locally, setup_context=_keep_locally)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# Softmax attention


def can_split_heads(mixed: Tensor) -> bool:
    """Whether `split_heads` supports a tensor: it is contiguous bfloat16 on a CPU, and there are C kernels."""
    return mixed.dtype == torch.bfloat16 and native.find_kernels(mixed) is not None


def split_heads(mixed: Tensor, num_heads: int, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, [B, H, S, K], with q and k rotated, in one pass over memory; PyTorch's operations take several.

    Args:
        mixed: bfloat16, [B, S, H · 3 K], with each head's q, k and v in turn.
        num_heads: H.
        angles: cos and sin of each position from `compute_rotary_angles`, [2, S, rotary_dim] float32.
    """
    return _SplitHeads.apply(mixed, num_heads, angles)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, num_heads: int, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = native.load_kernels()
        assert found is not None
        ctx.angles = angles
        return native.split_heads(found, mixed, num_heads, angles)

    @staticmethod
    @kernels.differentiate_once
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = native.load_kernels()
        assert found is not None
        return native.join_heads(found, [t.contiguous() for t in upstreams], ctx.angles), None, None


def attend_heads(mixed: Tensor, num_heads: int, angles: Tensor) -> Tensor:
    """Causal attention after `split_heads`, [B, S, H K]; short segments take one pass over memory.

    Arguments as in `split_heads`.
    """
    if len(mixed) * num_heads * mixed.shape[1] ** 2 >= MIN_SCORES and native.can_attend(mixed, num_heads):
        return _AttendHeads.apply(mixed, num_heads, angles)
    return causal_attention(*split_heads(mixed, num_heads, angles)).transpose(1, 2).flatten(2)


class _AttendHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, num_heads: int, angles: Tensor) -> Tensor:
        found = native.load_kernels()
        assert found is not None
        attended, logsumexp = native.attend_heads(found, mixed, num_heads, angles, keeps=ctx.needs_input_grad[0])
        ctx.angles = angles
        ctx.save_for_backward(mixed, logsumexp)
        return attended

    @staticmethod
    @kernels.differentiate_once
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        found, (mixed, logsumexp), (upstream,) = native.load_kernels(), ctx.saved_tensors, upstreams
        assert found is not None
        q, k, v = native.split_heads(found, mixed, logsumexp.shape[1], ctx.angles)
        upstream = upstream.unflatten(2, (logsumexp.shape[1], -1)).transpose(1, 2)
        heads = _attend_backward(q, k, v, logsumexp, upstream)
        return native.join_heads(found, [t.contiguous() for t in heads], ctx.angles), None, None


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √K) v, where each token attends to itself and earlier tokens.

    This is `F.scaled_dot_product_attention` except in bfloat16 on a CPU, where torch cuts its products into tiles that
    suit matrix units less well. There a block of queries is processed for all heads at once: two batched products with
    a C softmax between them. Backward recomputes the scores from the saved logsumexp, as in FlashAttention
    (arXiv:2205.14135, section 3.1), so that nothing of size S² is kept.

    Args:
        q: [B, H, S, K].
        k: [B, H, S, K].
        v: [B, H, S, V].

    Returns:
        [B, H, S, V].
    """
    if q.dtype == k.dtype == v.dtype == torch.bfloat16 and q.device.type == "cpu":
        batch, heads, length, _ = q.shape
        if batch * heads * length * length >= MIN_SCORES and native.has_kernels():
            return _attend(q, k, v)[0]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@library.custom_op("new_llm::causal_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [B, H, S, V], stored as [B, S, H, V], and the logsumexp of the scaled scores, [B, H, S]."""
    batch, heads, length, width = v.shape
    # the memory layout that the next product needs
    mixed = v.new_empty(batch, length, heads, width).transpose(1, 2)
    logsumexp = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    compiled = native.load_kernels()
    assert compiled is not None
    for rows, begin, end in _cut(q.shape):
        scores = q[rows, :, begin:end] @ k[rows, :, :end].transpose(-1, -2)
        sums = torch.empty(scores.shape[:3], dtype=torch.float32, device=q.device)
        flat = scores.flatten(0, 1), sums.flatten(0, 1)
        native.causal_softmax(compiled, *flat, first=begin, scale=q.shape[-1] ** -0.5)
        logsumexp[rows, :, begin:end] = sums
        mixed[rows, :, begin:end] = scores @ v[rows, :, :end]
    return mixed, logsumexp


@library.custom_op("new_llm::causal_attention_backward", mutates_args=())
def _attend_backward(
    q: Tensor, k: Tensor, v: Tensor, logsumexp: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    compiled = native.load_kernels()
    assert compiled is not None
    for_q = torch.empty_like(q)
    for_k, for_v = (torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format) for x in (k, v))
    for rows, begin, end in _cut(q.shape):
        queries, keys, values = q[rows, :, begin:end], k[rows, :, :end], v[rows, :, :end]
        above = upstream[rows, :, begin:end]
        scores = queries @ keys.transpose(-1, -2)
        gradients = above @ values.transpose(-1, -2)
        sums = logsumexp[rows, :, begin:end].contiguous()
        flat = scores.flatten(0, 1), gradients.flatten(0, 1), sums.flatten(0, 1)
        native.causal_softmax_backward(compiled, *flat, first=begin, scale=q.shape[-1] ** -0.5)
        for_v[rows, :, :end] += scores.transpose(-1, -2) @ above
        for_q[rows, :, begin:end] = gradients @ keys
        for_k[rows, :, :end] += gradients.transpose(-1, -2) @ queries
    return for_q, for_k.to(k.dtype), for_v.to(v.dtype)


def _cut(shape: torch.Size) -> Iterator[tuple[slice, int, int]]:
    """For each block: the batch rows that are processed together, and the range begin … end of its queries."""
    batch, heads, length, _ = shape
    num_rows = max(1, BLOCK_SCORES // (heads * length * min(length, BLOCK_QUERIES)))
    for first in range(0, batch, num_rows):
        for begin in range(0, length, BLOCK_QUERIES):
            yield slice(first, first + num_rows), begin, min(begin + BLOCK_QUERIES, length)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, width = v.shape
    return v.new_empty(batch, length, heads, width).transpose(1, 2), q.new_empty(q.shape[:3], dtype=torch.float32)


@_attend_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, logsumexp: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)


_attend.register_autograd(
    lambda ctx, upstream, _: _attend_backward(*ctx.saved_tensors, upstream),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output[1]),
)


# What a block computes between its products


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x) for x that only products read: under bfloat16 autocast on a CPU the result is bfloat16."""
    if (
        type(norm) is nn.LayerNorm
        and not norm._forward_hooks
        and not norm._forward_pre_hooks
        and is_narrow(x.device.type)
    ):
        weights = norm.weight, norm.bias
        is_wide = all(t is not None and t.dtype == torch.float32 for t in (x, *weights))
        if is_wide and native.find_kernels(x, *weights) is not None:
            return _Normalize.apply(x, *weights, norm.eps)
    return norm(x)


def add_parts(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """a + b + x, in one pass over memory for bfloat16 a and b and float32 x on a CPU."""
    if a.dtype == b.dtype == torch.bfloat16 and x.dtype == torch.float32 and native.find_kernels(a, b, x) is not None:
        return _AddParts.apply(a, b, x)
    return a + b + x


def is_narrow(kind: str) -> bool:
    """Whether products on a device of this kind are under bfloat16 autocast on a CPU."""
    return kind == "cpu" and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        found = native.load_kernels()
        assert found is not None
        y, means, factors = native.normalize_rows(found, x, weight, bias, eps)
        ctx.save_for_backward(x, means, factors, weight, bias)
        return y

    @staticmethod
    @kernels.differentiate_once
    def backward(ctx: Any, *upstreams: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *others = ctx.saved_tensors
        given = upstreams[0].float(), x, x.shape[-1:], *others, ctx.needs_input_grad[:3]
        return *torch.ops.aten.native_layer_norm_backward(*given), None


class _AddParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        found = native.load_kernels()
        assert found is not None
        return native.add_parts(found, a, b, x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        narrow = upstream.to(torch.bfloat16)
        return narrow, narrow, upstream
