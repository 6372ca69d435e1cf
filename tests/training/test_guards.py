"""Steps whose numbers are not finite stop or are skipped and leave what is needed to study them; spikes warn."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file

from new_llm.data.batches import Batch
from new_llm.training import Trainer, TrainingError, TrainingInterrupted
from new_llm.training.checkpoint import list_checkpoints
from new_llm.training.guards import FAULTS_FOLDER
from new_llm.training.log import read_metrics
from training_cases import equal, list_weights, make_trainer, read_late, stop_at


def spoil(trainer: Trainer, steps: set[int], factor: float = float("nan")) -> dict[str, list]:
    """Multiply the loss of some steps (from 1), and for NaN the memory too; returns what was met."""
    forward, met = trainer._forward, {"batches": [], "weights": []}

    def spoiled(batch: Batch) -> torch.Tensor:
        step = trainer.state.step + 1
        if step not in steps:
            return forward(batch)
        met["batches"].append(batch)
        met["weights"].append(list_weights(trainer.model))
        loss = forward(batch) * factor
        if math.isnan(factor):
            trainer.model._held = [
                held and dataclasses.replace(held, memories=held.memories * factor, norms=held.norms * factor)
                for held in trainer.model._held
            ]
        return loss

    trainer._forward = spoiled
    return met


@pytest.mark.parametrize(("every_steps", "accumulation"), [(1, 2), (4, 1)])
def test_a_fault_that_stops_is_saved_for_study(tmp_path, every_steps, accumulation):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=accumulation)
    read_late(trainer, every_steps)
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
    trainer.model.layers[1].mlp.dense_h_to_4h.bias.register_hook(
        lambda grad: grad * math.inf if trainer.state.step == 2 else grad
    )
    with pytest.raises(TrainingError, match=r"gradient norm is (inf|nan) at step 3"):
        trainer.run()


@pytest.mark.parametrize(("every_steps", "accumulation"), [(1, 2), (4, 1)])
def test_a_skipped_step_changes_nothing_but_the_place(tmp_path, every_steps, accumulation):
    trainer = make_trainer(tmp_path, on_nonfinite="skip", gradient_accumulation_steps=accumulation)
    read_late(trainer, every_steps)
    lines: list[str] = []
    trainer.progress.note = lines.append
    begins = [number for number, rows in enumerate(trainer.plan_epoch(0).resets) if number and rows.any()]
    number = begins[0] // accumulation + 1  # a step in which a row goes on to its next document
    assert number > 1
    met = spoil(trainer, {number})
    step, states = trainer._train_step, []

    def watch(batches: list[Batch]) -> None:
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
    read_late(trainer, every_steps)
    met = spoil(trainer, {2, 3, 5, 6, 7})
    with pytest.raises(TrainingError, match=r"at step 7 .*: 3 steps in a row, over train.max_skipped_steps \(2\)"):
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
