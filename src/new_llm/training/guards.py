"""Guards against bad steps: a non-finite loss or gradient norm stops training or skips the step; spikes are reported.

Reading a number makes the host wait for the GPU, so each step's loss and gradient norm stay on the device and are read
every few steps. A non-finite loss or norm turns the step's update into a no-op on the device, through fused AdamW's
`found_inf`. If faults stop training, all later updates are no-ops, too: however late the fault is read, weights and
optimizer are as they were before the step.

A bad step leaves a `fault` line in `metrics.jsonl` and, in `faults/step-000000123.safetensors`, the batches that each
process read. To find the tokens that caused it, run the model of the last checkpoint before it on these batches.
"""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from new_llm.config import TrainConfig
from new_llm.config.files import write_atomically
from new_llm.data.batches import Batch
from new_llm.processes import Processes
from new_llm.training.checkpoint import TrainerState

FAULTS_FOLDER = "faults"
MAD_TO_DEVIATION = 1.4826
"""Standard deviation / median absolute deviation of a normal distribution."""


class TrainingError(RuntimeError):
    """Training can't continue; the message says at which step and batch, and what to try."""


@dataclass
class Step:
    """An optimizer step. `step` and `epoch` count from 1; `batch` counts the epoch's batches before it.

    `num_tokens` are its predicted tokens over all processes, `batches` what this process read, on the host. `loss`
    (the mean in nats) and `grad_norm` (before clipping) are NaN until they are read from the device.
    """

    step: int
    epoch: int
    batch: int
    num_tokens: int
    batches: list[Batch]
    loss: float = math.nan
    grad_norm: float = math.nan


@dataclass(eq=False)
class StepMonitor:
    """Keeps the steps' losses and gradient norms on the device until they are read, then checks them.

    Losses are summed over the processes; gradient norms already cover all of them.

    Attributes:
        every_steps: how often the numbers are read; 1: before each update.
        has_failed: a bool on the device: whether the last step's update is a no-op.
        describe_place: describes where a step is in the data.
        write: writes a line of metrics: event, step, values.
        note: prints a line on the console.
    """

    optimizer: Optimizer
    config: TrainConfig
    folder: Path
    _: KW_ONLY
    device: torch.device
    processes: Processes
    describe_place: Callable[[Step], str]
    write: Callable[[str, int, dict[str, Any]], None]
    note: Callable[[str], None]

    def __post_init__(self) -> None:
        # On a CPU reading a number costs nothing; on a GPU it makes the host wait.
        self.every_steps = 1 if self.device.type == "cpu" else self.config.log_every_steps
        self.skips_faults = self.config.on_nonfinite == "skip"
        self.has_failed = torch.zeros((), dtype=torch.bool, device=self.device)
        self._pending: list[tuple[Step, Tensor]] = []

    def add(self, step: Step, losses: list[Tensor], norm: Tensor) -> bool:
        """Store a step's numbers, before its update; return whether it is time to `read` them.

        Args:
            losses: this process's contributions to the mean loss, one per batch.
            norm: the gradient norm before clipping.
        """
        loss = self.processes.sum_on_device(torch.stack(losses).double().sum())
        numbers = torch.stack([loss, norm.detach().double()])
        self._pending.append((step, numbers))
        has_failed = ~numbers.isfinite().all()
        self.has_failed = has_failed if self.skips_faults else self.has_failed | has_failed
        self.optimizer.found_inf = self.has_failed.float()  # pyright: ignore[reportAttributeAccessIssue]
        return len(self._pending) >= self.every_steps

    def read(self, state: TrainerState) -> tuple[list[Step], int]:
        """Return the good steps since the last call, oldest first, and the number of tokens in the skipped ones.

        Synchronises with the device and updates the state's skipped steps and recent losses.

        Raises:
            TrainingError: a number is not finite and bad steps are not skipped, or too many were skipped in a row.
        """
        pending, self._pending = self._pending, []
        values = torch.stack([numbers for _, numbers in pending]).tolist() if pending else []
        good, num_skipped = list[Step](), 0
        for (step, _), numbers in zip(pending, values, strict=True):
            step.loss, step.grad_norm = numbers
            if math.isfinite(step.loss) and math.isfinite(step.grad_norm):
                state.skips_in_a_row = 0
                self._look_for_spike(step, state)
                good.append(step)
            else:
                self._take_fault(step, state)
                num_skipped += step.num_tokens
        return good, num_skipped

    def _take_fault(self, step: Step, state: TrainerState) -> None:
        what, value = ("gradient norm", step.grad_norm) if math.isfinite(step.loss) else ("loss", step.loss)
        saved = ""
        if state.saved_faults < self.config.max_saved_faults:
            state.saved_faults += 1
            path = self.folder / FAULTS_FOLDER / f"step-{step.step:09d}.safetensors"
            gathered = self.processes.gather(step.batches)
            self.processes.run_on_main(lambda: write_batches(path, gathered))
            saved = f", saved in {path}"
        line = f"{what} is {value} at step {step.step} ({self.describe_place(step)}){saved}"
        values = {"epoch": step.epoch, "tokens": state.num_tokens, "what": what, "skipped": self.skips_faults}
        self.write("fault", step.step, values)
        if not self.skips_faults:
            raise TrainingError(
                f"{line}: the weights are as they were before that step; a lower train.learning_rate or "
                "train.precision fp32 may help"
            )
        state.skipped_steps += 1
        state.skips_in_a_row += 1
        if state.skips_in_a_row > self.config.max_skipped_steps:
            raise TrainingError(
                f"{line}: {state.skips_in_a_row} bad steps in a row exceed train.max_skipped_steps "
                f"({self.config.max_skipped_steps}); the weights are as they were before them"
            )
        self.note(f"{line}: the step is skipped")

    def _look_for_spike(self, step: Step, state: TrainerState) -> None:
        """Warn if the loss rises far above the recent ones; once per spike."""
        window = self.config.spike_window
        if not window:
            return
        recent = state.recent_losses
        if len(recent) == window:
            middle = median(recent)
            deviation = MAD_TO_DEVIATION * median(abs(loss - middle) for loss in recent)
            deviations = (step.loss - middle) / max(deviation, self.config.spike_min_deviation)
            was_spike, state.in_spike = state.in_spike, deviations > self.config.spike_threshold
            if state.in_spike and not was_spike:
                values = {"epoch": step.epoch, "tokens": state.num_tokens, "loss": step.loss, "median": middle}
                self.write("spike", step.step, values | {"deviations": deviations})
                self.note(
                    f"the loss spikes: {step.loss:.3f} at step {step.step} ({self.describe_place(step)}), "
                    f"{deviations:.1f} robust deviations above the median {middle:.3f} of the last {window} steps"
                )
        state.recent_losses = [*recent, step.loss][-window:]


def write_batches(path: Path, batches: list[list[Batch]]) -> None:
    """Write each process's batches, as tensors named `processes.0.batches.0.input_ids` and so on."""
    tensors = {
        f"processes.{rank}.batches.{number}.{name}": tensor.contiguous()
        for rank, own in enumerate(batches)
        for number, batch in enumerate(own)
        for name in ("input_ids", "labels", "attention_mask", "resets", "label_weights")
        if (tensor := getattr(batch, name)) is not None
    }
    path.parent.mkdir(exist_ok=True)
    with write_atomically(path) as temporary:
        save_file(tensors, temporary)
