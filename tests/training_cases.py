"""Small trainings, in one process or in several on this machine."""

import dataclasses
import io
import math
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from rich.console import Console

import tiny
from new_llm.data.batches import Batch
from new_llm.data.tokenizer import TokenSplit
from new_llm.evaluation import evaluate_streaming
from new_llm.experiments.config import ExperimentConfig
from new_llm.models import TransformerLM, create_model
from new_llm.processes import ALONE, start_processes
from new_llm.training import Trainer
from new_llm.training.log import TrainingProgress, read_metrics

VOCAB = 64
LENGTHS = (97, 33, 150, 12, 61, 40, 75)


def make_split(lengths: tuple[int, ...] = LENGTHS) -> TokenSplit:
    return tiny.make_split([(np.arange(length) ** 2 + 7 * index) % VOCAB for index, length in enumerate(lengths)])


def make_config(**changes: Any) -> ExperimentConfig:
    """A training of some steps; `changes` are fields of any section."""
    config = ExperimentConfig(
        name="case",
        device="cpu",
        model={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        data={"seq_length": 16, "segments_per_sample": 2, "num_samples": None, "order": "stream"},
        train={"num_epochs": 2, "patience": 0, "batch_size": 2, "log_every_steps": 1, "precision": "fp32"},
    )
    return tiny.change(config, **changes)


def make_trainer(folder, kind="infini", *, processes=ALONE, lengths=LENGTHS, options=None, **changes) -> Trainer:
    """A trainer of a small model; `changes` as in `make_config`, `lengths` of the documents."""
    config = make_config(**changes)
    torch.manual_seed(0)
    split = make_split(lengths)
    return Trainer(
        create_model(kind, config.model.shape(VOCAB), segment_length=config.segment_length, **options or {}),
        split,
        config.data,
        config.train,
        folder,
        validate=lambda model: evaluate_streaming(model, split, batch_size=2, processes=processes).loss,
        device=torch.device("cpu"),
        progress=TrainingProgress("model", Console(file=io.StringIO())),
        processes=processes,
    )


def read_curve(folder: Path) -> list[float]:
    names = ("loss", "grad_norm", "train_loss", "validation_loss")
    return [line[name] for line in read_metrics(folder) for name in names if name in line]


def list_weights(model: TransformerLM) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def run_processes(count: int, work: Callable[..., None], *arguments: Any, start_method: str = "forkserver") -> None:
    """Run `work(processes, *arguments)` in some processes that know of one another; a failure of one fails here.

    By `spawn` they end as programs do, by `forkserver` at once.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # One process has imported what the others are forked with, which each would take seconds to import.
    mp.get_context("forkserver").set_forkserver_preload(["new_llm.experiments", "torch.distributed.fsdp"])
    mp.start_processes(_begin, (count, port, work, arguments), nprocs=count, start_method=start_method)


def _begin(rank: int, count: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = start_processes()
    with processes.guard():
        work(processes, *arguments)


def stop_at(trainer: Trainer, step: int, rank: int = 0) -> None:
    """Send this process SIGTERM during a step, if it has that rank."""
    train_step = trainer._train_step

    def train(batches: list[Any]) -> None:
        train_step(batches)
        if trainer.state.step == step and trainer.processes.rank == rank:
            signal.raise_signal(signal.SIGTERM)

    trainer._train_step = train


def spoil(trainer: Trainer, steps: set[int], factor: float = float("nan")) -> dict[str, list]:
    """Multiply the loss of some steps (from 1), and for NaN the memory too; returns what was met."""
    forward, met = trainer._forward, {"batches": [], "weights": []}

    def spoiled(batch: Batch) -> torch.Tensor:
        step = trainer.state.step + 1
        if step not in steps:
            return forward(batch)
        met["batches"].append(batch)
        met["weights"].append(list_weights(trainer.model))
        loss = forward(batch) * factor
        if math.isnan(factor):
            trainer.model._held = [
                held and dataclasses.replace(held, memories=held.memories * factor, norms=held.norms * factor)
                for held in trainer.model._held
            ]
        return loss

    trainer._forward = spoiled
    return met
