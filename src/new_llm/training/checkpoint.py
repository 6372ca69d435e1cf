"""Checkpoints: everything that an interrupted training needs to continue as if nothing had happened.

`best/` contains the best weights as a model folder. Each folder in `checkpoints/` contains the weights (safetensors);
the optimizer, schedule, carried memory and random states (loaded with `weights_only=True`); the counters (JSON); and a
manifest. Weights and optimizer state are unsharded and keyed by parameter name, and the memory has all rows of the
batch in order, so that any number of processes can resume, with DDP or FSDP.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from new_llm.config import UserError
from new_llm.config.errors import OtherProcessError
from new_llm.config.files import (
    check_manifest,
    read_mapping,
    remove_folder_atomically,
    remove_leftovers,
    write_folder_atomically,
    write_manifest,
)
from new_llm.models import TransformerLM
from new_llm.models.model_file import find_model_fault, write_model_files
from new_llm.models.tensor_files import (
    check_finite,
    find_misfit,
    fingerprint_tensors,
    read_safetensors,
    read_torch_file,
)
from new_llm.processes import ALONE, Processes
from new_llm.training.devices import read_random_states, set_random_states

BEST_FOLDER = "best"
CHECKPOINTS_FOLDER = "checkpoints"
CHECKPOINT_NAME = "step-{:09d}-epoch-{:04d}"
"""Named by steps and finished epochs; after an epoch's last step there may be one before and one after validation."""
WEIGHTS_FILE = "model.safetensors"
VALUES_FILE = "trainer.pt"
STATE_FILE = "state.json"
FORMAT_VERSION = 6


@dataclass
class TrainerState:
    """The counters of a training run.

    `best_loss` and `recent_losses` are in nats per token. `window_*` and `epoch_*` are sums since the last line of
    metrics and since the start of the epoch.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
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


class Checkpoint(NamedTuple):
    """The contents of a checkpoint: weights by parameter name, the counters, and `values`.

    `values` has `optimizer` (keyed by parameter name), `scheduler`, `memory` (as of `get_memory_state`, with all rows),
    `memory_rows` (None: all rows share one memory) and `random_states` (of the main process).
    """

    weights: dict[str, Tensor]
    values: dict[str, Any]
    state: TrainerState


# Folders: one per checkpoint, complete or absent


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a model's folder, including damaged ones, newest first."""
    found = {path: _read_place(path) for path in (folder / CHECKPOINTS_FOLDER).glob("step-*")}
    return sorted((path for path, place in found.items() if place), key=lambda path: found[path], reverse=True)


def _read_place(path: Path) -> tuple[int, ...]:
    """Return (step, epoch) of a checkpoint's name; empty for other names."""
    found = re.fullmatch(r"step-(\d+)-epoch-(\d+)", path.name)
    return tuple(map(int, found.groups())) if found else ()


@contextmanager
def write_checkpoint_folder(folder: Path, step: int, epoch: int, *, keep: int) -> Iterator[Path]:
    """Open a temporary folder for a checkpoint's files; at the block's end it is committed with a manifest.

    Afterwards the `keep` newest checkpoints up to this one remain; those of later steps, which were damaged, are
    removed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: deleted or renamed during training")
    path = folder / CHECKPOINTS_FOLDER / CHECKPOINT_NAME.format(step, epoch)
    with write_folder_atomically(path) as temporary:
        yield temporary
        write_manifest(temporary)
    # If there are later ones, they were damaged and training has resumed from an earlier one.
    found = list_checkpoints(folder)
    kept = [other for other in found if _read_place(other) <= (step, epoch)][:keep]
    for other in found:
        if other not in kept:
            remove_folder_atomically(other)


def find_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the newest undamaged checkpoint, or None; warn about damaged ones. If all are damaged: a `UserError`."""
    remove_leftovers(folder / CHECKPOINTS_FOLDER)
    damaged = list[str]()
    for path in list_checkpoints(folder):
        faults = check_manifest(path)
        if not faults:
            if damaged:
                warn(f"{'; '.join(damaged)}: continuing from {path.name}")
            return path
        damaged.append(f"checkpoint {path.name} is damaged ({'; '.join(faults)})")
    if damaged:
        raise UserError(
            f"{folder / CHECKPOINTS_FOLDER}: every checkpoint is damaged: {'; '.join(damaged)}; remove this folder to "
            "train the model from scratch"
        )
    return None


def remove_checkpoints(folder: Path, keep: int = 0) -> None:
    """Remove all but the newest `keep` checkpoints of a finished model; its best weights stay."""
    for path in list_checkpoints(folder)[keep:]:
        remove_folder_atomically(path)
    if not keep:
        remove_folder_atomically(folder / CHECKPOINTS_FOLDER)


# Saving and loading


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
    """Write a checkpoint into the model's folder and keep the newest `keep`. All processes call this; rank 0 writes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict  # slow to import

    # Full tensors on the main process's CPU, keyed by parameter name; nothing on the other processes.
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, optimizer_state = get_state_dict(model, optimizer, options=options)
    memory, rows = gather_memory(model, processes)
    with processes.agree():
        if not processes.is_main:
            return
        values = {
            "optimizer": optimizer_state,
            "scheduler": scheduler.state_dict(),
            "memory": memory,
            "memory_rows": rows,
            "random_states": read_random_states(),
        }
        with write_checkpoint_folder(folder, state.step, state.epoch, keep=keep) as temporary:
            tensors = {name: cast(Tensor, tensor).contiguous() for name, tensor in weights.items()}
            save_file(tensors, temporary / WEIGHTS_FILE)
            with (temporary / VALUES_FILE).open("wb") as file:
                torch.save(values, file)
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
    """Load the newest undamaged checkpoint into model, optimizer and schedule; return its counters, or None.

    All processes must call this; the main process reads the files.

    Raises:
        UserError: all checkpoints are damaged, or the one to load has another version or belongs to another model.
        OtherProcessError: the same, on the other processes.
    """
    last, found = None, None
    with processes.agree():
        if processes.is_main:
            last = find_checkpoint(folder, warn)
        if last is not None:
            with describe_fault(last):
                found = read_checkpoint(last)
                if misfit := find_misfit(found.weights, model.state_dict()):
                    raise ValueError(f"it belongs to another model: {misfit}")
                names = {parameter: name for name, parameter in model.named_parameters()}
                groups = {group["name"]: {names[one] for one in group["params"]} for group in optimizer.param_groups}
                stored = found.values["optimizer"]["param_groups"]
                if {group["name"]: set(group["params"]) for group in stored} != groups:
                    raise ValueError("its optimizer groups contain other parameters")
    state = processes.share(found and found.state)
    if state is not None:
        with processes.agree(), describe_fault(last or folder):
            weights, values = (found.weights, found.values) if found else ({}, {})
            restore_weights(weights, values.pop("optimizer", {}), model, optimizer, processes)
            values = processes.share(values)
            scheduler.load_state_dict(values["scheduler"])
            restore_memory(values["memory"], values["memory_rows"], model, processes)
            set_random_states(values["random_states"])
    return state


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's files. Another version raises a `UserError`; a broken file, any library's error."""
    state = read_mapping(path / STATE_FILE)
    if state.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: checkpoint version {state.get('format_version')}, this program reads {FORMAT_VERSION}"
        )
    weights = read_safetensors(path / WEIGHTS_FILE)
    check_finite(weights, str(path / WEIGHTS_FILE))
    return Checkpoint(weights, read_torch_file(path / VALUES_FILE), TrainerState(**state))


@contextmanager
def describe_fault(path: Path) -> Iterator[None]:
    """Turn any error that a broken checkpoint causes inside the block into a `UserError`."""
    try:
        yield
    except (UserError, OtherProcessError):
        raise
    except Exception as error:  # a broken file can raise almost anything in the libraries
        raise UserError(f"{path}: the checkpoint can't be read: {error}") from None


def restore_weights(
    weights: dict[str, Tensor],
    optimizer_state: dict[str, Any],
    model: TransformerLM,
    optimizer: Optimizer,
    processes: Processes,
) -> None:
    """Load the main process's weights and optimizer state into every process, or its shards. All must call this."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    shares = processes.count > 1
    share_weights(weights, model, processes)
    options = StateDictOptions(full_state_dict=shares, broadcast_from_rank0=shares, strict=False)
    set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)
    # A parameter without gradients so far has no state, but torch fills in one as after a first step: remove it.
    known = processes.share(set(optimizer_state.get("state", {})))
    for name, parameter in model.named_parameters():
        if name not in known:
            optimizer.state.pop(parameter, None)


def share_weights(weights: dict[str, Tensor], model: nn.Module, processes: Processes) -> None:
    """Load the main process's weights into every process, or its shards of them. All processes must call this."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    shares = processes.count > 1
    options = StateDictOptions(full_state_dict=shares, broadcast_from_rank0=shares)
    set_model_state_dict(model, cast(Any, weights), options=options)


def gather_memory(model: TransformerLM, processes: Processes) -> tuple[dict[int, dict[str, Any]], int | None]:
    """Gather the memory state, with all processes' rows in order, and the number of rows (None: one shared memory)."""
    rows = model.memory_rows
    own = model.get_memory_state()
    states = processes.gather(own) if rows else [own]
    if len(states) > 1:
        own = {
            index: {
                key: torch.cat([state[index][key] for state in states]) if _has_rows(entry, key) else value
                for key, value in entry.items()
            }
            for index, entry in states[0].items()
        }
    return own, rows and rows * processes.count


def restore_memory(
    memory: dict[int, dict[str, Any]], rows: int | None, model: TransformerLM, processes: Processes
) -> None:
    """Set this process's rows of a memory that `gather_memory` returned."""
    own = processes.slice_rows(rows) if rows else slice(None)
    model.reset_memory(rows and own.stop - own.start)
    if memory:  # even a model without memory has a number of rows
        model.set_memory_state(
            {
                index: {key: value[own] if _has_rows(entry, key) else value for key, value in entry.items()}
                for index, entry in memory.items()
            }
        )


def _has_rows(entry: dict[str, Any], key: str) -> bool:
    return entry["per_row"] and isinstance(entry[key], Tensor)


# The best weights


def restore_best(
    folder: Path, structure: dict[str, Any], state: TrainerState, warn: Callable[[str], None]
) -> TrainerState:
    """Make sure that `best/` contains the best weights according to `state`, the counters to resume from.

    A checkpoint is written before the best weights, and contains them if its last epoch was the best. If training was
    killed between the two writes, or `best/` is damaged, they are restored from a checkpoint. If no checkpoint has
    them, the newest one's weights replace them until the next epoch ends, and the returned counters say so.
    """
    if state.best_fingerprint is None:
        return state
    best = folder / BEST_FOLDER
    fault = find_model_fault(best, structure, state.best_fingerprint)
    if fault is None:
        return state
    complete = [path for path in list_checkpoints(folder) if not check_manifest(path)]
    for path in complete:
        weights = load_file(path / WEIGHTS_FILE)
        if fingerprint_tensors(weights) == state.best_fingerprint:
            write_model_files(structure, weights, best)
            warn(f"the best weights (epoch {state.best_epoch}) are restored from {path.name}: {fault}")
            return state
    weights = load_file(complete[0] / WEIGHTS_FILE)
    write_model_files(structure, weights, best)
    warn(
        f"the best weights (epoch {state.best_epoch}) are lost: {fault}; those of {complete[0].name} replace them "
        "until the next epoch ends"
    )
    fingerprint = fingerprint_tensors(weights)
    return replace(state, best_loss=None, best_epoch=state.epoch, epochs_without_gain=0, best_fingerprint=fingerprint)
