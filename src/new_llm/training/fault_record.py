"""A step with a non-finite loss or gradient, as files for study: its batches, and the norms of all parameters.

`faults/step-000000123/batches.safetensors` holds what each process read, `norms.json` what was known of the step. To
see which tokens did it, load the ids and call the model of the checkpoint before it.
"""

import json
import math
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from new_llm.config.atomic import write_folder_atomically
from new_llm.data.batches import Batch
from new_llm.models.write_errors import raise_os_errors
from new_llm.processes import Processes
from new_llm.training.readout import StepFacts

FAULTS_FOLDER = "faults"
BATCHES_FILE = "batches.safetensors"
NORMS_FILE = "norms.json"


def measure_norms(tensors: list[Tensor]) -> Tensor:
    """The 2-norms of some tensors, [n] on their device; of a tensor that is shared out, of this process's share."""
    shares = [cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    if not shares:
        return torch.zeros(0)
    # One call for all tensors, as torch's own clipping makes it: on a GPU a call each would take a step's time.
    norms = torch._foreach_norm([share.detach() for share in shares])  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack([norm.float() for norm in norms])


def list_parameters(optimizer: Optimizer) -> list[Tensor]:
    """The parameters that have a gradient, in the order of `measure_norms` over their gradients."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def describe_norms(
    optimizer: Optimizer, names: dict[Tensor, str], grad_norms: Tensor, processes: Processes, is_sharded: bool
) -> dict[str, Any]:
    """The norms of gradients and weights, of each group of the optimizer and of each parameter.

    All processes call this.

    Args:
        optimizer: with the groups.
        names: of the parameters.
        grad_norms: of the step's gradients, in the order of the groups' parameters that have one.
        processes: those that train together.
        is_sharded: whether each holds a share of the weights, so that squares add up.
    """
    groups = [[p for p in group["params"] if p in names] for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group]
    weight_squares = _add_up(measure_norms(parameters), processes, is_sharded)
    grad_squares = _add_up(grad_norms, processes, is_sharded)
    if len(grad_squares) != len(parameters):  # a parameter that no loss reaches has no gradient
        grad_squares = torch.full((len(parameters),), math.nan, dtype=torch.float64)
    described: dict[str, Any] = {"groups": [], "parameters": {}}
    first = 0
    for settings, group in zip(optimizer.param_groups, groups, strict=True):
        part = slice(first, first + len(group))
        first += len(group)
        described["groups"].append(
            {
                "name": settings.get("name"),
                "learning_rate": float(settings["lr"]),
                "num_parameters": sum(parameter.numel() for parameter in group),
                "grad_norm": _number(grad_squares[part].sum().sqrt()),
                "weight_norm": _number(weight_squares[part].sum().sqrt()),
            }
        )
        for parameter, grad, weight in zip(group, grad_squares[part], weight_squares[part], strict=True):
            described["parameters"][names[parameter]] = {
                "grad_norm": _number(grad.sqrt()),
                "weight_norm": _number(weight.sqrt()),
            }
    return described


def write_fault(folder: Path, step: StepFacts, batches: list[list[Batch]], norms: dict[str, Any]) -> Path:
    """Write a step's files, in place of those of an earlier attempt at it.

    Args:
        folder: the model's folder in the run.
        step: its numbers.
        batches: of each process.
        norms: of `describe_norms`.

    Returns:
        Their folder.
    """
    path = folder / FAULTS_FOLDER / f"step-{step.step:09d}"
    tensors = {
        f"processes.{rank}.batches.{number}.{name}": tensor.contiguous()
        for rank, own in enumerate(batches)
        for number, batch in enumerate(own)
        for name in ("input_ids", "labels", "attention_mask", "resets", "label_weights")
        if (tensor := getattr(batch, name)) is not None
    }
    facts = {
        "step": step.step,
        "epoch": step.epoch,
        "batch": step.batch,
        "num_tokens": step.num_tokens,
        "loss": _number(step.loss),
        "grad_norm": _number(step.grad_norm),
    }
    with write_folder_atomically(path) as temporary:
        with raise_os_errors(path):
            save_file(tensors, temporary / BATCHES_FILE)
        (temporary / NORMS_FILE).write_text(json.dumps(facts | norms, indent=1), encoding="utf-8")
    return path


def _add_up(norms: Tensor, processes: Processes, is_sharded: bool) -> Tensor:
    squares = norms.double().cpu().square()
    return torch.stack(processes.gather(squares)).sum(0) if is_sharded else squares


def _number(value: Tensor | float) -> float | str:
    """A number as JSON has it; "nan" and "inf" as texts, which JSON lacks."""
    number = float(value)
    return number if math.isfinite(number) else str(number)
