"""An experiment from its configuration to its run folder."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from new_llm.config import UserError
from new_llm.data.dataset import prepare_data
from new_llm.experiments import run_experiment
from new_llm.experiments.config import ExperimentConfig
from new_llm.models import ModelType, load_model
from new_llm.report import write_report
from new_llm.report.results import load_results
from new_llm.training import Trainer
from new_llm.training.log import read_metrics


def run(config: ExperimentConfig, models: list[str], **options: Any) -> dict[str, Any]:
    return run_experiment(models, config, console=Console(file=io.StringIO()), write_report=write_report, **options)


def curve(results: dict[str, Any], model: int = 0) -> list[tuple[Any, ...]]:
    """Everything of a learning curve that does not depend on the clock."""
    training = results["models"][model]["training"]
    steps = [(line["step"], line["loss"], line["grad_norm"], line["learning_rate"]) for line in training["steps_log"]]
    return steps + [(line["epoch"], line["train_loss"], line["validation_loss"]) for line in training["epochs_log"]]


def renamed(config: ExperimentConfig, name: str, **changes: Any) -> ExperimentConfig:
    return dataclasses.replace(config, name=name, **changes)


def test_a_run_folder_holds_all_that_the_design_names(tiny: ExperimentConfig) -> None:
    results = run(tiny, list(ModelType))
    folder = Path(results["folder"])
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "config.yaml",
        "data.json",
        "environment.json",
        "figures",
        "report.html",
        "results.json",
        "tokenizer.json",
        *ModelType,
    }
    stored = load_results(folder / "results.json")
    assert stored["status"] == "complete"
    assert [entry["model_type"] for entry in stored["models"]] == list(ModelType)
    for entry in stored["models"]:
        model_folder = folder / entry["model_type"]
        assert {path.name for path in model_folder.iterdir()} == {
            "metrics.jsonl",
            "tensorboard",
            "best",
            "result.json",
        }
        assert list((model_folder / "tensorboard").iterdir())
        assert entry["training"]["tokens"] == sum_of_targets(tiny) * tiny.train.num_epochs
        first, last = entry["training"]["steps_log"][0]["loss"], entry["training"]["steps_log"][-1]["loss"]
        assert last < first
        best = load_model(model_folder / "best")
        assert best.num_parameters() == entry["num_parameters"]
    json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)


def sum_of_targets(config: ExperimentConfig) -> int:
    from new_llm.data.batches import plan_batches
    from new_llm.models.loss import align_labels

    data = prepare_data(config.data)
    plan = plan_batches(
        data.train,
        seq_length=config.data.seq_length,
        batch_size=config.train.batch_size,
        order=config.data.order,
        seed=config.seed,
        epoch=0,
        num_samples=config.data.num_samples,
    )
    return sum(int((align_labels(batch.labels, batch.input_ids.shape[1]) != -100).sum()) for batch in plan)


@pytest.mark.parametrize("order", ["stream", "shuffled"])
def test_one_seed_gives_one_curve_and_another_seed_another(tiny: ExperimentConfig, order: str) -> None:
    tiny = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, order=order))
    first = run(renamed(tiny, "one"), ["infini"])
    again = run(renamed(tiny, "two"), ["infini"])
    other = run(renamed(tiny, "three", seed=1), ["infini"])
    assert curve(first) == curve(again)
    assert curve(first) != curve(other)
    # The seed is the models' alone: their tokens and their split are the same.
    assert first["data"]["tokenizer"] == other["data"]["tokenizer"]
    assert first["data"]["split_fingerprint"] == other["data"]["split_fingerprint"]


def test_deterministic_runs_agree_in_every_bit(tiny: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    step = Trainer._train_step

    def watch(self: Trainer, batches: list[Any]) -> None:
        asked.append(torch.are_deterministic_algorithms_enabled())
        step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", watch)
    tiny = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, deterministic=True))
    first, again = (run(renamed(tiny, name), ["infini", "selective"]) for name in ("one", "two"))
    assert all(asked)
    assert not torch.are_deterministic_algorithms_enabled()
    for number, kind in enumerate(("infini", "selective")):
        assert curve(first, number) == curve(again, number)
        one, two = (load_model(Path(r["folder"]) / kind / "best").state_dict() for r in (first, again))
        assert all(torch.equal(one[name], two[name]) for name in one)
        losses = [results["models"][number]["evaluation"]["sliding"]["loss"] for results in (first, again)]
        assert losses[0] == losses[1]


def test_all_models_read_the_same_batches_and_begin_with_the_same_shared_weights(
    tiny: ExperimentConfig,
) -> None:
    """A Pythia trained beside another model has the curve of a Pythia trained alone."""
    together = run(renamed(tiny, "together"), ["infini", "pythia"])
    alone = run(renamed(tiny, "alone"), ["pythia"])
    assert curve(together, 1) == curve(alone)


def test_accumulated_batches_weigh_every_token_the_same(tiny: ExperimentConfig) -> None:
    """Two rows at a time, summed over two batches, step like four rows at once (shuffled: the same samples)."""
    data = dataclasses.replace(tiny.data, order="shuffled")
    train = dataclasses.replace(tiny.train, num_epochs=1, log_every_steps=1)
    whole = renamed(tiny, "whole", data=data, train=train)
    halves = renamed(
        tiny,
        "halves",
        data=data,
        train=dataclasses.replace(train, batch_size=2, gradient_accumulation_steps=2),
    )
    expected, found = curve(run(whole, ["pythia"])), curve(run(halves, ["pythia"]))
    assert len(expected) == len(found)
    for one, two in zip(expected, found, strict=True):
        assert one == pytest.approx(two, rel=1e-3)


def fail_at_step(number: int, config: ExperimentConfig, models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends in an error at an optimizer step of its first model."""
    step = Trainer._train_step

    def fail(self: Trainer, batches: list[Any]) -> None:
        if self.state.step == number:
            raise OSError("the machine is gone")
        step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", fail)
        with pytest.raises(OSError, match="gone"):
            run(config, models)


def test_a_run_that_fails_in_the_middle_resumes_to_the_same_curve(
    tiny: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(renamed(tiny, "whole"), ["infini", "pythia"])
    fail_at_step(17, renamed(tiny, "broken"), ["infini", "pythia"], monkeypatch)  # in the second epoch
    models = renamed(tiny, "broken", models=(ModelType.INFINI, ModelType.PYTHIA))
    resumed = run_experiment(None, models, resume=True, console=Console(file=io.StringIO()))
    assert curve(resumed) == curve(expected)
    assert curve(resumed, 1) == curve(expected, 1)
    one, two = (load_model(Path(r["folder"]) / "infini" / "best") for r in (expected, resumed))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(
    tiny: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from new_llm.training.checkpoint import list_checkpoints

    expected = run(renamed(tiny, "whole"), ["infini"])
    fail_at_step(17, renamed(tiny, "broken"), ["infini"], monkeypatch)
    last, before = list_checkpoints(tiny.runs_dir / "broken" / "infini")
    content = bytearray((last / "trainer.pt").read_bytes())
    content[len(content) // 2] ^= 4
    (last / "trainer.pt").write_bytes(content)
    said = io.StringIO()
    models = renamed(tiny, "broken", models=(ModelType.INFINI,))
    resumed = run_experiment(None, models, resume=True, console=Console(file=said))
    line = f"{last.name} is damaged (trainer.pt has changed since it was written (sha256)): "
    line += f"continuing from {before.name}"
    assert line in said.getvalue()
    assert curve(resumed) == curve(expected)


def test_a_run_is_not_overwritten_and_resumes_only_with_its_own_settings(tiny: ExperimentConfig) -> None:
    run(tiny, ["pythia"])
    with pytest.raises(UserError, match="--resume"):
        run(tiny, ["pythia"])
    with pytest.raises(UserError, match="seed 0 → 1"):
        run(dataclasses.replace(tiny, seed=1), ["pythia"], resume=True)
    with pytest.raises(UserError, match="no run here"):
        run(renamed(tiny, "absent"), ["pythia"], resume=True)
    assert run(tiny, ["pythia"], resume=True)["status"] == "complete"


def test_bad_data_leaves_no_run_folder(tiny: ExperimentConfig, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(UserError):
        run(dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, source=str(empty))), ["pythia"])
    assert not tiny.runs_dir.exists()


def test_training_stops_when_patience_runs_out_and_keeps_the_best_weights(
    tiny: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from new_llm.experiments import runner

    losses = iter([5.0, 4.0, 4.5, 4.4, 1.0])
    monkeypatch.setattr(runner.Run, "measure_validation_loss", lambda *arguments: next(losses))
    train = dataclasses.replace(tiny.train, num_epochs=5, patience=2)
    training = run(dataclasses.replace(tiny, train=train), ["pythia"])["models"][0]["training"]
    assert (training["epochs"], training["best_epoch"], training["stopped_early"]) == (4, 2, True)


def test_gates_have_their_own_rate_and_no_decay(tiny: ExperimentConfig) -> None:
    from new_llm.models import create_model
    from new_llm.training.preparation import group_parameters

    model = create_model("infini", tiny.model.shape(384), num_memory_banks=2)
    groups = {group["name"]: group for group in group_parameters(model, tiny.train)}
    attention = model.layers[0].attention
    assert {id(p) for p in groups["gates"]["params"]} == {id(attention.gate), id(attention.bank_weights)}
    assert groups["gates"]["lr"] == tiny.train.gate_learning_rate
    assert groups["gates"]["weight_decay"] == groups["undecayed"]["weight_decay"] == 0.0
    assert all(p.dim() >= 2 for p in groups["decayed"]["params"])
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))
    hierarchical = create_model("hierarchical", tiny.model.shape(384))
    undecayed = {
        id(p) for g in group_parameters(hierarchical, tiny.train) if g["name"] == "undecayed" for p in g["params"]
    }
    assert {id(p) for p in hierarchical.layers[0].attention.expansion_gate.parameters()} <= undecayed


def test_gates_move_in_training(tiny: ExperimentConfig) -> None:
    results = run(tiny, ["infini"])
    assert results["models"][0]["gates"]["layers.0"] != [0.5]
    lines = read_metrics(Path(results["folder"]) / "infini")
    assert all("layers.0" in line["gates"] for line in lines if line["event"] == "train")


class GoneError(BaseException):
    """The machine is gone."""


def stop_after(monkeypatch: pytest.MonkeyPatch, config: ExperimentConfig, models: list[str], num_models: int) -> None:
    """Run until so many models are done."""
    from new_llm.experiments.runner import Run

    write, done = Run._write_result, []

    def write_and_die(self: Run, name: str, *given: Any) -> Any:
        result = write(self, name, *given)
        done.append(name)
        if len(done) == num_models:
            raise GoneError
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_write_result", write_and_die)
        with pytest.raises(GoneError):
            run(config, models)


def test_a_run_does_not_continue_on_other_text(
    tiny: ExperimentConfig, addresses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "own"
    source.mkdir()
    for path in addresses.iterdir():
        (source / path.name).write_text(path.read_text())
    tiny = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, source=str(source)))
    stop_after(monkeypatch, tiny, ["pythia", "infini"], 1)
    for path in source.iterdir():
        path.write_text(path.read_text().replace("the", "those"))
    with pytest.raises(UserError, match="source and tokenizer and split changed since") as error:
        run(tiny, ["pythia", "infini"], resume=True)
    assert "\n" not in str(error.value)
    for path in source.iterdir():
        path.write_text((addresses / path.name).read_text())
    assert len(run(tiny, ["pythia", "infini"], resume=True)["models"]) == 2


def test_a_run_continues_with_its_own_copy_of_a_tokenizer(
    tiny: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    prepare_data(tiny.data).tokenizer.save(str(tokenizer))
    tiny = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, tokenizer=str(tokenizer)))
    stop_after(monkeypatch, tiny, ["pythia", "infini"], 1)
    begun = (tiny.runs_dir / "tiny" / "data.json").read_text()
    tokenizer.unlink()
    assert len(run(tiny, ["pythia", "infini"], resume=True)["models"]) == 2
    assert (tiny.runs_dir / "tiny" / "data.json").read_text() == begun


def test_a_loss_of_ones_own_trains_and_each_model_says_what_it_reads(tiny: ExperimentConfig) -> None:
    tiny = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, num_epochs=1))
    plain = run(tiny, ["pythia", "pythia_segments"])
    doubled = run(
        renamed(tiny, "doubled"),
        ["pythia"],
        loss_fn=lambda model, batch: 2 * model.total_loss(batch.input_ids, batch.labels, batch.attention_mask),
    )
    first, twice = (results["models"][0]["training"]["steps_log"][0]["loss"] for results in (plain, doubled))
    assert twice == pytest.approx(2 * first, rel=0.1)
    assert [entry["context_tokens"] for entry in plain["models"]] == [32, 16]


def test_a_deleted_run_folder_is_one_line(tiny: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer._train_step

    def move(self: Trainer, batches: list[Any]) -> None:
        step(self, batches)
        if self.state.step == 2:
            (tiny.runs_dir / "tiny").rename(tiny.runs_dir / "elsewhere")

    monkeypatch.setattr(Trainer, "_train_step", move)
    with pytest.raises(UserError, match=r"runs/tiny.*: deleted or renamed while the "):
        run(tiny, ["pythia"])
    assert [path.name for path in tiny.runs_dir.iterdir()] == ["elsewhere"]
