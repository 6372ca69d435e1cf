"""A curriculum in segments: the same tokens and targets in shorter rows, in equal shares of the steps."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from new_llm.config import DataConfig, ExperimentConfig, UserError
from new_llm.data.batches import IGNORED_LABEL, plan_batches
from new_llm.data.curriculum import choose_row_length, cut_rows
from new_llm.data.tokens import TokenSplit
from new_llm.models import create_model
from new_llm.training import Trainer
from new_llm.training.progress import TrainingProgress

SHUFFLED = {"order": "shuffled", "seq_length": 16, "segments_per_sample": 8}


def make_split(lengths: list[int]) -> TokenSplit:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    sizes = np.array(lengths, dtype=np.int64)
    return TokenSplit(np.arange(offsets[-1]).astype(np.uint16), offsets, sizes, sizes, 0)


def list_targets(batch) -> Counter:
    """(token, its target) of every position that has one."""
    ids, targets = batch.input_ids.flatten(), batch.labels[:, 1:].flatten()
    real = targets != IGNORED_LABEL
    return Counter(zip(ids[real].tolist(), targets[real].tolist(), strict=True))


@pytest.mark.parametrize("length", [2, 4, 8, 16])
def test_cut_rows_hold_the_same_tokens_and_targets(length: int) -> None:
    for batch in plan_batches(
        make_split([33, 7, 16, 50, 3]), seq_length=16, batch_size=3, order="shuffled", seed=1, epoch=0
    ):
        cut = cut_rows(batch, length)
        assert cut.input_ids.shape == (len(batch.input_ids) * 16 // length, length)
        assert cut.labels.shape == (len(cut.input_ids), length + 1)
        assert list_targets(cut) == list_targets(batch)
        assert sum(list_targets(cut).values()) == cut.num_targets == batch.num_targets
        assert torch.equal(cut.input_ids.flatten(), batch.input_ids.flatten())
        assert (cut.attention_mask is None) == (batch.attention_mask is None)
        if cut.attention_mask is not None:
            assert torch.equal(cut.attention_mask.flatten(), batch.attention_mask.flatten())
        assert cut.resets.tolist() == [True] * len(cut.input_ids)


def test_stages_share_the_steps_evenly() -> None:
    config = DataConfig(**SHUFFLED, segment_curriculum=(1, 4, 8))
    lengths = [choose_row_length(config, step / 9) for step in range(9)]
    assert lengths == [2, 2, 2, 8, 8, 8, 16, 16, 16]
    assert choose_row_length(DataConfig(**SHUFFLED), 0.0) == 16


def test_training_follows_the_curriculum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ExperimentConfig(
        device="cpu",
        model={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        data={**SHUFFLED, "num_samples": None, "segment_curriculum": (1, 8)},
        train={"num_epochs": 2, "batch_size": 2, "precision": "fp32"},
    )
    model = create_model("infini", config.model.shape(64), segment_length=2)
    trainer = Trainer(
        model,
        make_split([64]),
        config,
        tmp_path,
        validate=lambda model: 1.0,
        device=torch.device("cpu"),
        precision="fp32",
        progress=TrainingProgress("model", Console(file=io.StringIO())),
    )
    forward, shapes = trainer._forward, []

    def watch(batch) -> torch.Tensor:
        shapes.append(tuple(batch.input_ids.shape))
        return forward(batch)

    monkeypatch.setattr(trainer, "_forward", watch)
    result = trainer.run()
    assert shapes == [(16, 2), (16, 2), (2, 16), (2, 16)]
    assert result.tokens == 2 * 63


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"segment_curriculum": (3,)}, ["segment_curriculum", "3", "segments_per_sample"]),
        ({"segment_curriculum": (2, 8), "order": "stream"}, ["segment_curriculum", "order", "stream"]),
        ({"segment_curriculum": (2, 8), "planted_facts": 4}, ["segment_curriculum", "planted_facts"]),
    ],
)
def test_a_curriculum_that_cannot_be_is_refused(options: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        DataConfig(**{**SHUFFLED, **options})
    for word in words:
        assert word in str(error.value)
