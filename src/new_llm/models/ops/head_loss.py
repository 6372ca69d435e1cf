"""The head and its loss in one operation that never holds the logits of all rows.

Legend: N rows, D hidden size, Z vocabulary. ℓ_i = w_i (logsumexp_z x_iz − x_i,t(i)) with x = h Wᵀ, and
∂ℓ_i/∂x_iz = w_i (softmax(x_i)_z − [z = t(i)]). Source of the method: Cut Your Losses in Large-Vocabulary Language
Models, arXiv:2411.09009, section 3; Liger Kernel, arXiv:2410.10989, section 3.2.

Rows are taken in chunks: a chunk's logits are made, turned into losses and, in place, into their gradients, and used up
before the next chunk's are made. Under autocast the products are in its dtype; losses, sums over the vocabulary and the
sum of the head's gradient over chunks are float32.
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
"""Rows of logits held at once on a CPU. With 50,304 words in bfloat16 they take 103 MB; fewer rows add up the head's
gradient more often, at an eighth of the time of the product itself."""
ROW_MULTIPLE = 128
"""Where rows without a target are left out, those that are kept are filled up to a multiple of this: for every new
number of rows of a 16-bit product oneDNN keeps about half a megabyte of code."""
MIN_WIDE_BYTES = 4
GRADIENT_BLOCK = 2**21
"""Numbers of the head's gradient that a CPU makes of a chunk before it adds them, so that they stay in the cache."""
TRITON_LOGITS = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes of logits that the Triton kernel scores."""
MIN_NATIVE_LOGITS = 2**20
"""Logits of a chunk from which the compiled kernel is used; below, it would save nothing."""


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
    """−w log softmax(h Wᵀ)[target] of every row, or its sum; the logits of all rows are never held.

    `sum` is the form to train with: its gradients are made beside the losses, and only scaled by the gradient that
    comes from above. With `none` that gradient may differ a row, so backward makes the logits once more. Second
    derivatives are refused.

    Args:
        hidden: h, [N, D].
        weight: W, [Z, D].
        targets: [N], integers; -100 asks for no prediction, and its row has loss and gradient 0.
        label_weights: w, [N], which takes no gradient; None: 1.
        reduction: `none` or `sum`.
        chunk_rows: rows of logits held at once; None: `CHUNK_ROWS`, or on a GPU as many as `limit_bytes` allows.

    Returns:
        [N] or one number, in nats, float32 or wider.

    Raises:
        ValueError: shapes that do not fit, another reduction, or (on a CPU, where it costs no synchronisation) a target
            outside the vocabulary.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}: [N, D] and [Z, D] are needed")
    for name, tensor in (("targets", targets), ("label_weights", label_weights)):
        if tensor is not None and tensor.shape != hidden.shape[:1]:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; [{len(hidden)}] is needed, one per row")
    if reduction not in ("none", "sum"):
        raise ValueError(f"reduction: {reduction!r} is neither 'none' nor 'sum'")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows: {chunk_rows} is not positive")
    is_ignored = targets == IGNORE_INDEX
    if targets.device.type == "cpu":
        wrong = ~is_ignored & ((targets < 0) | (targets >= len(weight)))
        if bool(wrong.any()):
            raise ValueError(f"targets: {int(targets[wrong][0])} is no row of the weight; 0 to {len(weight) - 1} are")
    targets = targets.to(torch.int64).masked_fill(is_ignored, -1)
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    num_rows, kept = len(targets), None
    if hidden.device.type == "cpu" and bool((targets < 0).any()):  # elsewhere to ask would be to wait for the device
        kept = (targets >= 0).nonzero().squeeze(1)
        # A row more than once, without a target: it takes no part, and every product has a number of rows seen before.
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
    """Losses [n] of rows of logits [n, Z], float32 or wider; with `write_gradients` ∂ℓ/∂x replaces the logits.

    What the logits hold afterwards is undefined otherwise. Targets below 0 have no loss; weights are w, [n] (None: 1).
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
    losses = torch.where(is_wanted, losses, 0)  # whatever the logits of a row without a target are
    if write_gradients:
        gradients = log_probabilities.exp_()
        gradients.scatter_add_(1, index, gradients.new_full((1, 1), -1.0).expand_as(index))
        gradients.mul_(scale.unsqueeze(1)).masked_fill_(~is_wanted.unsqueeze(1), 0)
        logits.copy_(gradients)
    return losses


_Settings = tuple[torch.dtype, int]  # the dtype of the products, and the rows of a chunk


class _SummedLoss(torch.autograd.Function):
    """Σ ℓ: gradients are made in forward, as if the gradient from above were 1, and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, label_weights: Tensor | None, settings: _Settings
    ):
        ctx.save_for_backward(hidden, weight, targets, label_weights)
        ctx.settings = settings
        losses, gradients = _differentiate(hidden, weight, targets, label_weights, settings, ctx.needs_input_grad[:2])
        # not saved: backward scales them in place and hands them on, so that there never is a second copy
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
    """ℓ of each row: backward makes the logits once more, with w times the gradient from above as the weights."""

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
    """Losses [N] and the gradients of their sum: ∂x W a chunk, and Σ ∂xᵀ h, which is summed in float32 or wider."""
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
    """total [Z, D] += gradients [n, Z]ᵀ hidden [n, D]; the first product replaces what total holds."""
    num_blocks = -(-total.numel() // GRADIENT_BLOCK) if total.device.type == "cpu" else 1
    for gradient, block in zip(gradients.chunk(num_blocks, dim=1), total.chunk(num_blocks), strict=True):
        part = gradient.t() @ hidden
        if is_first:
            block.copy_(part)
        else:
            block.add_(part)


def _cut(num_rows: int, chunk_rows: int) -> list[slice]:
    """Ranges of rows of nearly equal size, so that none is a small rest."""
    num_chunks = -(-num_rows // chunk_rows)
    edges = [number * num_rows // num_chunks for number in range(num_chunks)] + [num_rows]
    return [slice(begin, end) for begin, end in itertools.pairwise(edges)]
