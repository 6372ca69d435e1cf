"""What a call refuses: ids and labels of another shape, or outside the vocabulary."""

import torch
from torch import Tensor

from new_llm.models.loss import IGNORE_INDEX


def check_input_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Refuse ids of another shape or, where that costs no synchronisation, outside the vocabulary.

    Raises:
        ValueError: not [B, T] integers with B, T ≥ 1, or an id outside 0 … vocab_size − 1.
    """
    if input_ids.dim() != 2 or input_ids.numel() == 0 or not is_integer(input_ids):
        raise ValueError(
            f"input_ids: shape {tuple(input_ids.shape)}, dtype {input_ids.dtype}: "
            "[batch, tokens] integers with at least one token are needed"
        )
    if input_ids.device.type == "cpu":
        low, high = input_ids.aminmax()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"input_ids: ids from {int(low)} to {int(high)}; the model knows 0 to {vocab_size - 1}")


def check_targets(targets: Tensor, input_ids: Tensor, vocab_size: int) -> None:
    """Refuse labels that do not fit the ids or, where that costs no synchronisation, lie outside the vocabulary.

    Raises:
        ValueError: other rows than the ids, no integers, or a label that is neither an id nor -100.
    """
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
    """Whether a tensor holds integers (booleans are none)."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
