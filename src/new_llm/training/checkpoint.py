"""Checkpoints: all that an interrupted run needs to go on as if it had not been interrupted.

`best/` holds the best weights as a model folder. `checkpoints/last/` holds the weights (safetensors), the optimizer,
schedule and stream memory (tensors, loaded with `weights_only=True`) and the counters (JSON). It is replaced whole.
"""

import json
import pickle
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from new_llm.config import UserError
from new_llm.config.atomic import write_folder_atomically
from new_llm.models import TransformerLM

BEST_FOLDER = "best"
LAST_FOLDER = Path("checkpoints") / "last"
FORMAT_VERSION = 1


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
    format_version: int = field(default=FORMAT_VERSION)


def save_checkpoint(
    folder: Path, model: TransformerLM, optimizer: Optimizer, scheduler: LRScheduler, state: TrainerState
) -> None:
    """Replace the model folder's last checkpoint."""
    with write_folder_atomically(folder / LAST_FOLDER) as temporary:
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        rest: dict[str, Any] = {
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "memory": model.get_memory_state(),
            "memory_rows": model.memory_rows,
            "random_state": torch.get_rng_state(),
        }
        torch.save(rest, temporary / "trainer.pt")
        (temporary / "state.json").write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")


def load_checkpoint(
    folder: Path, model: TransformerLM, optimizer: Optimizer, scheduler: LRScheduler
) -> TrainerState | None:
    """Put the last checkpoint's values into model, optimizer and schedule; None where there is no checkpoint.

    Raises:
        UserError: the checkpoint is broken, of another version or of another model.
    """
    last = folder / LAST_FOLDER
    if not last.exists():
        last = last.with_name(f"{last.name}.old")  # the machine died between the two renames of a replacement
    if not last.exists():
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
        torch.set_rng_state(rest["random_state"])
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


def remove_checkpoint(folder: Path) -> None:
    """Remove the last checkpoint of a finished model, whose best weights stay."""
    shutil.rmtree(folder / LAST_FOLDER.parent, ignore_errors=True)
