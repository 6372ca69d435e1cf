"""Checkpoints: all that an interrupted run needs to go on as if it had not been interrupted.

`best/` holds the best weights as a model folder. Each folder in `checkpoints/` holds the weights (safetensors), the
optimizer, schedule, stream memory and random states (loaded with `weights_only=True`), the counters (JSON), a manifest.
"""

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from new_llm.config import UserError
from new_llm.models import TransformerLM
from new_llm.training.checkpoint_folder import find_checkpoint, write_checkpoint_folder
from new_llm.training.random_states import read_random_states, set_random_states

BEST_FOLDER = "best"
FORMAT_VERSION = 2


@dataclass
class TrainerState:
    """Where training stands.

    Attributes:
        epoch: epochs finished.
        batch: batches of the running epoch that are done.
        step: optimizer steps done.
        num_tokens: tokens trained on.
        seconds: seconds spent in training steps.
        best_loss: the best validation loss, nats a token; None before the first validation.
        best_epoch: the epoch (from 1) it was reached in.
        epochs_without_gain: epochs since then.
        stopped_early: whether patience has run out.
        window_loss, window_tokens, window_seconds: what the next line of metrics averages over.
        epoch_loss, epoch_tokens: what the epoch's training loss averages over.
        metrics_lines: lines of `metrics.jsonl` that had been written by then.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_epoch: int = 0
    epochs_without_gain: int = 0
    stopped_early: bool = False
    window_loss: float = 0.0
    window_tokens: int = 0
    window_seconds: float = 0.0
    epoch_loss: float = 0.0
    epoch_tokens: int = 0
    metrics_lines: int = 0
    format_version: int = field(default=FORMAT_VERSION)


def save_checkpoint(
    folder: Path, model: TransformerLM, optimizer: Optimizer, scheduler: LRScheduler, state: TrainerState, *, keep: int
) -> None:
    """Write a checkpoint into the model's folder, and remove those beyond the newest `keep`."""
    with write_checkpoint_folder(folder, state.step, state.epoch, keep=keep) as temporary:
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        rest: dict[str, Any] = {
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "memory": model.get_memory_state(),
            "memory_rows": model.memory_rows,
            "random_states": read_random_states(),
        }
        torch.save(rest, temporary / "trainer.pt")
        (temporary / "state.json").write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")


def load_checkpoint(
    folder: Path,
    model: TransformerLM,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    warn: Callable[[str], None],
) -> TrainerState | None:
    """Put the values of the last good checkpoint into model, optimizer and schedule; None where there is no checkpoint.

    Raises:
        UserError: none is whole, or it is of another version or another model.
    """
    last = find_checkpoint(folder, warn)
    if last is None:
        return None
    try:
        values = json.loads((last / "state.json").read_text(encoding="utf-8"))
        if values.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{last}: checkpoint version {values.get('format_version')}, this program reads {FORMAT_VERSION}"
            )
        state = TrainerState(**values)
        model.load_state_dict(load_file(last / "model.safetensors"))
        rest = torch.load(last / "trainer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(rest["optimizer"])
        scheduler.load_state_dict(rest["scheduler"])
        model.reset_memory(rest["memory_rows"])
        model.set_memory_state(rest["memory"])
        set_random_states(rest["random_states"])
    except UserError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        raise UserError(f"{last}: the checkpoint can't be read: {error}") from None
    return state
