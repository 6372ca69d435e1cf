"""The training loop: epochs of batches on Accelerate, validation, early stopping, checkpoints."""

import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from new_llm.config import ExperimentConfig
from new_llm.data.batches import Batch, BatchPlan, plan_batches
from new_llm.data.curriculum import CurriculumPlan, plan_curriculum, shape_batches
from new_llm.data.planted_facts import SamplePlanter
from new_llm.data.tokens import TokenSplit
from new_llm.models import TransformerLM
from new_llm.models.held_memory import KeptMemory
from new_llm.models.memory_file import fingerprint_weights
from new_llm.models.model_file import describe_model, save_model
from new_llm.processes import ALONE, Processes, gather_tensor
from new_llm.training.best_weights import restore_best
from new_llm.training.checkpoint import BEST_FOLDER, TrainerState, load_checkpoint, save_checkpoint
from new_llm.training.fault_record import list_parameters, measure_norms
from new_llm.training.guards import StepGuard
from new_llm.training.metric_lines import describe_epoch, describe_steps
from new_llm.training.metrics import MetricsWriter, SilentMetrics, read_peak_memory, reset_peak_memory
from new_llm.training.optimizer import make_scheduler
from new_llm.training.outcome import TrainingInterrupted, TrainingResult
from new_llm.training.prefetch import prefetch_batches
from new_llm.training.preparation import prepare_training
from new_llm.training.progress import TrainingProgress
from new_llm.training.readout import StepReadout
from new_llm.training.sharding import gather_model
from new_llm.training.signals import StopSignals, catch_stop_signals
from new_llm.training.trackers import Trackers, open_trackers


class Trainer:
    """Trains one model on one split.

    Args:
        model: the model, on the CPU.
        train: the training documents.
        config: the experiment; its data and train sections are used.
        folder: the model's folder in the run.
        validate: measures the validation loss (nats a token) of the model as it stands.
        device: where to train.
        precision: fp32 or bf16 (autocast).
        progress: shows how it goes.
        processes: those that train the model together; each reads its rows of every batch.
        planter: plants facts to recall into the samples.

    Raises:
        UserError: the processes do not divide the batch, or the weights can't be shared out.
    """

    def __init__(
        self,
        model: TransformerLM,
        train: TokenSplit,
        config: ExperimentConfig,
        folder: Path,
        *,
        validate: Callable[[TransformerLM], float],
        device: torch.device,
        precision: str,
        progress: TrainingProgress,
        processes: Processes = ALONE,
        planter: SamplePlanter | None = None,
    ) -> None:
        self.model = model
        self.train_split = train
        self.config = config
        self.folder = folder
        self.validate = validate
        self.progress = progress
        self.processes = processes
        self.planter = planter
        self.num_batches = len(self._plan_samples(0, config.data.segments_per_sample))
        self.steps_per_epoch = -(-self.num_batches // config.train.gradient_accumulation_steps)
        parts = prepare_training(model, config.train, device, precision, processes)
        self.accelerator, self.total_loss, self.optimizer = parts.accelerator, parts.total_loss, parts.optimizer
        self.structure = parts.structure
        self.device = self.accelerator.device
        self.scheduler = make_scheduler(self.optimizer.optimizer, config.train, self.steps_per_epoch)
        self.state = TrainerState()
        # On a CPU to read a number costs nothing; a GPU would have to be waited for.
        steps = 1 if self.device.type == "cpu" else config.train.log_every_steps
        self.skips_faults = config.train.on_nonfinite == "skip"
        self.readout = StepReadout(
            self.optimizer.optimizer,
            self.device,
            every_steps=steps,
            skips_faults=self.skips_faults,
            add_up=processes.sum_on_device,
        )
        self.step_loss = self.grad_norm = float("nan")

    def run(self, *, resume: bool = False) -> TrainingResult:
        """Train until the last epoch or until patience runs out.

        Args:
            resume: go on from the last checkpoint where there is one.

        Raises:
            TrainingError: a loss or gradient is not finite.
            TrainingInterrupted: a signal asked to stop; a checkpoint has been written.
            UserError: the checkpoint is broken.
        """
        if resume:
            parts = self.model, self.optimizer.optimizer, self.scheduler
            loaded = load_checkpoint(self.folder, *parts, warn=self.progress.note, processes=self.processes)
            if loaded is not None:
                self.state = self.processes.run_on_main(lambda: self._restore_best(loaded))
        reset_peak_memory(self.device)
        run = f"{self.folder.parent.name}/{self.folder.name}"
        names = self.config.train.trackers
        with open_trackers(self.accelerator, names, run, self.config.to_dict()) as trackers:
            metrics = self._open_metrics(trackers)
            self.guard = self._make_guard(metrics)
            try:
                with (
                    catch_stop_signals(repeats_end=self.processes.count == 1) as is_asked,
                    self.processes.agree_to_stop(is_asked) as stop,
                ):
                    while self.state.epoch < self.config.train.num_epochs and not self.state.stopped_early:
                        self._train_epoch(metrics, stop)
                        self._end_epoch(metrics, is_asked)
                # Too late for a step to see it. Asked once the signals are nobody's to catch any more: none is lost.
                if any(self.processes.gather(is_asked())):
                    raise self._interrupted()
            finally:
                metrics.close()
        state = self.state
        return TrainingResult(
            epochs=state.epoch,
            best_epoch=state.best_epoch,
            steps=state.step,
            tokens=state.num_tokens,
            seconds=state.seconds,
            tokens_per_second=state.num_tokens / max(state.seconds, 1e-9),
            peak_memory_bytes=max(self.processes.gather(read_peak_memory(self.device))),
            stopped_early=state.stopped_early,
        )

    def _plan(self, epoch: int) -> BatchPlan | CurriculumPlan:
        """This process's rows of an epoch's batches."""
        data = self.config.data
        plan = functools.partial(self._plan_samples, epoch)
        if not data.segment_curriculum:
            return plan(data.segments_per_sample)
        return plan_curriculum(data.segment_curriculum, epoch, self.config.train.num_epochs, self.num_batches, plan)

    def _plan_samples(self, epoch: int, segments: int) -> BatchPlan:
        """An epoch in samples of so many segments, at the tokens a batch that whole samples have."""
        data, train = self.config.data, self.config.train
        shape = shape_batches(data, train.batch_size, segments)
        plan = plan_batches(
            self.train_split,
            **shape._asdict(),
            order=data.order,
            seed=self.config.seed,
            epoch=epoch,
            planter=self.planter,
            answer_weight=train.answer_weight,
        )
        return plan.take_rows(self.processes.slice_rows(shape.batch_size))

    def _open_metrics(self, trackers: Trackers) -> MetricsWriter | SilentMetrics:
        with self.processes.agree():
            if not self.processes.is_main:
                return SilentMetrics()
            return MetricsWriter(self.folder, self.state.metrics_lines, self.state.step, trackers)

    def _make_guard(self, metrics: MetricsWriter | SilentMetrics) -> StepGuard:
        seed, num_batches = self.config.seed, self.num_batches
        return StepGuard(
            self.config.train,
            self.folder,
            {parameter: name for name, parameter in self.model.named_parameters()},
            self.optimizer.optimizer,
            where=lambda step: f"epoch {step.epoch}, batch {step.batch} of {num_batches}, seed {seed}",
            processes=self.processes,
            is_sharded=self.structure is not None,
            write=metrics.write,
            note=self.progress.note,
        )

    def _restore_best(self, loaded: TrainerState) -> TrainerState:
        return restore_best(self.folder, self.structure or describe_model(self.model), loaded, self.progress.note)

    @property
    def _carries_memory(self) -> bool:
        return self.config.data.order == "stream"

    def _train_epoch(self, metrics: MetricsWriter | SilentMetrics, stop: Callable[[], bool]) -> None:
        state, train = self.state, self.config.train
        plan = self._plan(state.epoch)
        self.model.train()
        if state.batch == 0:
            self.model.reset_memory(train.batch_size // self.processes.count if self._carries_memory else None)
            state.epoch_loss, state.epoch_tokens = 0.0, 0
        self.progress.begin_epoch(state.epoch + 1, train.num_epochs, self.steps_per_epoch, state.step)
        with prefetch_batches(plan, state.batch, train.prefetch_batches, pin=self.device.type == "cuda") as batches:
            while state.batch < len(plan):
                numbers = range(state.batch, min(state.batch + train.gradient_accumulation_steps, len(plan)))
                self._train_step([next(batches) for _ in numbers])
                state.batch = numbers.stop
                self._after_step(metrics, stop, is_last=state.batch == len(plan))

    def _after_step(self, metrics: MetricsWriter | SilentMetrics, stop: Callable[[], bool], *, is_last: bool) -> None:
        """Read out, log and save where it is time for it."""
        state, train = self.state, self.config.train
        logs = state.step % train.log_every_steps == 0
        # An epoch's last step is followed by validation, which writes its own checkpoint.
        stops = stop()
        saves = stops or (state.step % train.checkpoint_every_steps == 0 and not is_last)
        if logs or saves or is_last:
            self._read_out()
        if logs and state.window_tokens:
            self._log(metrics)
        if saves:
            self._save(metrics)
        if stops:
            raise self._interrupted()

    def _interrupted(self) -> TrainingInterrupted:
        where = f"interrupted at step {self.state.step}; the checkpoint is in {self.folder}"
        return TrainingInterrupted(where, self.folder)

    def _train_step(self, batches: list[Batch]) -> None:
        """One optimizer step over some batches: the mean loss of all their tokens, whoever reads them."""
        state = self.state
        begin = time.perf_counter()
        num_tokens = sum(batch.num_targets for batch in batches)
        before = self._keep_memory(batches) if self.skips_faults and self._carries_memory else None
        losses: list[Tensor] = []
        for number, batch in enumerate(batches):
            is_last = number + 1 == len(batches)
            with self._synchronise(is_last):
                loss = self._forward(batch) / max(num_tokens, 1)
                self.accelerator.backward(loss * self.processes.count)  # of the processes' gradients the mean is taken
            losses.append(loss.detach())
        grad_norms = measure_norms([cast(Tensor, p.grad) for p in list_parameters(self.optimizer.optimizer)])
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.train.max_grad_norm)
        assert norm is not None
        is_read = self.readout.add(
            losses, gather_tensor(norm), num_tokens, state.step + 1, state.epoch + 1, state.batch
        )
        self.guard.keep(batches, grad_norms)
        if is_read:
            self._read_out()
        if before is not None:
            self.model.restore_memory(before, self.readout.has_failed)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        state.step += 1
        state.num_tokens += num_tokens
        state.window_tokens += num_tokens
        state.epoch_tokens += num_tokens
        seconds = time.perf_counter() - begin
        state.seconds += seconds
        state.window_seconds += seconds
        self.progress.step(state.step, self.step_loss if is_read else None, num_tokens, seconds)

    def _forward(self, batch: Batch) -> Tensor:
        if self._carries_memory:
            self.model.reset_rows(batch.resets)
        else:
            self.model.reset_memory()
        parts = (batch.input_ids, batch.labels, batch.attention_mask, batch.label_weights)
        return self.total_loss(*map(self._move, parts), self._carries_memory)

    def _move(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.device, non_blocking=True)

    def _synchronise(self, is_last: bool) -> AbstractContextManager[Any]:
        # With weights shared out a whole gradient would have to be kept, so that each batch's is shared out at once.
        return nullcontext() if is_last or self.structure is not None else self.accelerator.no_sync(self.total_loss)

    def _read_out(self) -> None:
        """Take in the numbers of the steps since the last read-out; steps that are skipped have trained on nothing.

        Raises:
            TrainingError: see `StepGuard.judge`.
        """
        state = self.state
        steps = self.readout.take()
        good = self.guard.judge(steps, state)
        num_skipped = sum(step.num_tokens for step in steps) - sum(step.num_tokens for step in good)
        state.num_tokens -= num_skipped
        state.window_tokens -= num_skipped
        state.epoch_tokens -= num_skipped
        for step in good:
            state.window_loss += step.loss * step.num_tokens
            state.epoch_loss += step.loss * step.num_tokens
            self.step_loss, self.grad_norm = step.loss, step.grad_norm

    def _keep_memory(self, batches: list[Batch]) -> KeptMemory:
        """The memory that goes on if the step is skipped: as it is now, but empty where a new document has begun."""
        now = self.model.keep_memory()
        self.model.reset_rows(torch.stack([batch.resets for batch in batches]).any(0))
        kept = self.model.keep_memory()
        self.model.restore_memory(now)
        return kept

    def _log(self, metrics: MetricsWriter | SilentMetrics) -> None:
        state = self.state
        values = describe_steps(state, self.model, float(self.scheduler.get_last_lr()[0]), self.grad_norm)
        metrics.write("train", state.step, values)
        state.window_loss, state.window_tokens, state.window_seconds = 0.0, 0, 0.0

    def _end_epoch(self, metrics: MetricsWriter | SilentMetrics, signals: StopSignals) -> None:
        """Validate, write a checkpoint, and keep the best weights."""
        state, patience = self.state, self.config.train.patience
        model = gather_model(self.model, self.structure)
        try:
            # Several processes validate together, and stop together after it.
            with signals.interrupt() if self.processes.count == 1 else nullcontext():
                loss = self.validate(model)
        except KeyboardInterrupt:
            self._save(metrics)
            raise self._interrupted() from None
        state.epoch += 1
        state.batch = 0
        is_best = state.best_loss is None or loss < state.best_loss
        if is_best:
            state.best_loss, state.best_epoch, state.epochs_without_gain = loss, state.epoch, 0
            state.best_fingerprint = self.processes.run_on_main(lambda: fingerprint_weights(model))
        else:
            state.epochs_without_gain += 1
            state.stopped_early = bool(patience) and state.epochs_without_gain >= patience
        values = describe_epoch(state, loss, is_best=is_best)
        metrics.write("epoch", state.step, values)
        self._save(metrics)
        if is_best:  # after the checkpoint, which holds the same weights: see restore_best
            self.processes.run_on_main(lambda: save_model(model, self.folder / BEST_FOLDER))
        self.progress.end_epoch(values)

    def _save(self, metrics: MetricsWriter | SilentMetrics) -> None:
        """Write a checkpoint, and first the metrics of the steps that it holds."""
        metrics.sync()
        self.state.metrics_lines = metrics.num_lines
        parts = self.model, self.optimizer.optimizer, self.scheduler, self.state
        save_checkpoint(self.folder, *parts, keep=self.config.train.keep_checkpoints, processes=self.processes)
