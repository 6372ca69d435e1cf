"""Causal softmax attention of whole segments: torch's own, and on a CPU in bfloat16 a faster one.

Legend: B rows, H heads, T tokens, K key width, V value width.

torch's attention for CPUs does its products in pieces that its matrix units like less. Here scores are made a block of
queries at a time, of all heads together, by two batched products with a compiled softmax between them. A block sees the
keys up to its own end alone. Backward makes the scores again from the kept logsumexp, as FlashAttention does
(arXiv:2205.14135, section 3.1), so nothing of size T² is kept.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from new_llm.models.ops import native

BLOCK_QUERIES = 256
"""Queries of a block at most."""
BLOCK_SCORES = 2**22
"""Scores made at once, so that they stay in a cache: with more, fewer rows of the batch are taken together."""
MIN_SCORES = 2**18
"""Scores of all heads from which the fast form is used; below, it would save nothing."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √K) v, each token attending to itself and those before it.

    Args:
        q: [B, H, T, K].
        k: [B, H, T, K].
        v: [B, H, T, V].

    Returns:
        [B, H, T, V].
    """
    if q.dtype == k.dtype == v.dtype == torch.bfloat16 and q.device.type == "cpu":
        batch, heads, length, _ = q.shape
        if batch * heads * length * length >= MIN_SCORES and native.has_kernels():
            return _attend(q, k, v)[0]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@library.custom_op("new_llm::causal_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [B, H, T, V], laid out as [B, T, H, V], and the logsumexp of the scaled scores, [B, H, T]."""
    batch, heads, length, width = v.shape
    # laid out as the product that follows wants it
    mixed = v.new_empty(batch, length, heads, width).transpose(1, 2)
    logsumexp = torch.empty(batch, heads, length)
    kernels = native.load_kernels()
    assert kernels is not None
    for rows, begin, end in _cut(q.shape):
        scores = q[rows, :, begin:end] @ k[rows, :, :end].transpose(-1, -2)
        sums = torch.empty(scores.shape[:3])
        native.causal_softmax(kernels, scores.flatten(0, 1), sums, first=begin, scale=q.shape[-1] ** -0.5)
        logsumexp[rows, :, begin:end] = sums
        mixed[rows, :, begin:end] = scores @ v[rows, :, :end]
    return mixed, logsumexp


@library.custom_op("new_llm::causal_attention_backward", mutates_args=())
def _attend_backward(
    q: Tensor, k: Tensor, v: Tensor, logsumexp: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = native.load_kernels()
    assert kernels is not None
    for_q = torch.empty_like(q)
    for_k, for_v = (torch.zeros(x.shape) for x in (k, v))  # float32: blocks add to them
    for rows, begin, end in _cut(q.shape):
        queries, keys, values = q[rows, :, begin:end], k[rows, :, :end], v[rows, :, :end]
        above = upstream[rows, :, begin:end]
        scores = queries @ keys.transpose(-1, -2)
        gradients = above @ values.transpose(-1, -2)
        sums = logsumexp[rows, :, begin:end].contiguous()
        native.causal_softmax_backward(
            kernels, scores.flatten(0, 1), gradients.flatten(0, 1), sums, first=begin, scale=q.shape[-1] ** -0.5
        )
        for_v[rows, :, :end] += scores.transpose(-1, -2) @ above
        for_q[rows, :, begin:end] = gradients @ keys
        for_k[rows, :, :end] += gradients.transpose(-1, -2) @ queries
    return for_q, for_k.to(k.dtype), for_v.to(v.dtype)


def _cut(shape: torch.Size) -> Iterator[tuple[slice, int, int]]:
    """Rows of the batch that are taken together, and the queries begin … end of a block."""
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


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _attend_backward(*ctx.saved_tensors, upstream)


_attend.register_autograd(_differentiate, setup_context=_keep)
