"""Checks of token ids and labels, padding, and the alignment of labels.

A row's real tokens are moved to the left before it is cut into segments. Masked tokens take no position, so a padded
row is cut exactly like the same row without padding. `align_labels` is the only place that shifts labels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""The label of positions that have no target, as in Hugging Face's models."""


def check_input_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless ids are [B, T] integers with B, T ≥ 1, within 0 … vocab_size − 1.

    The range is checked only on a CPU outside `torch.compile`; elsewhere the check would synchronise or break the
    graph.
    """
    if input_ids.dim() != 2 or input_ids.numel() == 0 or not is_integer(input_ids):
        raise ValueError(
            f"input_ids: shape {tuple(input_ids.shape)}, dtype {input_ids.dtype}: "
            "must be [batch, tokens] integers with at least one token"
        )
    if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = map(int, input_ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"input_ids: ids from {low} to {high}; the model's vocabulary is 0 to {vocab_size - 1}")


def check_targets(targets: Tensor, input_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless targets are integers in the ids' shape and (checked on a CPU) each an id or -100."""
    if targets.shape != input_ids.shape or not is_integer(targets):
        raise ValueError(
            f"labels: {targets.shape[0]} rows, dtype {targets.dtype}: must be integers for {input_ids.shape[0]} rows"
        )
    if targets.device.type == "cpu":
        wrong = (targets != IGNORE_INDEX) & ((targets < 0) | (targets >= vocab_size))
        if bool(wrong.any()):
            raise ValueError(
                f"labels: {int(targets[wrong][0])} is neither {IGNORE_INDEX} nor a token id, 0 to {vocab_size - 1}"
            )


def is_integer(x: Tensor) -> bool:
    """Whether a tensor holds integers; booleans do not count."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


@dataclass(frozen=True)
class Packing:
    """How a batch's real tokens are moved to the left.

    Attributes:
        order: the source column of each position in the packed row, [B, T]; None: nothing moves.
        lengths: number of real tokens in each row, [B].
    """

    order: Tensor | None
    lengths: Tensor

    def pack(self, x: Tensor) -> Tensor:
        """Move the real tokens of [B, T] or [B, T, D] to the left, keeping their order."""
        return x if self.order is None else _gather(x, self.order)

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of `pack`."""
        return x if self.order is None else _gather(x, self.order.argsort(dim=1))


def plan_packing(attention_mask: Tensor | None, input_ids: Tensor) -> Packing | None:
    """The packing for an attention mask; None if every token is real. Raises ValueError like `check_mask`.

    The mask is read on its own device, so a CPU mask with GPU tokens does not synchronise.
    """
    check_mask(attention_mask, input_ids)
    if attention_mask is None:
        return None
    mask = attention_mask.to(torch.bool)
    if bool(mask.all()):
        return None
    lengths = mask.sum(1)
    columns = torch.arange(mask.shape[1], device=mask.device)
    on_the_left = bool((mask == (columns < lengths.unsqueeze(1))).all())
    lengths = lengths.to(input_ids.device, non_blocking=True)
    if on_the_left:
        return Packing(None, lengths)
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    return Packing(order.to(input_ids.device, non_blocking=True), lengths)


def check_mask(attention_mask: Tensor | None, input_ids: Tensor) -> None:
    """Raise ValueError if the mask's shape differs from the tokens', or it is a float mask not of zeros and ones."""
    if attention_mask is None:
        return
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but input_ids {tuple(input_ids.shape)}; "
            "they must be equal"
        )
    if attention_mask.is_floating_point() and not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError("attention_mask: must be 1 at real tokens and 0 at padding; it is not added to scores")


def mark_valid(lengths: Tensor, num_tokens: int) -> Tensor:
    """[B, num_tokens] bool: True at the first `lengths` positions of each row."""
    return torch.arange(num_tokens, device=lengths.device) < lengths.unsqueeze(1)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    if x.dim() == 3:
        index = index.unsqueeze(-1).expand(-1, -1, x.shape[2])
    return x.gather(1, index)


# Labels and losses


@dataclass(frozen=True)
class LossStatistics:
    """The statistics of a loss.

    Attributes:
        num_tokens: number of predicted tokens.
        total_nll: their summed negative log-likelihood, in nats.
        passes: number of passes through the layers.
    """

    num_tokens: int
    total_nll: float
    passes: int = 1

    @property
    def perplexity(self) -> float:
        """exp(total NLL / tokens); NaN if no token was predicted."""
        return float(torch.tensor(self.total_nll / self.num_tokens).exp()) if self.num_tokens else float("nan")


def align_labels(labels: Tensor, num_positions: int) -> Tensor:
    """The target of position t is the token at t + 1.

    Args:
        labels: the tokens themselves, not shifted (Hugging Face's convention), [B, T] or [B, T + 1]. The extra column
            is the target of the last position, which otherwise has none. -100 is ignored.
        num_positions: T, the length of the input.

    Returns:
        Targets [B, T], -100 at positions without one.

    Raises:
        ValueError: labels are not [B, T] or [B, T + 1].
    """
    if labels.dim() != 2:
        raise ValueError(f"labels have shape {tuple(labels.shape)}: must be [batch, tokens]")
    if labels.shape[1] == num_positions + 1:
        return labels[:, 1:]
    if labels.shape[1] == num_positions:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    raise ValueError(
        f"labels of {labels.shape[1]} columns for {num_positions} input tokens: "
        f"{num_positions} or {num_positions + 1} are allowed"
    )


def compute_token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """−log softmax(logits)[target] in nats, [N], float32 or wider; 0 where the target is -100.

    Args:
        logits: [N, Z].
        targets: aligned by `align_labels`, [N].
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=IGNORE_INDEX, reduction="none")
