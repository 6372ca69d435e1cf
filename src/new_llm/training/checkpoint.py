"""Checkpoints: all that an interrupted run needs to go on as if it had not been interrupted.

`best/` holds the best weights as a model folder. Each folder in `checkpoints/` holds the weights (safetensors), the
optimizer, schedule, stream memory and random states (loaded with `weights_only=True`), the counters (JSON), a manifest.
"""

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from new_llm.config import UserError
from new_llm.config.bounded_files import read_json_file
from new_llm.config.errors import OtherProcessError
from new_llm.models import TransformerLM
from new_llm.models.tensor_files import check_finite, read_safetensors, read_torch_file
from new_llm.models.write_errors import raise_os_errors
from new_llm.processes import ALONE, Processes
from new_llm.training.checkpoint_folder import find_checkpoint, write_checkpoint_folder
from new_llm.training.gathered_state import GatheredState, check_state, gather_state, restore_state

BEST_FOLDER = "best"
WEIGHTS_FILE = "model.safetensors"
VALUES_FILE = "trainer.pt"
STATE_FILE = "state.json"
FORMAT_VERSION = 5


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
        best_fingerprint: of its weights, as `fingerprint_weights` gives it.
        epochs_without_gain: epochs since then.
        stopped_early: whether patience has run out.
        window_loss, window_tokens, window_seconds: what the next line of metrics averages over.
        epoch_loss, epoch_tokens: what the epoch's training loss averages over.
        skipped_steps: steps that a non-finite number has cost so far.
        skips_in_a_row: those of them since the last step that counted.
        saved_faults: those that have been saved under `faults/`.
        recent_losses: what a spike is measured against.
        in_spike: whether the last step's loss was in a spike.
        metrics_lines: lines of `metrics.jsonl` that had been written by then.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_epoch: int = 0
    best_fingerprint: str | None = None
    epochs_without_gain: int = 0
    stopped_early: bool = False
    window_loss: float = 0.0
    window_tokens: int = 0
    window_seconds: float = 0.0
    epoch_loss: float = 0.0
    epoch_tokens: int = 0
    skipped_steps: int = 0
    skips_in_a_row: int = 0
    saved_faults: int = 0
    recent_losses: list[float] = field(default_factory=list)
    in_spike: bool = False
    metrics_lines: int = 0
    format_version: int = field(default=FORMAT_VERSION)


def save_checkpoint(
    folder: Path,
    model: TransformerLM,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    state: TrainerState,
    *,
    keep: int,
    processes: Processes = ALONE,
) -> None:
    """Write a checkpoint into the model's folder, and remove those beyond the newest `keep`.

    All processes call this, and the main one writes.

    Raises:
        OtherProcessError: on the others, where the main process can't write.
    """
    gathered = gather_state(model, optimizer, scheduler, processes)
    with processes.agree():
        if gathered is None:
            return
        with write_checkpoint_folder(folder, state.step, state.epoch, keep=keep) as temporary:
            with raise_os_errors(folder):
                save_file(gathered.weights, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
            rest = {field.name: getattr(gathered, field.name) for field in fields(gathered) if field.name != "weights"}
            with raise_os_errors(folder), (temporary / VALUES_FILE).open("wb") as file:
                torch.save(rest, file)
            (temporary / STATE_FILE).write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")


def load_checkpoint(
    folder: Path,
    model: TransformerLM,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    warn: Callable[[str], None],
    processes: Processes = ALONE,
) -> TrainerState | None:
    """Put the values of the last good checkpoint into model, optimizer and schedule; None where there is no checkpoint.

    All processes call this, and the main one reads. How many wrote it, and how they shared the weights, is no matter.

    Raises:
        UserError: none is whole, or it is of another version or another model.
        OtherProcessError: on the others, likewise.
    """
    last, gathered, state = None, None, None
    with processes.agree():
        if processes.is_main:
            last = find_checkpoint(folder, warn)
        if last is not None:
            with describe_fault(last):
                gathered, state = read_checkpoint(last)
                check_state(gathered, model, optimizer)
    state = processes.share(state)
    if state is not None:
        with processes.agree(), describe_fault(last or folder):
            restore_state(gathered, model, optimizer, scheduler, processes)
    return state


def read_checkpoint(path: Path) -> tuple[GatheredState, TrainerState]:
    """What a checkpoint's files hold.

    Raises:
        UserError: another version. A broken file raises what its library does.
    """
    values = read_json_file(path / STATE_FILE)
    if not isinstance(values, dict):
        raise UserError(f"{path / STATE_FILE}: expected a mapping, found {type(values).__name__}")
    if values.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: checkpoint version {values.get('format_version')}, this program reads {FORMAT_VERSION}"
        )
    weights = read_safetensors(path / WEIGHTS_FILE)
    check_finite(weights, str(path / WEIGHTS_FILE))
    rest = read_torch_file(path / VALUES_FILE)
    return GatheredState(weights=weights, **rest), TrainerState(**values)


@contextmanager
def describe_fault(path: Path) -> Iterator[None]:
    """Turn what a broken checkpoint raises into one line."""
    try:
        yield
    except (UserError, OtherProcessError):
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        raise UserError(f"{path}: the checkpoint can't be read: {error}") from None
