"""The best weights of a training that goes on: those of its checkpoint, or a line on what became of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from new_llm.config.manifest import check_manifest
from new_llm.models.memory_file import fingerprint_tensors
from new_llm.models.model_file import find_model_fault, write_model_files
from new_llm.training.checkpoint import BEST_FOLDER, WEIGHTS_FILE, TrainerState
from new_llm.training.checkpoint_folder import list_checkpoints


def restore_best(
    folder: Path, structure: dict[str, Any], state: TrainerState, warn: Callable[[str], None]
) -> TrainerState:
    """See that `best/` holds the weights that a checkpoint's counters speak of.

    A checkpoint is written before the best weights are, and holds them when its last epoch was the best: a training
    killed between the two writes gets them from there, and so does one whose best weights are damaged. Where no
    checkpoint has them any more, the newest one's weights stand in for them until the next epoch.

    Args:
        folder: the model's folder in the run.
        structure: the model's, as `describe_model` gives it.
        state: the counters of the checkpoint that training goes on from.
        warn: told in one line what was done.

    Returns:
        The counters, changed where the best weights are lost.
    """
    if state.best_fingerprint is None:
        return state
    best = folder / BEST_FOLDER
    fault = find_model_fault(best, state.best_fingerprint)
    if fault is None:
        return state
    whole = [path for path in list_checkpoints(folder) if not check_manifest(path)]
    for path in whole:
        weights = load_file(path / WEIGHTS_FILE)
        if fingerprint_tensors(weights) == state.best_fingerprint:
            write_model_files(structure, weights, best)
            warn(f"the best weights (epoch {state.best_epoch}) are written anew from {path.name}: {fault}")
            return state
    weights = load_file(whole[0] / WEIGHTS_FILE)
    write_model_files(structure, weights, best)
    warn(
        f"the best weights (epoch {state.best_epoch}) are lost: {fault}; those of {whole[0].name} stand in for them "
        "until the next epoch ends"
    )
    return replace(
        state,
        best_loss=None,
        best_epoch=state.epoch,
        epochs_without_gain=0,
        best_fingerprint=fingerprint_tensors(weights),
    )
