"""Checks of a call's inputs, and the layout of its tokens.

Real tokens move to the left and are then cut into segments. A masked token takes no position: a padded row is cut
exactly like the same row without padding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from new_llm.models.loss import IGNORE_INDEX


def check_input_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless ids are [B, T] integers, B, T ≥ 1, and on a CPU within 0 … vocab_size − 1.

    On a GPU and in a compiled graph their range is not checked: that would synchronise, or break the graph.
    """
    if input_ids.dim() != 2 or input_ids.numel() == 0 or not is_integer(input_ids):
        raise ValueError(
            f"input_ids: shape {tuple(input_ids.shape)}, dtype {input_ids.dtype}: "
            "[batch, tokens] integers with at least one token are needed"
        )
    if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = input_ids.aminmax()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"input_ids: ids from {int(low)} to {int(high)}; the model knows 0 to {vocab_size - 1}")


def check_targets(targets: Tensor, input_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless targets are integers in the ids' shape, and on a CPU each an id or -100."""
    if targets.shape != input_ids.shape or not is_integer(targets):
        raise ValueError(
            f"labels: {targets.shape[0]} rows, dtype {targets.dtype}: integers for {input_ids.shape[0]} rows are needed"
        )
    if targets.device.type == "cpu":
        wrong = (targets != IGNORE_INDEX) & ((targets < 0) | (targets >= vocab_size))
        if bool(wrong.any()):
            raise ValueError(
                f"labels: {int(targets[wrong][0])} is neither {IGNORE_INDEX} nor an id; "
                f"the model knows 0 to {vocab_size - 1}"
            )


def is_integer(x: Tensor) -> bool:
    """Whether a tensor holds integers; booleans do not count."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


@dataclass(frozen=True)
class Packing:
    """The positions of a batch's real tokens.

    Attributes:
        order: the column that each position of the packed row comes from, [B, T]; None: nothing moves.
        lengths: real tokens of each row, [B].
    """

    order: Tensor | None
    lengths: Tensor

    def pack(self, x: Tensor) -> Tensor:
        """Move the real tokens of [B, T] or [B, T, D] to the left, in their order."""
        return x if self.order is None else _gather(x, self.order)

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of `pack`."""
        return x if self.order is None else _gather(x, self.order.argsort(dim=1))


def plan_packing(attention_mask: Tensor | None, input_ids: Tensor) -> Packing | None:
    """The packing for an attention mask; None where every token is real. Raises ValueError as `check_mask`.

    What the mask holds is asked where it lies: one on the host is no reason to wait for the tokens' device.
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
    order = None if on_the_left else torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    return Packing(None if order is None else _send(order, input_ids), _send(lengths, input_ids))


def _send(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like.device, non_blocking=True)


def check_mask(attention_mask: Tensor | None, input_ids: Tensor) -> None:
    """Raise ValueError if the mask's shape differs from the tokens'."""
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}: "
            "they must be equal"
        )


def mark_valid(lengths: Tensor, num_tokens: int) -> Tensor:
    """[B, num_tokens] bool: True at the first `lengths` positions of each row."""
    return torch.arange(num_tokens, device=lengths.device) < lengths.unsqueeze(1)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    if x.dim() == 3:
        index = index.unsqueeze(-1).expand(-1, -1, x.shape[2])
    return x.gather(1, index)
