"""A run's model and tokenizer are found, or one line says what to ask for."""

import pytest

from new_llm.config import UserError
from new_llm.data.tokenizer import train_tokenizer
from new_llm.experiments.run_folder import load_run_model
from new_llm.models import save_model
from tiny import SPEECHES, make_model


@pytest.fixture
def run(tmp_path, tokenizer):
    save_model(make_model(), tmp_path / "run" / "infini" / "best")
    tokenizer.save(str(tmp_path / "run" / "tokenizer.json"))
    return tmp_path / "run"


def test_the_tokenizer_is_beside_the_model_or_above(run, tokenizer, tmp_path):
    for place in (run / "infini", run / "infini" / "best"):
        model, found = load_run_model(place)
        assert found.to_str() == tokenizer.to_str()
        assert model.segment_length == 16
    save_model(make_model(), tmp_path / "a" / "b" / "c")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no tokenizer.json here or in the 2 folders above"):
        load_run_model(tmp_path / "a" / "b" / "c")


def test_a_tokenizer_that_does_not_fit(run):
    train_tokenizer(SPEECHES, 600).save(str(run / "infini" / "tokenizer.json"))
    with pytest.raises(UserError, match=r"has ids up to 599; the model in .* knows up to 383"):
        load_run_model(run, "infini")
    (run / "infini" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a valid tokenizer"):
        load_run_model(run, "infini")
