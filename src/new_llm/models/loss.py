"""Label alignment, which only this file decides: the token that each position predicts."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""The label of positions that predict nothing, as in Hugging Face's models."""


@dataclass(frozen=True)
class LossStatistics:
    """The statistics of a loss.

    Attributes:
        num_tokens: predicted tokens.
        total_nll: their summed negative log-likelihood, nats.
        passes: passes through the layers.
    """

    num_tokens: int
    total_nll: float
    passes: int = 1

    @property
    def perplexity(self) -> float:
        """exp(total NLL / tokens); NaN where nothing was predicted."""
        return float(torch.tensor(self.total_nll / self.num_tokens).exp()) if self.num_tokens else float("nan")


def align_labels(labels: Tensor, num_positions: int) -> Tensor:
    """The target of position t is the token at t + 1.

    Args:
        labels: the tokens themselves, not shifted (Hugging Face's convention), [B, T] or [B, T + 1]; the extra column
            holds the token after the last position, which otherwise has no target. -100 is ignored.
        num_positions: T, the positions of the input.

    Returns:
        Targets [B, T], -100 where a position has none.

    Raises:
        ValueError: labels are not [B, T] or [B, T + 1].
    """
    if labels.dim() != 2:
        raise ValueError(f"labels have shape {tuple(labels.shape)}: [batch, tokens] is needed")
    if labels.shape[1] == num_positions + 1:
        return labels[:, 1:]
    if labels.shape[1] == num_positions:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    raise ValueError(
        f"labels of {labels.shape[1]} columns for {num_positions} input tokens: "
        f"{num_positions} or {num_positions + 1} are allowed"
    )


def compute_token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """−log softmax(logits)[target], in float32 or wider; 0 where the target is -100.

    Args:
        logits: [N, Z].
        targets: aligned by `align_labels`, [N].

    Returns:
        Nats, [N].
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=IGNORE_INDEX, reduction="none")
