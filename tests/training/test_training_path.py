"""How a training step runs, what its numbers go to, and the learning rate."""

import io
import itertools
import math
import threading
import time
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import load_file

from new_llm.config import TrainConfig
from new_llm.training import Trainer, TrainingError, TrainingInterrupted
from new_llm.training.checkpoint import list_checkpoints
from new_llm.training.guards import FAULTS_FOLDER
from new_llm.training.log import MetricsWriter, TrainingProgress, read_metrics
from new_llm.training.preparation import group_parameters, make_schedule, prefetch_batches
from training_cases import VOCAB, equal, list_weights, make_trainer, read_curve, spoil, stop_at


def test_numbers_read_late_and_batches_made_ahead_change_nothing(tmp_path):
    plain = make_trainer(tmp_path / "plain", prefetch_batches=0, log_every_steps=4)
    other = make_trainer(tmp_path / "other", prefetch_batches=3, log_every_steps=4)
    other.monitor.every_steps = 4  # as on a GPU, whose numbers are read only now and then
    expected, found = plain.run(), other.run()
    assert read_curve(tmp_path / "plain") == read_curve(tmp_path / "other")
    assert (expected.steps, expected.tokens) == (found.steps, found.tokens)
    assert equal(list_weights(plain.model), list_weights(other.model))


@pytest.mark.parametrize("kind", ["pythia", "infini", "selective", "token_memory"])
def test_layers_run_twice_give_the_same_gradients(tmp_path, kind):
    gradients = []
    for checkpointing in (False, True):
        model = make_trainer(tmp_path, kind, gradient_checkpointing=checkpointing).model.train()
        calls = []
        model.layers[0].mlp.register_forward_pre_hook(lambda *arguments, calls=calls: calls.append(1))
        ids = torch.arange(40).view(2, 20) % VOCAB
        for precision in (False, True):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision):
                model.compute_loss(ids, ids, update_memory=True)[0].backward()
            model.reset_memory()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert len(calls) == 2 * model.count_passes() * (2 if checkpointing else 1)
    plain, plain_bf16, twice, twice_bf16 = gradients
    assert len(plain) > 10
    assert equal(plain, twice)
    assert equal(plain_bf16, twice_bf16)


@pytest.mark.slow
def test_compiled_layers_train_to_the_same_losses(tmp_path):
    for compiled in (False, True):
        make_trainer(tmp_path / str(compiled), compile=compiled, num_epochs=1).run()
    assert read_curve(tmp_path / "False") == pytest.approx(read_curve(tmp_path / "True"), rel=1e-4)


def test_a_batch_that_fails_fails_where_it_is_asked_for_and_the_thread_ends():
    class Broken(list):
        def __getitem__(self, number):
            made.append(number)
            return [0, 1][number]

    made: list[int] = []
    with prefetch_batches(Broken(range(50)), 0, 4, pin=False) as batches:
        assert [next(batches), next(batches)] == [0, 1]
        with pytest.raises(IndexError):
            next(batches)
    assert len(made) < 10


def test_the_rate_rises_linearly_then_falls_as_a_half_cosine():
    share = make_schedule(TrainConfig(num_epochs=4, warmup_fraction=0.1, min_lr_ratio=0.1), steps_per_epoch=100)
    assert [share(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert [share(step) for step in (10 + 195, 400, 10_000)] == pytest.approx([0.55, 0.1, 0.1])
    assert make_schedule(TrainConfig(num_epochs=1, warmup_fraction=0.0), steps_per_epoch=10)(0) == 1.0


def test_training_ends_with_its_processor_seconds_and_a_resumed_one_at_the_same_step(tmp_path, monkeypatch):
    """With a clock by which each step takes a second; the cosine ends with the budget, beyond num_epochs."""
    seconds = itertools.count()
    monkeypatch.setattr(time, "process_time", lambda: next(seconds))
    options = {"stop_at": "cpu_seconds", "cpu_seconds": 30, "num_epochs": 1}
    whole = make_trainer(tmp_path / "whole", **options)
    result = whole.run()
    assert (result.steps, result.cpu_seconds) == (30, 30)
    assert result.epochs > 1
    assert whole.scheduler.get_last_lr()[0] == pytest.approx(0.1 * whole.config.learning_rate)
    begun = make_trainer(tmp_path / "resumed", **options)
    stop_at(begun, 13)
    with pytest.raises(TrainingInterrupted):
        begun.run()
    resumed = make_trainer(tmp_path / "resumed", **options)
    assert resumed.run(resume=True).steps == 30
    assert equal(list_weights(resumed.model), list_weights(whole.model))


def test_gates_have_their_own_rate_and_no_decay(tmp_path):
    trainer = make_trainer(tmp_path, options={"num_memory_banks": 2})
    model, config = trainer.model, trainer.config
    groups = {group["name"]: group for group in group_parameters(model, config)}
    attention = model.layers[0].attention
    assert {id(p) for p in groups["gates"]["params"]} == {id(attention.gate), id(attention.bank_weights)}
    assert groups["gates"]["lr"] == config.gate_learning_rate
    assert groups["gates"]["weight_decay"] == groups["undecayed"]["weight_decay"] == 0.0
    assert all(p.dim() >= 2 for p in groups["decayed"]["params"])
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))
    hierarchical = make_trainer(tmp_path, "hierarchical").model
    undecayed = next(g for g in group_parameters(hierarchical, config) if g["name"] == "undecayed")
    known = {id(p) for p in undecayed["params"]}
    assert {id(p) for p in hierarchical.layers[0].attention.expansion_gate.parameters()} <= known


@pytest.mark.filterwarnings("ignore:.*no supported trackers")
def test_a_run_s_metrics_reach_its_tracker(tmp_path, monkeypatch):
    tracker, begun, told = Mock(), [], []

    def begin(self: Accelerator, project: str, **options: object) -> None:
        begun.append(options)
        self.trackers = [tracker]

    monkeypatch.setattr(Accelerator, "init_trackers", begin)
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: told.append((step, values)))
    trainer = make_trainer(tmp_path, trackers=("mlflow",))
    trainer.settings = {"train": {"learning_rate": 1e-4}}
    trainer.run()
    names = {"mlflow": {"run_name": f"{tmp_path.parent.name}/{tmp_path.name}"}}
    assert begun == [{"config": {"train.learning_rate": 1e-4}, "init_kwargs": names}]
    for (step, values), line in zip(told, read_metrics(tmp_path), strict=True):
        assert step == line["step"]
        if line["event"] == "train":
            assert values["train/loss"] == line["loss"]
            assert values["gates/layers.0.0"] == line["gates"]["layers.0"][0]
        else:
            assert values["epoch/validation_loss"] == line["validation_loss"]
    tracker.finish.assert_called_once()


def test_the_live_view_shows_loss_speed_and_memory():
    out = io.StringIO()
    progress = TrainingProgress("infini", Console(file=out, force_terminal=True, width=160), device=torch.device("cpu"))
    progress.begin_epoch(1, 2, 10, 0)
    for step in range(1, 6):
        progress.step(step, 8.0 - step, 1000, 0.5)
    progress.end_epoch({"is_best": True, "train_loss": 2.0, "validation_perplexity": 7.4})
    for words in ("loss ", "2,000 tokens/s", "GiB", "training loss 2.000  validation perplexity 7.4 (best so far)"):
        assert words in out.getvalue()


def test_a_disk_that_tensorboard_can_t_write_to_is_an_error_of_the_next_call_and_nothing_else(tmp_path, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    before = threading.excepthook
    metrics = MetricsWriter(tmp_path)

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", fail)
    metrics.write("train", 1, {"loss": 1.0})
    with pytest.raises(OSError, match="No space left"):
        metrics.close()
    assert threading.excepthook == before
    assert told == []


# Steps whose numbers are not finite stop or are skipped and leave what is needed to study them; spikes warn


@pytest.mark.parametrize(("every_steps", "accumulation"), [(1, 2), (4, 1)])
def test_a_fault_that_stops_is_saved_for_study(tmp_path, every_steps, accumulation):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=accumulation)
    trainer.monitor.every_steps = every_steps
    met = spoil(trainer, {6})
    place = tmp_path / FAULTS_FOLDER / "step-000000006.safetensors"
    with pytest.raises(TrainingError, match=rf"loss is nan at step 6 \(.*\), saved in {place}: the weights are as"):
        trainer.run()
    tensors = load_file(place)
    for number, batch in enumerate(met["batches"]):
        for name in ("input_ids", "labels", "resets"):
            assert torch.equal(tensors[f"processes.0.batches.{number}.{name}"], getattr(batch, name))
    assert len([name for name in tensors if name.endswith("input_ids")]) == accumulation
    (line,) = [line for line in read_metrics(tmp_path) if line["event"] == "fault"]
    assert (line["step"], line["what"], line["skipped"]) == (6, "loss", False)
    assert equal(list_weights(trainer.model), met["weights"][0])
    assert {int(entry["step"]) for entry in trainer.optimizer.optimizer.state.values()} == {5}
    assert list_checkpoints(tmp_path) == []


def test_a_gradient_that_is_not_finite_is_a_fault_too(tmp_path):
    trainer = make_trainer(tmp_path)
    bias = trainer.model.layers[1].mlp.dense_h_to_4h.bias
    bias.register_hook(lambda grad: grad * math.inf if trainer.state.step == 2 else grad)
    with pytest.raises(TrainingError, match=r"gradient norm is (inf|nan) at step 3"):
        trainer.run()


@pytest.mark.parametrize(("every_steps", "accumulation"), [(1, 2), (4, 1)])
def test_a_skipped_step_changes_nothing_but_the_place(tmp_path, every_steps, accumulation):
    trainer = make_trainer(tmp_path, on_nonfinite="skip", gradient_accumulation_steps=accumulation)
    trainer.monitor.every_steps = every_steps
    lines: list[str] = []
    trainer.progress.note = lines.append
    begins = [number for number, rows in enumerate(trainer.plan_epoch(0).resets) if number and rows.any()]
    number = begins[0] // accumulation + 1  # a step in which a row goes on to its next document
    assert number > 1
    met = spoil(trainer, {number})
    step, states = trainer._train_step, []

    def watch(batches) -> None:
        if trainer.state.step in (number - 1, number):
            states.append((trainer.model.get_memory_state(), list_weights(trainer.model)))
        step(batches)

    trainer._train_step = watch
    result = trainer.run()
    (memory, _), (memory_after, weights_after) = states
    assert equal(weights_after, met["weights"][0])
    resets = torch.stack([batch.resets for batch in met["batches"]]).any(0)
    assert resets.any()
    for layer, entry in memory.items():
        entry["memories"][resets] = 0
        assert entry["memories"].abs().sum() > 0
        assert torch.equal(memory_after[layer]["memories"], entry["memories"])
    assert all(bool(weight.isfinite().all()) for weight in list_weights(trainer.model))
    assert trainer.state.skipped_steps == 1
    (line,) = lines
    assert line.startswith(f"loss is nan at step {number} (epoch 1, batch ")
    assert line.endswith(f"saved in {tmp_path / FAULTS_FOLDER / f'step-{number:09d}.safetensors'}: the step is skipped")
    whole = make_trainer(tmp_path / "whole", gradient_accumulation_steps=accumulation).run()
    assert result.steps == whole.steps
    assert result.tokens == whole.tokens - sum(batch.num_targets for batch in met["batches"])
    assert all(math.isfinite(line["loss"]) for line in read_metrics(tmp_path) if line["event"] == "train")


@pytest.mark.parametrize("every_steps", [1, 4])
def test_too_many_skips_in_a_row_stop(tmp_path, every_steps):
    trainer = make_trainer(tmp_path, on_nonfinite="skip", max_skipped_steps=2, max_saved_faults=2)
    trainer.monitor.every_steps = every_steps
    met = spoil(trainer, {2, 3, 5, 6, 7})
    with pytest.raises(TrainingError, match=r"at step 7 .*: 3 bad steps in a row exceed train.max_skipped_steps \(2\)"):
        trainer.run()
    assert equal(list_weights(trainer.model), met["weights"][2])
    assert len(list((tmp_path / FAULTS_FOLDER).iterdir())) == 2


def test_a_spike_warns_once_and_training_goes_on(tmp_path):
    trainer = make_trainer(tmp_path, spike_window=8, num_epochs=4)
    lines: list[str] = []
    trainer.progress.note = lines.append
    spoil(trainer, {15, 16, 30}, factor=9.0)
    trainer.run()
    assert [line.split(":")[0] for line in lines] == ["the loss spikes"] * 2
    assert "at step 15 (epoch 1, " in lines[0]
    spikes = [line for line in read_metrics(tmp_path) if line["event"] == "spike"]
    assert [spike["step"] for spike in spikes] == [15, 30]
    assert spikes[0]["loss"] > 5 * spikes[0]["median"]
    assert spikes[0]["deviations"] > 8


def test_what_guards_remember_goes_on_after_a_resume(tmp_path):
    def make(name: str) -> Trainer:
        trainer = make_trainer(tmp_path / name, on_nonfinite="skip", spike_window=8)
        spoil(trainer, {6, 7, 14})
        spoil(trainer, {15, 17}, factor=9.0)
        return trainer

    make("whole").run()
    begun = make("resumed")
    stop_at(begun, 15)
    with pytest.raises(TrainingInterrupted):
        begun.run()
    resumed = make("resumed")
    resumed.run(resume=True)
    assert resumed.state.skipped_steps == 3
    clock = {"seconds", "cpu_seconds", "tokens_per_second"}
    one, two = (
        [{key: line[key] for key in line.keys() - clock} for line in read_metrics(tmp_path / name)]
        for name in ("whole", "resumed")
    )
    assert one == two
    assert any(line["event"] == "spike" for line in one)
