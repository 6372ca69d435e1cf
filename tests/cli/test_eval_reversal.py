"""`new-llm eval reversal`: pairs of the project and of files, the table, the record, bad input in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from new_llm import create_model
from new_llm.cli.main import main
from new_llm.config import PythiaConfig
from new_llm.data.reversal_pairs import draw_pairs, get_reversal_pairs, read_reversal_pairs
from new_llm.data.tokenizer import padded_vocab_size, read_tokenizer_file, train_tokenizer
from new_llm.evaluation import evaluate_reversal_curse
from new_llm.experiments.config import ExperimentConfig
from new_llm.models import load_model, save_model

CSV = """relation,subject,object,forward_template,backward_template
plays,Ann,the flute,{subject} plays {object}.,The one who plays {object} is {subject}.
plays,Bob,the harp,{subject} plays {object}.,The one who plays {object} is {subject}.
plays,Eve,the horn,{subject} plays {object}.,The one who plays {object} is {subject}.
[bold]has,Ann,a cat,{subject} has {object}.,"The owner of {object}, they say, is {subject}."
[bold]has,Bob,a dog,{subject} has {object}.,"The owner of {object}, they say, is {subject}."
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with one untrained model."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    tokenizer = train_tokenizer([pair.forward for pair in get_reversal_pairs()], 384)
    shape = PythiaConfig(
        vocab_size=padded_vocab_size(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    save_model(create_model("infini", shape, segment_length=16), folder / "infini" / "best")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "data.json").write_text('{"reversal_sentences": 240}')
    (folder / "config.yaml").write_text(ExperimentConfig(models=("infini",)).to_yaml())
    return folder


def measure(run: Path, *arguments: object) -> dict:
    assert main(["eval", "reversal", "--run", str(run), "--precision", "fp32", *map(str, arguments)]) == 0
    (path,) = (run / "evaluations").glob("reversal-infini-*.json")
    record = json.loads(path.read_text())
    shutil.rmtree(path.parent)
    return record


def test_pairs_drawn_for_each_relation(run, capsys):
    record = measure(run, "--pairs-per-relation", 2, "--seed", 3, "--num-resamples", 200, "--confidence", 0.9)
    model = load_model(run / "infini" / "best")
    tokenizer = read_tokenizer_file(run / "tokenizer.json")
    pairs = draw_pairs(get_reversal_pairs(), 2, 3)
    expected = evaluate_reversal_curse(model, tokenizer, pairs, num_resamples=200, confidence=0.9, seed=3).to_dict()
    assert record["text"] == record["result"].pop("text")
    assert record["result"] == expected
    assert (record["kind"], record["status"]) == ("reversal", "complete")
    assert (record["text"]["num_pairs"], record["text"]["num_own"], record["text"]["num_trained"]) == (20, 20, 240)
    assert record["settings"]["seed"] == 3
    assert record["settings"]["pairs_per_relation"] == 2
    shown = capsys.readouterr().out
    for words in (
        "all pairs",
        "invented facts",
        "chemical symbol",
        "90% intervals of 200",
        "20 pairs in 10 relations",
        "Training held 240",
    ):
        assert words in shown


def test_pairs_of_a_file(run, tmp_path, capsys):
    path = tmp_path / "mine.csv"
    path.write_text(CSV, encoding="utf-8")
    record = measure(run, "--pairs", path)
    assert [(entry["relation"], entry["num_pairs"]) for entry in record["result"]["per_relation"]] == [
        ("plays", 3),
        ("[bold]has", 2),
    ]
    assert record["text"]["source"] == str(path)
    assert record["settings"]["pairs"] == str(path)
    assert list(record["result"]["by_kind"]) == ["unstated"]
    assert (record["text"]["num_own"], record["text"]["num_trained"]) == (0, 240)
    shown = capsys.readouterr().out
    assert "[bold]has" in shown
    assert "unstated" not in shown
    other = tmp_path / "other.csv"
    other.write_text(CSV.replace("a cat", "a cow"), encoding="utf-8")
    assert measure(run, "--pairs", other)["text"]["pairs_fingerprint"] != record["text"]["pairs_fingerprint"]
    assert len(read_reversal_pairs(path)) == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pairs", "{folder}/none.csv"], "none.csv: no such file"),
        (["--pairs", "{folder}/bad.jsonl"], "bad.jsonl: line 1: no field 'forward_prompt'"),
        (["--pairs-per-relation", "0"], "pairs_per_relation"),
        (["--confidence", "1"], "confidence"),
        (["--max-sentences", "10"], "at most 10 are scored"),
        (["--model", "pythia"], "no model 'pythia' here; it has infini"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, flags, message):
    (tmp_path / "bad.jsonl").write_text('{"relation": "r"}')
    assert main(["eval", "reversal", "--run", str(run), *(flag.format(folder=tmp_path) for flag in flags)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not list((run / "evaluations").glob("*"))
