"""A run's model and tokenizer are found, or one line says what to ask for."""

import json

import pytest

from new_llm.config import UserError
from new_llm.data.tokenizer import train_tokenizer
from new_llm.experiments.run_folder import find_model_folder, load_run_model
from new_llm.models import save_model


@pytest.fixture
def run(tmp_path, make_model, tokenizer):
    folder = tmp_path / "run"
    for kind in ("pythia", "infini", "multi_memory"):
        save_model(make_model(kind), folder / kind / "best")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_models_of_a_run(run):
    assert find_model_folder(run, "pythia") == run / "pythia" / "best"
    assert find_model_folder(run / "infini") == run / "infini" / "best"
    assert find_model_folder(run / "infini" / "best", needs_memory=True) == run / "infini" / "best"
    with pytest.raises(UserError, match=r"choose one by --model: infini, multi_memory$"):
        find_model_folder(run, needs_memory=True)
    with pytest.raises(UserError, match=r"choose one by --model: infini, multi_memory, pythia$"):
        find_model_folder(run)
    (run / "multi_memory" / "best" / "model.json").unlink()
    assert find_model_folder(run, needs_memory=True) == run / "infini" / "best"


@pytest.mark.parametrize(
    ("place", "model", "message"),
    [
        ("nowhere", None, "no such folder"),
        ("empty", None, "no saved model here"),
        (".", "gpt", "no model 'gpt' here; it has infini, multi_memory, pythia"),
        (".", "pythia", "the model pythia has no memory layer"),
        ("pythia", None, "this model has no memory layer"),
        ("infini", "infini", "holds one model"),
    ],
)
def test_what_is_not_there(place, model, message, run):
    (run / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_model_folder(run / place, model, needs_memory=True)


def test_no_model_with_memory(run):
    for kind in ("infini", "multi_memory"):
        (run / kind / "best" / "model.json").unlink()
    with pytest.raises(UserError, match=r"none of its models has a memory layer \(pythia\)"):
        find_model_folder(run, needs_memory=True)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"layers": 3})])
def test_a_broken_description(content, run):
    (run / "infini" / "best" / "model.json").write_text(content)
    with pytest.raises(UserError, match=r"model.json: not"):
        find_model_folder(run, "infini", needs_memory=True)


def test_the_tokenizer_is_beside_the_model_or_above(run, tokenizer, make_model, tmp_path):
    for place in (run / "infini", run / "infini" / "best"):
        model, found = load_run_model(place)
        assert found.to_str() == tokenizer.to_str()
        assert model.segment_length == 8
    save_model(make_model(), tmp_path / "a" / "b" / "c")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no tokenizer.json here or in the 2 folders above"):
        load_run_model(tmp_path / "a" / "b" / "c")


def test_a_tokenizer_that_does_not_fit(run, speeches):
    train_tokenizer(speeches, 600).save(str(run / "infini" / "tokenizer.json"))
    with pytest.raises(UserError, match=r"has ids up to 599; the model in .* knows up to 383"):
        load_run_model(run, "infini")
    (run / "infini" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a valid tokenizer"):
        load_run_model(run, "infini")
