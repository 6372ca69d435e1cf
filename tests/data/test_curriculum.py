"""A curriculum in segments, and mixed samples: the same tokens and targets in rows of other lengths."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_batches import make_split

from new_llm.config import DataConfig, UserError
from new_llm.data.batches import list_shapes, plan_batches, plan_curriculum
from new_llm.experiments.config import ExperimentConfig
from new_llm.models import create_model
from new_llm.training import Trainer
from new_llm.training.log import TrainingProgress

SHUFFLE = {"order": "shuffled", "seed": 1, "epoch": 0}
SHUFFLED = {"order": "shuffled", "seq_length": 16, "segments_per_sample": 8}


def test_stages_share_the_steps_evenly() -> None:
    plans = {
        segments: plan_batches(make_split([512]), seq_length=2 * segments, batch_size=16 // segments, **SHUFFLE)
        for segments in (1, 4, 8)
    }
    epochs = [plan_curriculum((1, 4, 8), epoch, 3, 16, plans.__getitem__) for epoch in range(3)]
    for epoch, segments in zip(epochs, (1, 4, 8), strict=True):
        assert epoch.turns == tuple((plans[segments], number) for number in range(16))
    halves = plan_curriculum((1, 8), 0, 1, 16, plans.__getitem__)
    assert [batch.input_ids.shape for batch in halves] == [(16, 2)] * 8 + [(2, 16)] * 8
    assert halves[-1].input_ids.tolist() == plans[8][15].input_ids.tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"segment_curriculum": (1, 8)}, [(16, 2), (16, 2), (2, 16), (2, 16)]),
        ({"mixed_samples": 0.4}, [(1, 16), (8, 2)] * 4),
    ],
)
def test_training_follows_the_plan(
    options: dict, expected: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A curriculum, and steps of a whole sample and as many tokens of single segments."""
    config = ExperimentConfig(
        device="cpu",
        model={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        data={**SHUFFLED, "num_samples": None, **options},
        train={"num_epochs": 2, "batch_size": 2, "precision": "fp32"},
    )
    model = create_model("infini", config.model.shape(64), segment_length=2)
    trainer = Trainer(
        model,
        make_split([64]),
        config.data,
        config.train,
        tmp_path,
        validate=lambda model: 1.0,
        device=torch.device("cpu"),
        progress=TrainingProgress("model", Console(file=io.StringIO())),
    )
    forward, shapes = trainer._forward, []

    def watch(batch) -> torch.Tensor:
        shapes.append(tuple(batch.input_ids.shape))
        return forward(batch)

    monkeypatch.setattr(trainer, "_forward", watch)
    result = trainer.run()
    assert shapes == expected
    assert result.steps == 4
    assert result.tokens == pytest.approx(2 * 63, abs=2)  # a document's last token has no target


def test_shapes_of_a_training() -> None:
    data = DataConfig(**SHUFFLED, num_samples=100)
    assert list_shapes(data, 2) == ((16, 2, 100),)
    stages = DataConfig(**SHUFFLED, num_samples=None, segment_curriculum=(1, 4, 1))
    assert list_shapes(stages, 2) == ((2, 16, None), (8, 4, None))
    mixed = DataConfig(**SHUFFLED, num_samples=100, mixed_samples=0.25)
    assert list_shapes(mixed, 8) == ((16, 6, 100), (2, 16, 800))
    with pytest.raises(UserError, match="mixed_samples: a batch of 1 sample"):
        list_shapes(mixed, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"segment_curriculum": (3,)}, ["segment_curriculum", "3", "segments_per_sample"]),
        ({"segment_curriculum": (2, 8), "order": "stream"}, ["segment_curriculum", "order", "stream"]),
        ({"mixed_samples": 0.5, "order": "stream"}, ["mixed_samples", "order: shuffled"]),
        ({"mixed_samples": 0.5, "segment_curriculum": (1, 8)}, ["mixed_samples", "segment_curriculum"]),
    ],
)
def test_a_curriculum_that_cannot_be_is_refused(options: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        DataConfig(**{**SHUFFLED, **options})
    for word in words:
        assert word in str(error.value)
