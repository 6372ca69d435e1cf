"""Watching the numbers of the steps: losses and gradient norms are read late, bad steps are stopped or skipped.

Reading a number makes the host wait for a GPU, so a step's loss and gradient norm stay on the device and are read
every few steps. A loss or norm that is not finite makes that step's update a no-op on the device itself, by fused
AdamW's own switch (`found_inf`). Where faults stop training every later update is a no-op too, so whenever the fault
is read, weights and optimizer are as they were before the step.

A bad step is saved for study: `faults/step-000000123/batches.safetensors` holds what each process read, `norms.json`
what was known of the step. To see which tokens did it, load the ids and call the model of the checkpoint before it.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from new_llm.config import TrainConfig
from new_llm.config.files import write_folder_atomically
from new_llm.data.batches import Batch
from new_llm.models import TransformerLM
from new_llm.models.tensor_files import raise_os_errors
from new_llm.processes import Processes
from new_llm.training.checkpoint import TrainerState

FAULTS_FOLDER = "faults"
BATCHES_FILE = "batches.safetensors"
NORMS_FILE = "norms.json"
MAD_TO_DEVIATION = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""


class TrainingError(RuntimeError):
    """Training can't continue; the message says at which step and batch, and what to try."""


@dataclass(frozen=True)
class StepPlace:
    """Which optimizer step: its number and epoch (from 1), the epoch's batches before it, its predicted tokens."""

    step: int
    epoch: int
    batch: int
    num_tokens: int


@dataclass(frozen=True)
class StepNumbers(StepPlace):
    """What was read of a step: the mean loss of its tokens (nats), and its gradients' norm before clipping."""

    loss: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        """Whether loss and norm are."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class _PendingStep:
    """A step whose numbers, [2] float64 on the device, have not been read."""

    place: StepPlace
    numbers: Tensor
    batches: list[Batch]
    grad_norms: Tensor  # of the parameters that have a gradient, before clipping, on the device


class StepMonitor:
    """Keeps the steps' numbers on the device until they are read, and judges them then.

    Args:
        model: in training, with its parameters as they are held.
        optimizer: fused AdamW.
        config: the training's.
        folder: the model's folder in the run, for `faults/`.
        device: where the losses are.
        processes: those that train together; a loss is of all of them, as the gradients' norm is already.
        is_sharded: whether each process holds a share of the weights.
        describe_place: adds to a message what else is known of a step's place.
        write: takes a line for the metrics.
        note: takes a line for the console.

    Attributes:
        every_steps: steps after which the numbers are to be read; 1: each before its update.
        has_failed: whether the last step's update is a no-op, on the device.
    """

    def __init__(
        self,
        model: TransformerLM,
        optimizer: Optimizer,
        config: TrainConfig,
        folder: Path,
        *,
        device: torch.device,
        processes: Processes,
        is_sharded: bool,
        describe_place: Callable[[StepPlace], str],
        write: Callable[[str, int, dict[str, Any]], None],
        note: Callable[[str], None],
    ) -> None:
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self.optimizer = optimizer
        self.config = config
        self.folder = folder
        self.processes = processes
        self.is_sharded = is_sharded
        self.describe_place = describe_place
        self.write = write
        self.note = note
        # On a CPU reading a number costs nothing; a GPU would have to be waited for.
        self.every_steps = 1 if device.type == "cpu" else config.log_every_steps
        self.skips_faults = config.on_nonfinite == "skip"
        self.has_failed = torch.zeros((), dtype=torch.bool, device=device)
        self._pending: list[_PendingStep] = []

    def add(
        self, place: StepPlace, losses: list[Tensor], norm: Tensor, batches: list[Batch], grad_norms: Tensor
    ) -> bool:
        """Keep a step's numbers, before its update; whether it is time to read them.

        Args:
            place: which step.
            losses: this process's shares of the mean loss, one per batch.
            norm: of the step's gradients, before clipping.
            batches: what it read, as the host has it.
            grad_norms: of each parameter's gradient, as `measure_norms` gives them.
        """
        loss = self.processes.sum_on_device(torch.stack(losses).double().sum())
        numbers = torch.stack([loss, norm.detach().double()])
        self._pending.append(_PendingStep(place, numbers, batches, grad_norms))
        has_failed = ~numbers.isfinite().all()
        self.has_failed = has_failed if self.skips_faults else self.has_failed | has_failed
        self.optimizer.found_inf = self.has_failed.float()  # pyright: ignore[reportAttributeAccessIssue]
        return len(self._pending) >= self.every_steps

    def read(self, state: TrainerState) -> tuple[list[StepNumbers], int]:
        """Read the steps since the last call, which waits for the device.

        Args:
            state: the counters; those of skipped steps and of recent losses are updated.

        Returns:
            The steps that count, oldest first: their updates have been made. And the tokens of those that were skipped.

        Raises:
            TrainingError: a number is not finite, and steps are not to be skipped, or too many have been.
        """
        pending, self._pending = self._pending, []
        values = torch.stack([step.numbers for step in pending]).tolist() if pending else []
        good, num_skipped = list[StepNumbers](), 0
        for step, (loss, norm) in zip(pending, values, strict=True):
            numbers = StepNumbers(**asdict(step.place), loss=loss, grad_norm=norm)
            if numbers.is_finite:
                state.skips_in_a_row = 0
                self._look_for_spike(numbers, state)
                good.append(numbers)
            else:
                self._take_fault(numbers, step, state)
                num_skipped += numbers.num_tokens
        return good, num_skipped

    def _take_fault(self, step: StepNumbers, pending: _PendingStep, state: TrainerState) -> None:
        what, value = ("gradient norm", step.grad_norm) if math.isfinite(step.loss) else ("loss", step.loss)
        saved = self._save_fault(step, pending, state)
        line = f"{what} is {value} at step {step.step} ({self.describe_place(step)}){saved}"
        if not self.skips_faults:
            raise TrainingError(
                f"{line}: the weights are as they were before that step; a lower train.learning_rate or "
                "train.precision fp32 may help"
            )
        state.skipped_steps += 1
        state.skips_in_a_row += 1
        self.write("fault", step.step, {"epoch": step.epoch, "tokens": state.num_tokens, "what": what, "skipped": True})
        if state.skips_in_a_row > self.config.max_skipped_steps:
            raise TrainingError(
                f"{line}: {state.skips_in_a_row} steps in a row, over train.max_skipped_steps "
                f"({self.config.max_skipped_steps}): the weights are as they were before them"
            )
        self.note(f"{line}: the step is skipped")

    def _save_fault(self, step: StepNumbers, pending: _PendingStep, state: TrainerState) -> str:
        """Save the step's files, as long as there are few such; where, for messages."""
        if state.saved_faults >= self.config.max_saved_faults:
            return ""
        norms = describe_norms(self.optimizer, self.names, pending.grad_norms, self.processes, self.is_sharded)
        batches = self.processes.gather_on_main(pending.batches)
        state.saved_faults += 1
        path = self.processes.run_on_main(lambda: write_fault(self.folder, step, batches, norms))
        return f", saved in {path}"

    def _look_for_spike(self, step: StepNumbers, state: TrainerState) -> None:
        """Warn when a loss rises far above the recent ones, and again only after it has come back."""
        window = self.config.spike_window
        if not window:
            return
        recent = state.recent_losses
        if len(recent) == window:
            middle = median(recent)
            deviation = MAD_TO_DEVIATION * median(abs(loss - middle) for loss in recent)
            deviations = (step.loss - middle) / max(deviation, self.config.spike_min_deviation)
            is_spike = deviations > self.config.spike_threshold
            if is_spike and not state.in_spike:
                values = {"epoch": step.epoch, "tokens": state.num_tokens, "loss": step.loss, "median": middle}
                self.write("spike", step.step, values | {"deviations": deviations})
                self.note(
                    f"the loss spikes: {step.loss:.3f} at step {step.step} ({self.describe_place(step)}), "
                    f"{deviations:.1f} robust deviations above the median {middle:.3f} of the last {window} steps"
                )
            state.in_spike = is_spike
        state.recent_losses = [*recent, step.loss][-window:]


def measure_norms(tensors: list[Tensor]) -> Tensor:
    """The 2-norms of some tensors, [n] on their device; of a sharded tensor, of this process's share."""
    shares = [cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    if not shares:
        return torch.zeros(0)
    # One call for all tensors, as in torch's own clipping: on a GPU one call each would take as long as a step.
    norms = torch._foreach_norm([share.detach() for share in shares])  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack([norm.float() for norm in norms])


def measure_gradients(optimizer: Optimizer) -> Tensor:
    """`measure_norms` of the gradients, for the optimizer's parameters that have one, in its order."""
    return measure_norms([p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None])


def describe_norms(
    optimizer: Optimizer, names: dict[Tensor, str], grad_norms: Tensor, processes: Processes, is_sharded: bool
) -> dict[str, Any]:
    """The norms of gradients and weights, by the optimizer's groups and by parameter. All processes call this.

    Args:
        optimizer: with the groups.
        names: of the parameters.
        grad_norms: of `measure_gradients`.
        processes: those that train together.
        is_sharded: whether each holds a share of the weights, so that squares add up.
    """
    groups = [[p for p in group["params"] if p in names] for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group]
    weight_squares = _sum_squares(measure_norms(parameters), processes, is_sharded)
    grad_squares = _sum_squares(grad_norms, processes, is_sharded)
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
                "grad_norm": _to_json(grad_squares[part].sum().sqrt()),
                "weight_norm": _to_json(weight_squares[part].sum().sqrt()),
            }
        )
        for parameter, grad, weight in zip(group, grad_squares[part], weight_squares[part], strict=True):
            entry = {"grad_norm": _to_json(grad.sqrt()), "weight_norm": _to_json(weight.sqrt())}
            described["parameters"][names[parameter]] = entry
    return described


def write_fault(folder: Path, step: StepNumbers, batches: list[list[Batch]], norms: dict[str, Any]) -> Path:
    """Write a step's files, replacing those of an earlier attempt at it, and return their folder.

    Args:
        folder: the model's folder in the run.
        step: its numbers.
        batches: of each process.
        norms: of `describe_norms`.
    """
    path = folder / FAULTS_FOLDER / f"step-{step.step:09d}"
    tensors = {
        f"processes.{rank}.batches.{number}.{name}": tensor.contiguous()
        for rank, own in enumerate(batches)
        for number, batch in enumerate(own)
        for name in ("input_ids", "labels", "attention_mask", "resets", "label_weights")
        if (tensor := getattr(batch, name)) is not None
    }
    facts = asdict(step) | {"loss": _to_json(step.loss), "grad_norm": _to_json(step.grad_norm)}
    with write_folder_atomically(path) as temporary:
        with raise_os_errors(path):
            save_file(tensors, temporary / BATCHES_FILE)
        (temporary / NORMS_FILE).write_text(json.dumps(facts | norms, indent=1), encoding="utf-8")
    return path


def _sum_squares(norms: Tensor, processes: Processes, is_sharded: bool) -> Tensor:
    squares = norms.double().cpu().square()
    return torch.stack(processes.gather(squares)).sum(0) if is_sharded else squares


def _to_json(value: Tensor | float) -> float | str:
    """A number as JSON has it; "nan" and "inf" as texts, which JSON lacks."""
    number = float(value)
    return number if math.isfinite(number) else str(number)
