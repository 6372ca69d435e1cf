"""Watching over the numbers of steps: a non-finite one stops or skips its step and is saved, a spike warns."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from new_llm.config import TrainConfig
from new_llm.data.batches import Batch
from new_llm.processes import Processes
from new_llm.training.checkpoint import TrainerState
from new_llm.training.fault_record import describe_norms, write_fault
from new_llm.training.outcome import TrainingError
from new_llm.training.readout import StepFacts

MAD_TO_DEVIATION = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""


@dataclass(frozen=True)
class KeptStep:
    """What a step leaves until its numbers are read.

    Attributes:
        batches: its batches, as the host has them.
        grad_norms: of its gradients before clipping, one for each parameter that has a gradient, on the device.
    """

    batches: list[Batch]
    grad_norms: Tensor


class StepGuard:
    """Judges steps as their numbers are read.

    Args:
        config: the training's.
        folder: the model's folder in the run, for `faults/`.
        names: of the parameters, by the parameter.
        optimizer: with the parameters' groups.
        where: says of a step where it was: epoch, batch and seed.
        processes: those that train together.
        is_sharded: whether each holds a share of the weights.
        write: takes a line for the metrics.
        note: takes a line for the console.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        names: dict[Tensor, str],
        optimizer: Optimizer,
        *,
        where: Callable[[StepFacts], str],
        processes: Processes,
        is_sharded: bool,
        write: Callable[[str, int, dict[str, Any]], None],
        note: Callable[[str], None],
    ) -> None:
        self.config = config
        self.folder = folder
        self.names = names
        self.optimizer = optimizer
        self.where = where
        self.processes = processes
        self.is_sharded = is_sharded
        self.write = write
        self.note = note
        self._kept: list[KeptStep] = []

    def keep(self, batches: list[Batch], grad_norms: Tensor) -> None:
        """Keep a step's batches and norms until `judge` is given its numbers."""
        self._kept.append(KeptStep(batches, grad_norms))

    def judge(self, steps: Iterable[StepFacts], state: TrainerState) -> list[StepFacts]:
        """The steps that count, in order: their losses are finite, and their updates have been made.

        Args:
            steps: all since the last call, in order.
            state: the counters; those of skips and of recent losses are changed.

        Raises:
            TrainingError: a loss or gradient is not finite, and steps are not to be skipped, or too many have been.
        """
        kept, self._kept = self._kept, []
        good = list[StepFacts]()
        for step, remains in zip(steps, kept, strict=True):
            if math.isfinite(step.loss) and math.isfinite(step.grad_norm):
                state.skips_in_a_row = 0
                self._look_for_spike(step, state)
                good.append(step)
            else:
                self._take_fault(step, remains, state)
        return good

    def _take_fault(self, step: StepFacts, remains: KeptStep, state: TrainerState) -> None:
        what, value = ("gradient norm", step.grad_norm) if math.isfinite(step.loss) else ("loss", step.loss)
        place = self._save(step, remains, state)
        line = f"{what} is {value} at step {step.step} ({self.where(step)}){place}"
        if self.config.on_nonfinite == "stop":
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

    def _save(self, step: StepFacts, remains: KeptStep, state: TrainerState) -> str:
        """Write down the step, as long as there are few such; where, for messages."""
        if state.saved_faults >= self.config.max_saved_faults:
            return ""
        norms = describe_norms(self.optimizer, self.names, remains.grad_norms, self.processes, self.is_sharded)
        batches = self.processes.gather_on_main(remains.batches)
        state.saved_faults += 1
        path = self.processes.run_on_main(lambda: write_fault(self.folder, step, batches, norms))
        return f", saved in {path}"

    def _look_for_spike(self, step: StepFacts, state: TrainerState) -> None:
        """Warn when a loss rises far above the recent ones, and again only after it has come back."""
        window = self.config.spike_window
        if window:
            recent = state.recent_losses
            if len(recent) == window:
                middle = median(recent)
                deviation = MAD_TO_DEVIATION * median(abs(loss - middle) for loss in recent)
                deviations = (step.loss - middle) / max(deviation, self.config.spike_min_deviation)
                is_spike = deviations > self.config.spike_threshold
                if is_spike and not state.in_spike:
                    self._tell_spike(step, state, middle, deviations)
                state.in_spike = is_spike
            state.recent_losses = [*recent, step.loss][-window:]

    def _tell_spike(self, step: StepFacts, state: TrainerState, middle: float, deviations: float) -> None:
        values = {"epoch": step.epoch, "tokens": state.num_tokens, "loss": step.loss, "median": middle}
        self.write("spike", step.step, values | {"deviations": deviations})
        self.note(
            f"the loss spikes: {step.loss:.3f} at step {step.step} ({self.where(step)}), {deviations:.1f} robust "
            f"deviations above the median {middle:.3f} of the last {self.config.spike_window} steps"
        )
