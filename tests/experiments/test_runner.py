"""An experiment from its configuration to its run folder."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from new_llm.config import UserError
from new_llm.config.loading import settings_from_dict
from new_llm.data.dataset import prepare_data
from new_llm.data.tokenizer import train_tokenizer
from new_llm.experiments import ExperimentConfig, run_experiment
from new_llm.experiments.run_folder import create_run, hold_run, load_run_model
from new_llm.experiments.runner import Run, build_model
from new_llm.models import ModelType, load_model, save_model
from new_llm.models.tensor_files import fingerprint_weights
from new_llm.report.results import load_results
from new_llm.training import Trainer
from new_llm.training.checkpoint import list_checkpoints, remove_checkpoints
from new_llm.training.log import read_metrics
from new_llm.training.preparation import make_schedule
from tiny import SPEECHES, change, fail_after, make_settings
from training_cases import read_curve


@pytest.fixture
def tiny(addresses: Path, tmp_path: Path) -> ExperimentConfig:
    return ExperimentConfig(name="tiny", **make_settings(addresses, tmp_path / "runs"))


def run(config: ExperimentConfig, models: list[str], **options: Any) -> dict[str, Any]:
    return run_experiment(models, config, **{"console": Console(file=io.StringIO())} | options)


def curve(results: dict[str, Any], model: str = "pythia") -> list[float]:
    return read_curve(Path(results["folder"]) / model)


def test_experiments_of_several_models_match_their_parameters_unless_a_width_is_given():
    def matches(models: list[str], **model: Any) -> bool:
        return ExperimentConfig(models=models, model={"size": "14m", **model}).matches_parameters

    assert matches(["pythia", "token_memory"])
    assert not matches(["token_memory"])
    assert not matches(["pythia", "token_memory"], intermediate_size=64)
    assert matches(["token_memory"], intermediate_size=64, match_parameters=True)
    assert not matches(["pythia", "token_memory"], match_parameters=False)
    config = ExperimentConfig(models=["pythia", "token_memory"], model={"size": "14m"})
    with torch.device("meta"):
        counts = [build_model(config, name, 4096).num_parameters()["total"] for name in config.models]
    assert counts[1] == pytest.approx(counts[0], rel=0.01)


def test_a_run_folder_holds_all_that_the_design_names(trained_run):
    folder = Path(trained_run["folder"])
    models = {"infini", "pythia"}
    files = {".lock", "config.yaml", "data.json", "environment.json", "figures", "report.html", "results.json"}
    assert {path.name for path in folder.iterdir()} == files | {"tokenizer.json"} | models
    stored = load_results(folder / "results.json")
    assert stored["status"] == "complete"
    assert {entry["model_type"] for entry in stored["models"]} == models
    for entry in stored["models"]:
        model_folder = folder / entry["model_type"]
        parts = {"metrics.jsonl", "tensorboard", "best", "checkpoints", "result.json"}
        assert {path.name for path in model_folder.iterdir()} == parts
        assert len(list_checkpoints(model_folder)) == 1  # from which the run can be lengthened
        steps = entry["training"]["steps_log"]
        assert steps[-1]["loss"] < steps[0]["loss"]
        assert load_model(model_folder / "best").num_parameters() == entry["num_parameters"]
    json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    assert stored["models"][0]["gates"]["layers.0"] != [0.5]
    lines = read_metrics(folder / "infini")
    assert all("layers.0" in line["gates"] for line in lines if line["event"] == "train")


def test_every_model_trains_as_an_experiment(tiny):
    results = run(change(tiny, num_epochs=1, num_samples=8), list(ModelType))
    assert [entry["model_type"] for entry in results["models"]] == list(ModelType)
    by_name = {entry["model_type"]: entry["context_tokens"] for entry in results["models"]}
    assert (by_name["pythia"], by_name["pythia_segments"]) == (32, 16)


def test_one_seed_gives_one_curve_and_another_seed_another(tiny, trained_run):
    """Bit for bit; a Pythia trained beside another has the curve of one trained alone that is measured on the way."""
    measures = {"checkpoints": (0.3, 0.6), "checkpoint_measures": ("streaming", "long")}
    console = Console(file=io.StringIO(), width=200)
    again = run(change(tiny, name="again", **measures), ["pythia"], console=console)
    assert console.file.getvalue().count("long is not measured along the training: min_tokens: no document has") == 2
    lines = [line for line in read_metrics(Path(again["folder"]) / "pythia") if line["event"] == "checkpoint"]
    losses = [line["evaluation"]["streaming"]["loss"] for line in lines]
    assert losses[0] > losses[1] > again["models"][0]["evaluation"]["sliding"]["loss"]
    assert curve(again) == curve(trained_run)
    one, two = (model["evaluation"]["sliding"]["loss"] for model in (again["models"][0], trained_run["models"][1]))
    assert one == two
    other = run(change(tiny, name="other", seed=1), ["pythia"])
    assert curve(other) != curve(again)
    # The seed is the models' alone: their tokens and their split are the same.
    assert again["data"]["tokenizer"] == other["data"]["tokenizer"]
    assert again["data"]["split_fingerprint"] == other["data"]["split_fingerprint"]


def test_deterministic_training_asks_torch_for_it(tiny, monkeypatch):
    asked: list[bool] = []
    step = Trainer._train_step

    def watch(self: Trainer, batches: list[Any]) -> None:
        asked.append(torch.are_deterministic_algorithms_enabled())
        step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", watch)
    run(change(tiny, deterministic=True, num_epochs=1), ["infini"])
    assert set(asked) == {True}
    assert not torch.are_deterministic_algorithms_enabled()


def test_accumulated_batches_weigh_every_token_the_same(tiny):
    """Two rows at a time, summed over two batches, step like four rows at once (shuffled: the same samples)."""
    at_once = change(tiny, order="shuffled", num_epochs=1, log_every_steps=1)
    halves = change(at_once, name="halves", batch_size=2, gradient_accumulation_steps=2)
    assert curve(run(at_once, ["pythia"])) == pytest.approx(curve(run(halves, ["pythia"])), rel=1e-3)


def test_a_run_is_not_overwritten_and_resumes_only_with_its_own_settings(trained_run):
    config = settings_from_dict(trained_run["config"], ExperimentConfig, "test")
    with pytest.raises(UserError, match="--resume"):
        run_experiment(None, config)
    with pytest.raises(UserError, match="seed 0 → 1"):
        run_experiment(None, change(config, seed=1), resume=True)
    with pytest.raises(UserError, match="no run here"):
        run_experiment(None, change(config, name="absent"), resume=True)
    assert run_experiment(None, config, resume=True)["created"] == trained_run["created"]


def test_a_finished_run_is_lengthened(tiny, trained_run):
    """It goes on counting, at the learning rates of the new length; what was measured before is set aside."""
    shutil.copytree(trained_run["folder"], folder := tiny.runs_dir / "whole")
    (folder / "evaluations").mkdir()
    config = settings_from_dict(trained_run["config"], ExperimentConfig, "test")
    longer = change(config, runs_dir=tiny.runs_dir, num_epochs=3)
    results = run_experiment(None, longer, resume=True, console=Console(quiet=True))
    (entry,) = results["lengthened"]
    assert entry["changes"] == ["train.num_epochs 2 → 3"]
    assert (folder / "evaluations-0").is_dir()
    for before, after in zip(trained_run["models"], results["models"], strict=True):
        old, new = before["training"], after["training"]
        assert (old["epochs"], new["epochs"]) == (2, 3)
        assert new["steps"] == old["steps"] * 3 // 2
        assert new["steps_log"][: len(old["steps_log"])] == old["steps_log"]
        schedule = make_schedule(longer.train, new["steps"] // 3)
        for line in new["steps_log"][len(old["steps_log"]) :]:
            assert line["learning_rate"] == pytest.approx(longer.train.learning_rate * schedule(line["step"]))
    assert run_experiment(None, longer, resume=True, console=Console(quiet=True))["lengthened"] == [entry]
    with pytest.raises(UserError, match=r"train.num_epochs 3 → 2: a run can't be shortened"):
        run_experiment(None, change(longer, num_epochs=2), resume=True)
    remove_checkpoints(folder / "pythia")
    with pytest.raises(UserError, match="pythia: no checkpoint to continue from"):
        run_experiment(None, change(longer, num_epochs=4), resume=True)
    assert load_results(folder / "results.json")["status"] == "complete"


def test_a_run_begins_from_the_weights_of_another(tiny, trained_run, monkeypatch):
    loaded = list[Any]()
    monkeypatch.setattr("new_llm.experiments.runner.load_run_model", lambda *a: loaded.append(a) or load_run_model(*a))

    def begin(name: str, spec: str, **changes: Any) -> dict[str, Any]:
        return run(change(tiny, name=name, init_from=spec, num_epochs=1, **changes), ["infini"])

    results = begin("next", trained_run["folder"])
    assert len(loaded) == 1
    found, before = results["models"][0], trained_run["models"][0]
    assert found["training"]["steps_log"][0]["loss"] < before["training"]["epochs_log"][0]["validation_loss"]
    best = load_model(Path(trained_run["folder"]) / "infini" / "best")
    assert results["init_from"] == {"infini": fingerprint_weights(best)}
    for spec, changes, message in (
        (f"{trained_run['folder']}:pythia", {}, "do not fit infini: "),
        (trained_run["folder"], {"intermediate_size": 32}, "do not fit infini: layers.0.mlp"),
        (trained_run["folder"], {"tokenizer_vocab_size": 380}, "its tokenizer differs from this run"),
        (str(tiny.runs_dir / "absent"), {}, "no such folder"),
        (trained_run["folder"], {"vocab_size": 100}, r"model\.vocab_size: the tokenizer has ids up to \d+; the model "),
    ):
        with pytest.raises(UserError, match=message):
            begin("bad", spec, **changes)
    assert not (tiny.runs_dir / "bad").exists()


def test_training_stops_when_patience_runs_out_and_keeps_the_best_weights(tiny, monkeypatch):
    losses = iter([5.0, 4.0, 4.5, 4.4, 1.0])
    monkeypatch.setattr(Run, "measure_validation_loss", lambda *arguments: next(losses))
    patient = change(tiny, num_epochs=5, patience=2)
    before = run(patient, ["pythia"])["models"]
    training = before[0]["training"]
    assert (training["epochs"], training["best_epoch"], training["stopped_early"]) == (4, 2, True)
    monkeypatch.setattr("new_llm.experiments.runner.measure", None)  # more epochs are nothing to measure again for
    assert run(change(patient, num_epochs=8), ["pythia"], resume=True)["models"] == before


def test_more_patience_continues_only_models_that_stopped_early(tiny, trained_run, monkeypatch, capsys):
    shutil.copytree(trained_run["folder"], tiny.runs_dir / "whole")
    config = settings_from_dict(trained_run["config"], ExperimentConfig, "test")
    monkeypatch.setattr("new_llm.experiments.runner.measure", None)  # both trained to the end
    results = run_experiment(None, change(config, runs_dir=tiny.runs_dir, patience=9), resume=True)
    assert results["models"] == load_results(Path(trained_run["folder"]))["models"]
    said = capsys.readouterr().err
    assert "continuing with train.patience 1 → 9" in said
    assert "longer" not in said


def test_a_run_does_not_continue_on_other_text(tiny, addresses, tmp_path):
    source = shutil.copytree(addresses, tmp_path / "own")
    tiny = change(tiny, source=str(source))
    with fail_after(Run, "_write_result", 1):
        run(tiny, ["pythia", "infini"])
    for path in source.iterdir():
        path.write_text(path.read_text().replace("the", "those"))
    with pytest.raises(UserError, match=": source and tokenizer and split; restore"):
        run(tiny, ["pythia", "infini"], resume=True)
    shutil.copytree(addresses, source, dirs_exist_ok=True)
    assert len(run(tiny, ["pythia", "infini"], resume=True)["models"]) == 2


def test_a_run_continues_with_its_own_copy_of_a_tokenizer(tiny, tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    prepare_data(tiny.data).tokenizer.save(str(tokenizer))
    tiny = change(tiny, tokenizer=str(tokenizer))
    with fail_after(Run, "_write_result", 1):
        run(tiny, ["pythia", "infini"])
    begun = (tiny.runs_dir / "tiny" / "data.json").read_text()
    tokenizer.unlink()
    assert len(run(tiny, ["pythia", "infini"], resume=True)["models"]) == 2
    assert (tiny.runs_dir / "tiny" / "data.json").read_text() == begun


def test_a_deleted_run_folder_is_one_line(tiny, monkeypatch):
    step = Trainer._train_step

    def move(self: Trainer, batches: list[Any]) -> None:
        step(self, batches)
        if self.state.step == 2:
            (tiny.runs_dir / "tiny").rename(tiny.runs_dir / "elsewhere")

    monkeypatch.setattr(Trainer, "_train_step", move)
    with pytest.raises(UserError, match=r"runs/tiny.*: deleted or renamed "):
        run(tiny, ["pythia"])
    assert [path.name for path in tiny.runs_dir.iterdir()] == ["elsewhere"]


def test_a_loss_of_ones_own_trains(tiny, trained_run):
    def double(model: Any, batch: Any) -> Any:
        return 2 * model.total_loss(batch.input_ids, batch.labels, batch.attention_mask)

    doubled = run(change(tiny, num_epochs=1), ["pythia"], loss_fn=double)
    assert curve(doubled)[0] == pytest.approx(2 * curve(trained_run)[0], rel=0.1)


def test_a_link_to_a_run_is_the_same_run_and_leftovers_of_a_killed_process_go(tiny, tmp_path):
    with hold_run(tiny, resume=False) as (_, folder):
        create_run(tiny, folder)
    left = [folder / ".results.json.abc.tmp", folder / "infini" / "best" / ".model.safetensors.abc.tmp"]
    for place in left:
        place.mkdir(parents=True)
        (place / "half").touch()
    (kept := folder / "infini" / "metrics.jsonl").touch()
    (tmp_path / "folder-link").symlink_to(folder.parent)
    (folder.parent / "run-link").symlink_to(folder)
    with hold_run(tiny, resume=True):
        assert kept.exists()
        assert not any(place.exists() for place in left)
        for changes in ({"runs_dir": tmp_path / "folder-link"}, {"name": "run-link"}):
            linked = change(tiny, **changes)
            with pytest.raises(UserError, match=rf"\(PID {os.getpid()} on "), hold_run(linked, resume=True):
                pytest.fail("it is held twice")


def test_the_tokenizer_is_beside_the_model_or_above_and_must_fit(untrained_run, tmp_path):
    for place in (untrained_run / "infini", untrained_run / "infini" / "best"):
        model, found = load_run_model(place)
        assert json.loads(found.to_str()) == json.loads((untrained_run / "tokenizer.json").read_text())
    save_model(model, tmp_path / "a" / "b" / "c")
    found.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no tokenizer.json here or in the 2 folders above"):
        load_run_model(tmp_path / "a" / "b" / "c")
    shutil.copytree(untrained_run / "infini", tmp_path / "infini")
    train_tokenizer(SPEECHES, 600).save(str(tmp_path / "infini" / "tokenizer.json"))
    with pytest.raises(UserError, match=r"has ids up to 599; the model in .* knows up to 383"):
        load_run_model(tmp_path, "infini")
    (tmp_path / "infini" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a valid tokenizer"):
        load_run_model(tmp_path, "infini")
