"""A curriculum in segments: training begins with short samples and goes on to longer ones."""

from dataclasses import replace

import torch

from new_llm.config import DataConfig
from new_llm.data.batches import Batch


def choose_row_length(config: DataConfig, progress: float) -> int:
    """Tokens in a row of a training batch.

    The steps are divided evenly over the entries of `segment_curriculum`; without one a row is a whole sample.

    Args:
        config: how samples are cut.
        progress: share of all steps that is done, 0 to 1.
    """
    stages = config.segment_curriculum
    if not stages:
        return config.seq_length
    stage = stages[min(int(progress * len(stages)), len(stages) - 1)]
    return config.seq_length // config.segments_per_sample * stage


def cut_rows(batch: Batch, length: int) -> Batch:
    """The same tokens and targets in more rows of `length` tokens, each from an empty memory.

    Args:
        batch: B rows of independent samples of T tokens.
        length: divides T.
    """
    rows, width = batch.input_ids.shape
    if length == width:
        return batch

    def unfold(labels: torch.Tensor) -> torch.Tensor:
        return labels.unfold(1, length + 1, length).reshape(-1, length + 1)

    mask = batch.attention_mask
    return replace(
        batch,
        input_ids=batch.input_ids.reshape(-1, length),
        labels=unfold(batch.labels),
        attention_mask=None if mask is None else mask.reshape(-1, length),
        resets=torch.ones(rows * width // length, dtype=torch.bool),
        label_weights=None if batch.label_weights is None else unfold(batch.label_weights),
    )
