"""Training an adapter, from its configuration to its file and its run folder."""

import dataclasses
import io
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer

from new_llm.config import UserError
from new_llm.data.dataset import prepare_data
from new_llm.evaluation import evaluate_independent
from new_llm.experiments.adapter import AdapterRun, choose_long_documents, find_base, train_adapter
from new_llm.experiments.config import AdapterTrainingConfig
from new_llm.experiments.run_folder import list_runs
from new_llm.models import TransformerLM, load_model
from new_llm.models.hf import export_pythia
from new_llm.models.hf.infini_adapter import attach_adapter, load_adapted_model, split_weights
from new_llm.report import write_report
from new_llm.training import Trainer
from new_llm.training.log import read_metrics
from tiny import change, fail_after, make_settings
from training_cases import read_curve


def make_adapter(base: str, source: Path, folder: Path) -> AdapterTrainingConfig:
    settings = make_settings(source, folder / "runs")
    return AdapterTrainingConfig(
        name="adapter",
        base=base,
        num_docs=2,
        min_doc_tokens=100,
        device="cpu",
        runs_dir=folder / "runs",
        out=folder / "parallel_adapter.pt",
        wikitext=None,
        data={"source": str(source), "seq_length": 32, "segments_per_sample": 2, "min_documents": 2}
        | {"validation_fraction": 0.25},
        train=settings["train"] | {"batch_size": 2, "learning_rate": 1e-2, "patience": 0},
        eval={"max_tokens": 500, "batch_size": 4, "measures": ["sliding", "streaming"]},
    )


@pytest.fixture
def tiny_adapter(trained_run: dict[str, Any], addresses: Path, tmp_path: Path) -> AdapterTrainingConfig:
    return make_adapter(trained_run["folder"], addresses, tmp_path)


@pytest.fixture(scope="module")
def finished(trained_run, addresses, tmp_path_factory) -> tuple[AdapterTrainingConfig, dict[str, Any]]:
    config = make_adapter(trained_run["folder"], addresses, tmp_path_factory.mktemp("adapter"))
    return config, run(config, write_report=write_report)


@pytest.fixture
def base(trained_run: dict[str, Any]) -> TransformerLM:
    return load_model(Path(trained_run["folder"]) / "pythia" / "best")


def run(config: AdapterTrainingConfig, **options: Any) -> dict[str, Any]:
    return train_adapter(config, console=Console(file=io.StringIO()), **options)


def test_a_base_in_16_bits_is_widened_for_training(tiny_adapter, base, trained_run, tmp_path):
    tokenizer = Tokenizer.from_file(f"{trained_run['folder']}/tokenizer.json")
    export_pythia(base.half(), tmp_path / "published", tokenizer)
    results = run(change(tiny_adapter, base=str(tmp_path / "published"), num_epochs=1))
    trained = load_model(Path(results["folder"]) / "parallel_infini" / "best")
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
    assert torch.equal(split_weights(trained)[0]["embed_in.weight"], base.embed_in.weight.float())
    assert math.isfinite(results["alpha"])
    assert results["alpha"] != 0
    assert load_adapted_model(tiny_adapter.out).get_alpha() == pytest.approx(results["alpha"], rel=1e-2)


def test_training_changes_the_adapter_and_no_weight_of_a_frozen_base(finished, base):
    config, results = finished
    folder = Path(results["folder"])
    last = load_model(folder / "parallel_infini" / "best")
    kept, adapter = split_weights(last)
    torch.testing.assert_close(kept, dict(base.state_dict()), rtol=0, atol=0)
    assert results["alpha"] == last.get_alpha() != 0
    assert float(adapter["layers.0.attention.dense.weight"].std()) > 0
    assert results["num_parameters"]["trained"] == results["num_parameters"]["adapter"] == 4 * 32 * 32 + 4 * 32 + 66
    saved = attach_adapter(base, config.out)
    assert saved.segment_length == 16
    torch.testing.assert_close(saved.state_dict(), last.state_dict(), rtol=0, atol=0)
    assert load_adapted_model(config.out).get_alpha() == results["alpha"]
    assert json.loads((folder / "results.json").read_text())["status"] == "complete"
    files = {"adapter.yaml", "report.html", "environment.json", "data.json", "tokenizer.json"}
    assert {path.name for path in folder.iterdir()} >= files
    base_result, adapted = results["models"]
    assert adapted["context_tokens"] == base_result["context_tokens"] == 16
    assert adapted["evaluation"]["sliding"]["perplexity"] != base_result["evaluation"]["sliding"]["perplexity"]
    assert [(run.status, [model["status"] for model in run.models]) for run in list_runs(folder.parent)] == [
        ("complete", ["done", "done"])
    ]
    alphas = [line["alpha"]["0"] for line in read_metrics(folder / "parallel_infini") if "gates" in line]
    assert len(set(alphas)) > 2
    figures = results["evaluation"]["held_out"]["overall"]
    assert all(math.isfinite(figures["perplexity"][way]["value"]) for way in ("base", "carried", "reset", "foreign"))


def test_an_interrupted_training_goes_on_to_the_same_end(finished, tiny_adapter):
    whole = finished[1]
    again = change(tiny_adapter, name="again")
    with fail_after(Trainer, "_train_step", 7):
        run(again)
    resumed = run(again, resume=True)
    one, two = (read_curve(Path(results["folder"]) / "parallel_infini") for results in (resumed, whole))
    assert one == two
    assert resumed["evaluation"]["held_out"]["documents"] == whole["evaluation"]["held_out"]["documents"]
    assert run(again, resume=True)["created"] == resumed["created"]  # a finished run is not trained again
    with pytest.raises(UserError, match=r"changed: train\.learning_rate"):
        run(change(again, learning_rate=0.5), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (9,)}, "the base has layers 0 to 1"),
        ({"min_doc_tokens": 9999}, "no training document has 9,999 tokens"),
        ({"base": "{}"}, "no saved model here"),
        ({"wikitext": "{}/absent.raw"}, "no such file or folder"),
        ({"out": "{}/folder.pt"}, "is a folder"),
    ],
)
def test_bad_input_leaves_no_run_behind(tiny_adapter, tmp_path, changes, message):
    (tmp_path / "folder.pt").mkdir()
    changes = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(UserError, match=message):
        run(change(tiny_adapter, **changes | ({"out": Path(changes["out"])} if "out" in changes else {})))
    assert not (tmp_path / "runs").exists()


def test_long_documents_are_chosen_by_the_seed_and_the_same_for_every_run(tiny_adapter):
    data = prepare_data(dataclasses.replace(tiny_adapter.data, tokenizer=find_base(tiny_adapter)[1]))
    lengths = np.diff(data.train.offsets)
    middle = int(np.sort(lengths)[len(lengths) // 2])

    def choose(seed: int, num_docs: int = 3, max_tokens: int | None = None) -> Any:
        options: dict[str, Any] = {"num_docs": num_docs, "min_doc_tokens": middle, "max_doc_tokens": max_tokens}
        config = dataclasses.replace(tiny_adapter, data=dataclasses.replace(tiny_adapter.data, split_seed=seed))
        return choose_long_documents(data, dataclasses.replace(config, **options))

    chosen, short, whole = choose(0), choose(0, max_tokens=40), choose(0, num_docs=999)
    assert chosen.train.num_documents == 3
    assert np.diff(chosen.train.offsets).min() >= middle
    assert choose(0).info["train"] == chosen.info["train"]
    assert len({choose(seed).info["train"]["tokens_fingerprint"] for seed in range(6)}) > 1
    assert np.diff(short.train.offsets).tolist() == [40, 40, 40]
    assert short.train.document(1).tolist() == chosen.train.document(1)[:40].tolist()
    assert np.diff(short.validation.offsets).max() == 40
    assert short.train.count_raw([0, 1]) == (None, None)  # of a document that was cut
    assert chosen.train.count_raw([0, 1]) == (chosen.train.num_bytes[:2].sum(), chosen.train.num_words[:2].sum())
    assert whole.train.num_documents == int((lengths >= middle).sum())
    assert any("long documents asked for: 999" in note for note in whole.info["notes"])


def test_wikitext_is_measured_where_there_is_a_file_and_noted_where_the_hub_is_out_of_reach(
    tiny_adapter, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    offline = AdapterRun(change(tiny_adapter, wikitext="wikitext-2"), console=Console(quiet=True))
    assert "WikiText-2 is not measured" in offline.prepare().info["notes"][-1]
    assert list(offline.texts) == ["held_out"]
    (tmp_path / "wiki.txt").write_text("The Senate sat. " * 20)
    found = AdapterRun(change(tiny_adapter, wikitext=str(tmp_path / "wiki.txt")), console=Console(quiet=True))
    found.data = found.prepare()
    assert "WikiText-2" not in " ".join(found.data.info["notes"])
    found.device, found.autocast = torch.device("cpu"), nullcontext
    measured = found._measure_texts(found.build("base"))
    perplexity = measured["wikitext"]["overall"]["perplexity"]
    assert set(perplexity) == {"base", "carried"}  # without a memory nothing is reset or foreign
    assert perplexity["base"]["value"] == pytest.approx(perplexity["carried"]["value"], rel=1e-6)
    assert perplexity["carried"]["value"] == pytest.approx(
        evaluate_independent(found.build("base"), found.texts["wikitext"], batch_size=2).perplexity, rel=1e-6
    )


def test_an_unfrozen_base_trains_and_goes_into_the_file(tiny_adapter, base):
    config = change(tiny_adapter, freeze_base_model=False, num_epochs=1)
    best = load_model(Path(run(config)["folder"]) / "parallel_infini" / "best")
    assert not torch.equal(best.embed_in.weight, base.embed_in.weight)
    torch.testing.assert_close(load_adapted_model(config.out).state_dict(), best.state_dict(), rtol=0, atol=0)
