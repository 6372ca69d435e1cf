"""The head and its loss in one operation, which never holds the logits of all rows at once.

Legend: N rows, D hidden size, Z vocabulary. ℓ_i = w_i (logsumexp_z x_iz − x_i,t(i)) with x = h Wᵀ, and
∂ℓ_i/∂x_iz = w_i (softmax(x_i)_z − [z = t(i)]). Source of the method: Cut Your Losses in Large-Vocabulary Language
Models, arXiv:2411.09009, section 3; Liger Kernel, arXiv:2410.10989, section 3.2.

Rows are processed in chunks. A chunk's logits are computed, turned into losses and, in place, into their gradients, and
consumed before the next chunk starts. Under autocast the products are in its dtype; losses, sums over the vocabulary
and the sum of the head's gradient over chunks are float32.
"""

import itertools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from new_llm.models.inputs import IGNORE_INDEX, compute_token_losses
from new_llm.models.ops import kernels
from new_llm.models.ops.kernels import native

CHUNK_ROWS = 1024
"""Rows of logits held at once on a CPU: 103 MB with 50,304 words in bfloat16. With fewer rows the head's gradient is
accumulated more often, each time at an eighth of the cost of the product itself."""
ROW_MULTIPLE = 128
"""If rows without a target are dropped, the rest are padded to a multiple of this: oneDNN generates and keeps about
half a megabyte of code for every new number of rows of a 16-bit product."""
MIN_WIDE_BYTES = 4
GRADIENT_BLOCK = 2**21
"""Elements of a chunk's head gradient that a CPU computes before adding them to the sum, so that they stay in cache."""
TRITON_LOGITS = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes of logits that the Triton kernel supports."""
MIN_NATIVE_LOGITS = 2**20
"""Smallest chunk, in logits, for which the C kernel is used; for smaller ones it saves nothing."""


def linear_cross_entropy_naive(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    label_weights: Tensor | None = None,
    reduction: Literal["none", "sum"] = "none",
) -> Tensor:
    """`linear_cross_entropy` from the equation, with all logits at once."""
    losses = compute_token_losses(F.linear(hidden, weight), targets)
    if label_weights is not None:
        losses = losses * label_weights
    return losses.sum() if reduction == "sum" else losses


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    label_weights: Tensor | None = None,
    reduction: Literal["none", "sum"] = "none",
    chunk_rows: int | None = None,
) -> Tensor:
    """−w log softmax(h Wᵀ)[target] for every row, or the sum, without ever holding the logits of all rows.

    Train with `sum`: its gradients are computed along with the losses, and backward only scales them by the upstream
    gradient. With `none` the upstream gradient may differ per row, so backward recomputes the logits. There is no
    second derivative.

    Args:
        hidden: h, [N, D].
        weight: W, [Z, D].
        targets: [N], integers; a row with target -100 has loss and gradient 0.
        label_weights: w, [N]; gets no gradient; None: 1.
        reduction: `none` or `sum`.
        chunk_rows: rows of logits held at once; None: `CHUNK_ROWS`, or on a GPU as many as `limit_bytes` allows.

    Returns:
        [N] or a scalar, in nats, float32 or wider.

    Raises:
        ValueError: shapes do not match, the reduction is unknown, or a target is outside the vocabulary. Targets are
            checked only on a CPU; on a GPU that would synchronise.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}: must be [N, D] and [Z, D]")
    for name, tensor in (("targets", targets), ("label_weights", label_weights)):
        if tensor is not None and tensor.shape != hidden.shape[:1]:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} must be ({len(hidden)},), one per row")
    if reduction not in ("none", "sum"):
        raise ValueError(f"reduction: {reduction!r} is neither 'none' nor 'sum'")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows: {chunk_rows} is not positive")
    is_ignored = targets == IGNORE_INDEX
    if targets.device.type == "cpu":
        wrong = ~is_ignored & ((targets < 0) | (targets >= len(weight)))
        if bool(wrong.any()):
            raise ValueError(f"targets: {int(targets[wrong][0])} is not in the vocabulary, 0 to {len(weight) - 1}")
    targets = targets.to(torch.int64).masked_fill(is_ignored, -1)
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    num_rows, kept = len(targets), None
    if hidden.device.type == "cpu" and bool((targets < 0).any()):  # on a GPU the check would synchronise
        kept = (targets >= 0).nonzero().squeeze(1)
        # Pad with copies of one row, given no target: they have no effect, and products come in fewer sizes.
        missing = -len(kept) % ROW_MULTIPLE if dtype.itemsize < MIN_WIDE_BYTES and len(kept) else 0
        rows = torch.cat([kept, kept[:1].expand(missing)])
        hidden = hidden[rows]
        targets = torch.cat([targets[kept], targets.new_full((missing,), -1)])
        label_weights = None if label_weights is None else label_weights[rows]
    if label_weights is not None:
        label_weights = label_weights.detach()
    if chunk_rows is None:
        chunk_rows = max(CHUNK_ROWS, kernels.limit_bytes(hidden, 0) // (len(weight) * dtype.itemsize))
    settings = dtype, chunk_rows
    with torch.autocast(hidden.device.type, enabled=False):
        if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
            losses, _ = _differentiate(hidden, weight, targets, label_weights, settings, (False, False))
            losses = losses.sum() if reduction == "sum" else losses
        else:
            function = _SummedLoss if reduction == "sum" else _RowLosses
            losses = function.apply(hidden, weight, targets, label_weights, settings)
    if kept is None or reduction == "sum":
        return losses
    return losses.new_zeros(num_rows).index_copy(0, kept, losses[: len(kept)])


def score_logits(logits: Tensor, targets: Tensor, weights: Tensor | None, *, write_gradients: bool) -> Tensor:
    """Losses [n], float32 or wider, of rows of logits [n, Z].

    With `write_gradients` the logits are overwritten by ∂ℓ/∂x; without, they are undefined afterwards. Targets below 0
    have no loss; weights are w, [n] (None: 1).
    """
    compiled = native.find_kernels(logits) if logits.numel() >= MIN_NATIVE_LOGITS else None
    if compiled is not None:
        return native.score_rows(compiled, logits, targets, weights, write_gradients=write_gradients)
    if kernels.uses_triton(logits, TRITON_LOGITS):
        return kernels.load_triton().score_rows(logits, targets, weights, write_gradients=write_gradients)
    wide = torch.promote_types(logits.dtype, torch.float32)
    is_wanted = targets >= 0
    index = targets.clamp_min(0).unsqueeze(1)
    scale = is_wanted.to(wide) if weights is None else weights.to(wide) * is_wanted
    log_probabilities = torch.log_softmax(logits, -1, dtype=wide)
    losses = -log_probabilities.gather(1, index).squeeze(1) * scale
    losses = torch.where(is_wanted, losses, 0)  # 0 without a target, even if that row's logits are NaN
    if write_gradients:
        gradients = log_probabilities.exp_()
        gradients.scatter_add_(1, index, gradients.new_full((1, 1), -1.0).expand_as(index))
        gradients.mul_(scale.unsqueeze(1)).masked_fill_(~is_wanted.unsqueeze(1), 0)
        logits.copy_(gradients)
    return losses


_Settings = tuple[torch.dtype, int]  # the dtype of the products, and the number of rows per chunk


class _SummedLoss(torch.autograd.Function):
    """Σ ℓ: forward computes the gradients for an upstream gradient of 1, and backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, label_weights: Tensor | None, settings: _Settings
    ):
        ctx.save_for_backward(hidden, weight, targets, label_weights)
        ctx.settings = settings
        losses, gradients = _differentiate(hidden, weight, targets, label_weights, settings, ctx.needs_input_grad[:2])
        # kept outside save_for_backward, so that backward can scale and return them without a second copy
        ctx.gradients = gradients
        return losses.sum()

    @staticmethod
    @kernels.differentiate_once
    def backward(ctx: Any, *upstreams: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (upstream,) = upstreams
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # a second backward through the same graph
            hidden, weight, targets, label_weights = ctx.saved_tensors
            wanted = ctx.needs_input_grad[:2]
            _, gradients = _differentiate(hidden, weight, targets, label_weights, ctx.settings, wanted)
        if upstream.device.type != "cpu" or float(upstream) != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream.to(gradient.dtype))
        return *gradients, None, None, None


class _RowLosses(torch.autograd.Function):
    """ℓ of each row: backward recomputes the logits, with w times the upstream gradient as the weights."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, label_weights: Tensor | None, settings: _Settings
    ):
        ctx.save_for_backward(hidden, weight, targets, label_weights)
        ctx.settings = settings
        return _differentiate(hidden, weight, targets, label_weights, settings, (False, False))[0]

    @staticmethod
    @kernels.differentiate_once
    def backward(ctx: Any, *upstreams: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (upstream,) = upstreams
        hidden, weight, targets, label_weights = ctx.saved_tensors
        weights = upstream if label_weights is None else upstream * label_weights
        _, gradients = _differentiate(hidden, weight, targets, weights, ctx.settings, ctx.needs_input_grad[:2])
        return *gradients, None, None, None


def _differentiate(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    settings: _Settings,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Losses [N], and the gradients of their sum: ∂x W for `hidden`, and Σ ∂xᵀ h, summed at least in float32, for W."""
    dtype, chunk_rows = settings
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = weight.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        losses = hidden.new_zeros(len(hidden), dtype=wide)
        for_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else None
        for_weight = torch.empty_like(head, dtype=wide) if wanted[1] else None
        if for_weight is not None and len(hidden) == 0:
            for_weight.zero_()
        for rows in _cut(len(hidden), chunk_rows):
            chunk = hidden[rows].to(dtype)
            logits = chunk @ head.t()
            chosen = None if weights is None else weights[rows]
            losses[rows] = score_logits(logits, targets[rows], chosen, write_gradients=any(wanted))
            if for_hidden is not None:
                for_hidden[rows] = logits @ head
            if for_weight is not None:
                _add_product(for_weight, logits, chunk, is_first=rows.start == 0)
        return losses, (for_hidden, None if for_weight is None else for_weight.to(weight.dtype))


def _add_product(total: Tensor, gradients: Tensor, hidden: Tensor, *, is_first: bool) -> None:
    """total [Z, D] += gradients [n, Z]ᵀ hidden [n, D]; with `is_first`, `=` instead of `+=`."""
    num_blocks = -(-total.numel() // GRADIENT_BLOCK) if total.device.type == "cpu" else 1
    for gradient, block in zip(gradients.chunk(num_blocks, dim=1), total.chunk(num_blocks), strict=True):
        part = gradient.t() @ hidden
        if is_first:
            block.copy_(part)
        else:
            block.add_(part)


def _cut(num_rows: int, chunk_rows: int) -> list[slice]:
    """Cut the rows into chunks of nearly equal size, so that there is no small last one."""
    num_chunks = -(-num_rows // chunk_rows)
    edges = [number * num_rows // num_chunks for number in range(num_chunks)] + [num_rows]
    return [slice(begin, end) for begin, end in itertools.pairwise(edges)]
