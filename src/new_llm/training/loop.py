"""The training loop: epochs of batches, validation, early stopping and checkpoints, on Accelerate."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from new_llm.config import DataConfig, TrainConfig
from new_llm.data.batches import (
    Batch,
    BatchPlan,
    JoinedPlan,
    count_singles,
    plan_batches,
    plan_curriculum,
    shape_batches,
)
from new_llm.data.recall_facts import SamplePlanter
from new_llm.data.tokenizer import TokenSplit
from new_llm.models import TransformerLM
from new_llm.models.held_memory import KeptMemory
from new_llm.models.model_file import describe_model, save_model
from new_llm.models.state import map_tensors
from new_llm.models.tensor_files import fingerprint_weights
from new_llm.processes import ALONE, Processes, gather_tensor
from new_llm.training.checkpoint import BEST_FOLDER, TrainerState, load_checkpoint, restore_best, save_checkpoint
from new_llm.training.devices import (
    StopSignals,
    TrainingInterrupted,
    catch_stop_signals,
    choose_precision,
    read_peak_memory,
    reset_peak_memory,
)
from new_llm.training.guards import Step, StepMonitor
from new_llm.training.log import MetricsWriter, TrainingProgress, open_trackers
from new_llm.training.preparation import (
    LossFunction,
    ShardedModel,
    gather_model,
    make_schedule,
    prefetch_batches,
    prepare_training,
)


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a training run; see `TrainerState` for the counters."""

    epochs: int
    best_epoch: int
    steps: int
    tokens: int
    seconds: float
    cpu_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    stopped_early: bool


@dataclass(eq=False)
class Trainer:
    """Trains one model on one split.

    Raises:
        UserError: the batch size is not a multiple of the number of processes, or the weights can't be sharded.
    """

    model: TransformerLM
    split: TokenSplit
    data: DataConfig
    """How to cut the split into samples, and in which order to read them."""
    config: TrainConfig
    folder: Path
    """The model's folder in the run."""
    _: KW_ONLY
    validate: Callable[[Any], float]
    """Returns the validation loss (nats per token) of the model, which is passed as a `ShardedModel` if sharded."""
    measure: Callable[[TransformerLM], dict[str, Any]] | None = None
    """Returns further measurements during training, as plain values for a "checkpoint" event in `metrics.jsonl`."""
    checkpoints: Sequence[float] = ()
    """The shares of the training (0 to 1) after which to call `measure`."""
    device: torch.device
    progress: TrainingProgress
    seed: int = 0
    loss_fn: LossFunction | None = None
    """Returns a batch's loss, summed over its predicted tokens; None: `model.total_loss`."""
    processes: Processes = ALONE
    """The processes that train the model together; each reads its own rows of every batch."""
    planter: SamplePlanter | None = None
    """Plants facts to recall in the samples."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The run's configuration, for trackers to record."""

    def __post_init__(self) -> None:
        data, config = self.data, self.config
        self.carries_memory = data.order == "stream"
        self.num_batches = len(self._plan_samples(0, data.segments_per_sample))
        self.steps_per_epoch = math.ceil(self.num_batches / config.gradient_accumulation_steps)
        self.batches_per_step = config.gradient_accumulation_steps * (2 if data.mixed_samples else 1)
        precision = choose_precision(config.precision, self.device)
        loss_fn = self.loss_fn or self._compute_loss
        prepared = prepare_training(self.model, loss_fn, config, self.device, precision, self.processes)
        self.accelerator, self.batch_loss, self.optimizer, self.structure = prepared
        self.read_model = ShardedModel(prepared, self.model, self.processes) if prepared.structure else self.model
        self.device = self.accelerator.device
        self.state = TrainerState()
        read_progress = self._share_spent if config.stop_at == "cpu_seconds" else None
        schedule = make_schedule(config, self.steps_per_epoch, read_progress)
        self.scheduler = LambdaLR(self.optimizer.optimizer, schedule)
        self.metrics: MetricsWriter | None = None  # stays None on all but the main process
        self.monitor = StepMonitor(
            self.optimizer.optimizer,
            config,
            self.folder,
            device=self.device,
            processes=self.processes,
            describe_place=lambda at: f"epoch {at.epoch}, batch {at.batch} of {self.num_batches}, seed {self.seed}",
            write=self._write,
            note=lambda line: self.progress.note(line),
        )
        self.step_loss = self.grad_norm = math.nan

    def run(self, *, resume: bool = False) -> TrainingResult:
        """Train until the last epoch, or until processor seconds or patience run out.

        Args:
            resume: continue from the last checkpoint, if there is one.

        Raises:
            TrainingError: a loss or gradient is not finite.
            TrainingInterrupted: a stop signal arrived; a checkpoint has been written.
            UserError: the checkpoint is broken.
        """
        if resume:
            self._resume()
        reset_peak_memory(self.device)
        with self._open_metrics(), catch_stop_signals(repeats_end=self.processes.count == 1) as is_asked:
            while not self._is_done():
                self._train_epoch(is_asked)
                self._end_epoch(is_asked)
        # A signal may have arrived after the last step's check.
        if self.processes.any(is_asked()):
            raise self._interrupted()
        state = self.state
        return TrainingResult(
            epochs=state.epoch,
            best_epoch=state.best_epoch,
            steps=state.step,
            tokens=state.num_tokens,
            seconds=state.seconds,
            cpu_seconds=state.cpu_seconds,
            tokens_per_second=state.num_tokens / max(state.seconds, 1e-9),
            peak_memory_bytes=max(self.processes.gather(read_peak_memory(self.device))),
            stopped_early=state.stopped_early,
        )

    def _is_done(self) -> bool:
        state, config = self.state, self.config
        is_over = self._share_spent() >= 1 if config.stop_at == "cpu_seconds" else state.epoch >= config.num_epochs
        return state.stopped_early or is_over

    def _share_spent(self) -> float:
        """Return the share of the training that is done, in processor seconds if they end it, else in steps."""
        config, state = self.config, self.state
        if config.stop_at == "cpu_seconds":
            return state.cpu_seconds / config.cpu_seconds
        return state.step / (self.steps_per_epoch * config.num_epochs)

    # Batches

    def plan_epoch(self, epoch: int) -> BatchPlan | JoinedPlan:
        """Plan an epoch's batches, with this process's rows."""
        data = self.data
        plan = functools.partial(self._plan_samples, epoch)
        if data.mixed_samples:
            singles = count_singles(data, self.config.batch_size)
            plans = plan(data.segments_per_sample, self.config.batch_size - singles), plan(1, singles)
            return JoinedPlan(tuple((part, step) for step in range(self.num_batches) for part in plans))
        if not data.segment_curriculum:
            return plan(data.segments_per_sample)
        return plan_curriculum(data.segment_curriculum, epoch, self.config.num_epochs, self.num_batches, plan)

    def _plan_samples(self, epoch: int, segments: int, batch_size: int | None = None) -> BatchPlan:
        """Plan an epoch of samples of `segments` segments; a batch has as many tokens as `batch_size` whole samples."""
        shape = shape_batches(self.data, batch_size or self.config.batch_size, segments)
        plan = plan_batches(
            self.split,
            **shape._asdict(),
            order=self.data.order,
            seed=self.seed,
            epoch=epoch,
            planter=self.planter,
            planted_weights=(self.config.statement_weight, self.config.answer_weight),
        )
        return plan.take_rows(self.processes.slice_rows(shape.batch_size))

    # Epochs and steps

    def _train_epoch(self, is_asked: StopSignals) -> None:
        state, config = self.state, self.config
        plan = self.plan_epoch(state.epoch)
        self.model.train()
        if state.batch == 0:
            self.model.reset_memory(config.batch_size // self.processes.count if self.carries_memory else None)
            state.epoch_loss, state.epoch_tokens = 0.0, 0
        num_epochs = max(config.num_epochs, state.epoch + 1)  # there may be more if processor seconds end training
        self.progress.begin_epoch(state.epoch + 1, num_epochs, self.steps_per_epoch, state.step)
        with prefetch_batches(plan, state.batch, config.prefetch_batches, pin=self.device.type == "cuda") as batches:
            is_last = state.batch == len(plan)
            while not is_last:
                numbers = range(state.batch, min(state.batch + self.batches_per_step, len(plan)))
                before = self._share_spent()
                self._train_step([next(batches) for _ in numbers])
                state.batch = numbers.stop
                is_last = state.batch == len(plan) or (config.stop_at == "cpu_seconds" and self._is_done())
                if any(before < share <= self._share_spent() for share in self.checkpoints):
                    self._measure()  # before `_after_step`, so that a checkpoint counts its metrics line
                self._after_step(is_asked, is_last=is_last)

    def _train_step(self, batches: list[Batch]) -> None:
        """Take one optimizer step on the mean loss over all tokens of the batches, on all processes."""
        state = self.state
        begin, cpu_begin = time.perf_counter(), time.process_time()
        num_tokens = sum(batch.num_targets for batch in batches)
        before = self._keep_memory(batches) if self.monitor.skips_faults and self.carries_memory else None
        losses: list[Tensor] = []
        for number, batch in enumerate(batches):
            # If weights are sharded, reduce after every batch: unreduced gradients are as large as the whole weights.
            reduces = number + 1 == len(batches) or self.structure is not None
            with nullcontext() if reduces else self.accelerator.no_sync(self.batch_loss):
                loss = self._forward(batch) / max(num_tokens, 1)
                self.accelerator.backward(loss * self.processes.count)  # undoes the averaging over processes
            losses.append(loss.detach())
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        assert norm is not None
        step = Step(state.step + 1, state.epoch + 1, state.batch, num_tokens, batches)
        is_read = self.monitor.add(step, losses, gather_tensor(norm))
        if is_read:
            self._read_numbers()
        if before is not None:
            self.model.restore_memory(before, self.monitor.has_failed)
        self.optimizer.step()
        cpu_seconds = time.process_time() - cpu_begin
        if self.config.stop_at == "cpu_seconds":  # all processes must agree when to stop
            state.cpu_seconds += sum(self.processes.gather(cpu_seconds))
        else:
            state.cpu_seconds += cpu_seconds * self.processes.count
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
        if self.carries_memory:
            self.model.reset_rows(batch.resets)
        else:
            self.model.reset_memory()
        sent = map_tensors(batch, lambda tensor: tensor.to(self.device, non_blocking=True))
        # The host reads mask and resets; on a GPU that would synchronise.
        return self.batch_loss(replace(sent, attention_mask=batch.attention_mask, resets=batch.resets))

    def _compute_loss(self, model: TransformerLM, batch: Batch) -> Tensor:
        return model.total_loss(
            batch.input_ids,
            batch.labels,
            batch.attention_mask,
            label_weights=batch.label_weights,
            update_memory=self.carries_memory,
        )

    def _keep_memory(self, batches: list[Batch]) -> KeptMemory:
        """Return the memory to continue from if the step is skipped: the current one, reset where a document begins."""
        now = self.model.keep_memory()
        self.model.reset_rows(torch.stack([batch.resets for batch in batches]).any(0))
        kept = self.model.keep_memory()
        self.model.restore_memory(now)
        return kept

    def _after_step(self, is_asked: StopSignals, *, is_last: bool) -> None:
        """Read numbers, log and save when due; stop if a signal has arrived."""
        state, config = self.state, self.config
        logs = state.step % config.log_every_steps == 0
        stops = self.processes.any(is_asked())
        # After an epoch's last step, `_end_epoch` writes a checkpoint.
        saves = stops or (state.step % config.checkpoint_every_steps == 0 and not is_last)
        if logs or saves or is_last:
            self._read_numbers()
        if logs and state.window_tokens:
            self._log_steps()
        if saves:
            self._save()
        if stops:
            raise self._interrupted()

    def _read_numbers(self) -> None:
        """Update the counters by the steps since the last reading, leaving out skipped ones."""
        state = self.state
        good, num_skipped = self.monitor.read(state)
        state.num_tokens -= num_skipped
        state.window_tokens -= num_skipped
        state.epoch_tokens -= num_skipped
        for step in good:
            state.window_loss += step.loss * step.num_tokens
            state.epoch_loss += step.loss * step.num_tokens
            self.step_loss, self.grad_norm = step.loss, step.grad_norm

    def _measure(self) -> None:
        assert self.measure is not None
        self._read_numbers()
        state = self.state
        values = {"share": self._share_spent(), "tokens": state.num_tokens, "seconds": state.seconds}
        found = self.measure(gather_model(self.model, self.structure))
        self._write("checkpoint", state.step, values | {"cpu_seconds": state.cpu_seconds, "evaluation": found})

    def _end_epoch(self, signals: StopSignals) -> None:
        """Validate, write a checkpoint, and save the weights if they are the best so far."""
        state, patience = self.state, self.config.patience
        try:
            # Several processes validate together and can only stop together afterwards.
            with signals.interrupt() if self.processes.count == 1 else nullcontext():
                loss = self.validate(self.read_model)
        except KeyboardInterrupt:
            self._save()
            raise self._interrupted() from None
        state.epoch += 1
        state.batch = 0
        best = None
        if state.best_loss is None or loss < state.best_loss:
            state.best_loss, state.best_epoch, state.epochs_without_gain = loss, state.epoch, 0
            best = gather_model(self.model, self.structure, on_host=True)
            state.best_fingerprint = self.processes.run_on_main(lambda: fingerprint_weights(best))
        else:
            state.epochs_without_gain += 1
            state.stopped_early = bool(patience) and state.epochs_without_gain >= patience
        values = {
            "epoch": state.epoch,
            "tokens": state.num_tokens,
            "train_loss": state.epoch_loss / max(state.epoch_tokens, 1),
            "validation_loss": loss,
            "validation_perplexity": float(torch.tensor(loss, dtype=torch.float64).exp()),
            "seconds": state.seconds,
            "cpu_seconds": state.cpu_seconds,
            "is_best": best is not None,
        }
        self._write("epoch", state.step, values)
        self._save()
        if best is not None:  # after the checkpoint, which contains the same weights: see restore_best
            self.processes.run_on_main(lambda: save_model(best, self.folder / BEST_FOLDER))
        self.progress.end_epoch(values)

    # Metrics and checkpoints

    @contextmanager
    def _open_metrics(self) -> Iterator[None]:
        run, state = f"{self.folder.parent.name}/{self.folder.name}", self.state
        with open_trackers(self.accelerator, self.config.trackers, run, self.settings):
            with self.processes.agree():
                if self.processes.is_main:
                    self.metrics = MetricsWriter(self.folder, state.metrics_lines, state.step, self.accelerator)
            try:
                yield
            finally:
                if self.metrics is not None:
                    self.metrics.close()

    def _write(self, event: str, step: int, values: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(event, step, values)

    def _log_steps(self) -> None:
        state = self.state
        values: dict[str, Any] = {
            "epoch": state.epoch + 1,
            "batch": state.batch,
            "share": self._share_spent(),
            "tokens": state.num_tokens,
            "loss": state.window_loss / max(state.window_tokens, 1),
            "learning_rate": float(self.scheduler.get_last_lr()[0]),
            "grad_norm": self.grad_norm,
            "seconds": state.seconds,
            "tokens_per_second": state.window_tokens / max(state.window_seconds, 1e-9),
            "gates": self.model.gate_values(),
        }
        if alphas := self.model.alpha_values():
            values["alpha"] = alphas
        self._write("train", state.step, values)
        state.window_loss, state.window_tokens, state.window_seconds = 0.0, 0, 0.0

    def _save(self) -> None:
        """Flush the metrics, then write a checkpoint."""
        if self.metrics is not None:
            self.metrics.sync()
            self.state.metrics_lines = self.metrics.num_lines
        parts = self.model, self.optimizer.optimizer, self.scheduler, self.state
        save_checkpoint(self.folder, *parts, keep=self.config.keep_checkpoints, processes=self.processes)

    def _resume(self) -> None:
        """Continue from the last checkpoint, if there is one, and make sure that the best weights exist."""
        parts = self.model, self.optimizer.optimizer, self.scheduler
        warn = self.progress.note
        loaded = load_checkpoint(self.folder, *parts, warn=warn, processes=self.processes)
        if loaded is not None:
            structure = self.structure or describe_model(self.model)
            self.state = self.processes.run_on_main(lambda: restore_best(self.folder, structure, loaded, warn))
            # Patience and length may have been changed since.
            self.state.stopped_early = bool(self.config.patience) and loaded.epochs_without_gain >= self.config.patience
            for group, rate in zip(self.optimizer.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
                group["lr"] = rate * self.scheduler.lr_lambdas[0](self.state.step)

    def _interrupted(self) -> TrainingInterrupted:
        return TrainingInterrupted(
            f"interrupted at step {self.state.step}; the checkpoint is in {self.folder}", self.folder
        )
