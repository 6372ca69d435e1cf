"""How a training step runs: batches made ahead, numbers read late, layers run twice or compiled."""

import dataclasses
import io
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from new_llm.config import TrainConfig
from new_llm.config.allocator import keep_freed_memory
from new_llm.data.batches import plan_batches
from new_llm.data.tokens import TokenSplit
from new_llm.experiments.config import ExperimentConfig
from new_llm.models import TransformerLM, create_model
from new_llm.training import Trainer
from new_llm.training.log import TrainingProgress, read_metrics
from new_llm.training.optimizer import make_schedule
from new_llm.training.prefetch import prefetch_batches

VOCAB = 64


def make_split(num_tokens: int = 700) -> TokenSplit:
    """Documents of counted tokens."""
    lengths = [num_tokens // 2, num_tokens // 3, num_tokens // 6]
    tokens = np.concatenate([np.arange(length) % VOCAB for length in lengths]).astype(np.uint16)
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    return TokenSplit(tokens=tokens, offsets=offsets, num_bytes=offsets * 2, num_words=offsets, num_pinned_documents=0)


def make_config(folder: Path, **train) -> ExperimentConfig:
    settings = {"num_epochs": 2, "batch_size": 2, "learning_rate": 1e-3, "log_every_steps": 4, "precision": "fp32"}
    return ExperimentConfig(
        name="path",
        device="cpu",
        runs_dir=str(folder),
        model={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        data={"seq_length": 16, "segments_per_sample": 2, "num_samples": None, "order": "stream"},
        train={**settings, **train},
    )


def make_trainer(folder: Path, kind: str = "infini", **train) -> Trainer:
    config = make_config(folder, **train)
    torch.manual_seed(0)
    model = create_model(kind, config.model.shape(VOCAB), segment_length=8)
    return Trainer(
        model,
        make_split(),
        config.data,
        config.train,
        folder,
        validate=lambda model: 1.0,
        device=torch.device("cpu"),
        progress=TrainingProgress("model", Console(file=io.StringIO())),
    )


def list_weights(model: TransformerLM) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def read_curve(folder: Path) -> list[tuple[float, ...]]:
    lines = [line for line in read_metrics(folder) if line["event"] == "train"]
    return [(line["step"], line["loss"], line["grad_norm"], line["tokens"]) for line in lines]


def read_late(trainer: Trainer, every_steps: int) -> None:
    """Treat the CPU as a GPU, whose numbers are read only now and then."""
    trainer.monitor.every_steps = every_steps


def test_numbers_read_late_and_batches_made_ahead_change_nothing(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "plain", prefetch_batches=0)
    other = make_trainer(tmp_path / "other", prefetch_batches=3)
    read_late(other, 4)
    expected, found = plain.run(), other.run()
    assert read_curve(tmp_path / "plain") == read_curve(tmp_path / "other")
    assert dataclasses.replace(plain.state, seconds=0, window_seconds=0) == dataclasses.replace(
        other.state, seconds=0, window_seconds=0
    )
    assert (expected.steps, expected.tokens) == (found.steps, found.tokens)
    for one, two in zip(list_weights(plain.model), list_weights(other.model), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["pythia", "infini", "selective", "token_memory"])
def test_layers_run_twice_give_the_same_gradients(tmp_path: Path, kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make_trainer(tmp_path, kind, gradient_checkpointing=checkpointing).model.train()
        assert model.gradient_checkpointing == checkpointing
        calls = []
        model.layers[0].mlp.register_forward_pre_hook(lambda *arguments, calls=calls: calls.append(1))
        ids = torch.arange(40).view(2, 20) % VOCAB
        for precision in (False, True):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision):
                model.compute_loss(ids, ids, update_memory=True)[0].backward()
            model.reset_memory()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert len(calls) == 2 * model.count_passes() * (2 if checkpointing else 1)
    plain, plain_bf16, twice, twice_bf16 = gradients
    for expected, found in ((plain, twice), (plain_bf16, twice_bf16)):
        assert len(expected) == len(found) > 10
        assert all(torch.equal(one, two) for one, two in zip(expected, found, strict=True))


@pytest.mark.slow
def test_compiled_layers_train_to_the_same_losses(tmp_path: Path) -> None:
    curves = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        make_trainer(folder, compile=compiled, num_epochs=1).run()
        curves.append(read_curve(folder))
    for one, two in zip(*curves, strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def make_plan(batch_size: int = 2):
    return plan_batches(make_split(), seq_length=16, batch_size=batch_size, order="shuffled", seed=0, epoch=0)


@pytest.mark.parametrize("num_ahead", [0, 1, 2, 100])
@pytest.mark.parametrize("first", [0, 3])
def test_batches_made_ahead_come_in_the_plan_s_order(num_ahead: int, first: int) -> None:
    plan = make_plan()
    with prefetch_batches(plan, first, num_ahead, pin=False) as batches:
        found = list(batches)
    assert len(found) == len(plan) - first > 5
    for number, batch in enumerate(found, first):
        assert torch.equal(batch.input_ids, plan[number].input_ids)
        assert torch.equal(batch.labels, plan[number].labels)


def test_a_batch_that_fails_fails_where_it_is_asked_for_and_the_thread_ends() -> None:
    class Broken(list):
        made = 0

        def __getitem__(self, number):
            Broken.made += 1
            if number == 2:
                raise OSError("the disk is gone")
            return number

    with prefetch_batches(Broken(range(50)), 0, 4, pin=False) as batches:
        assert [next(batches), next(batches)] == [0, 1]
        with pytest.raises(OSError, match="gone"):
            next(batches)
    made = Broken.made
    time.sleep(0.01)
    assert Broken.made == made < 10


def test_a_user_s_own_allocator_settings_win(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("MALLOC_ARENA_MAX", "2"),
        ("GLIBC_TUNABLES", "glibc.malloc.top_pad=1"),
        ("LD_PRELOAD", "libjemalloc.so.2"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not keep_freed_memory()


def test_the_rate_rises_linearly_then_falls_as_a_half_cosine() -> None:
    config = TrainConfig(num_epochs=4, warmup_fraction=0.1, min_lr_ratio=0.1)
    share = make_schedule(config, steps_per_epoch=100)
    assert [share(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert share(10) == pytest.approx(1.0)
    assert share(10 + 195) == pytest.approx(0.55)
    assert share(400) == pytest.approx(0.1)
    assert share(10_000) == pytest.approx(0.1)


def test_without_warm_up_the_first_step_has_the_whole_rate() -> None:
    share = make_schedule(TrainConfig(num_epochs=1, warmup_fraction=0.0), steps_per_epoch=10)
    assert share(0) == 1.0
