"""`new-llm eval`, `evaluate-wikitext` and `inspect`: figures, records, pictures, findings."""

import contextlib
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from new_llm import evaluation
from new_llm.cli import run_measures
from new_llm.cli.main import main
from new_llm.config.model import CacheConfig
from new_llm.data.dataset import prepare_data
from new_llm.data.reversal_pairs import draw_pairs, get_reversal_pairs
from new_llm.data.tokenizer import END_OF_TEXT, TokenSplit, read_tokenizer_file, tokenize_documents
from new_llm.experiments.config import ExperimentConfig
from new_llm.experiments.run_folder import write_json
from new_llm.models import save_model
from new_llm.models.layers import PythiaLayer
from tiny import SHAPE, SPEECHES, load_best, make_model

CSV = """relation,subject,object,forward_template,backward_template
plays,Ann,the flute,{subject} plays {object}.,The one who plays {object} is {subject}.
plays,Bob,the harp,{subject} plays {object}.,The one who plays {object} is {subject}.
plays,Eve,the horn,{subject} plays {object}.,The one who plays {object} is {subject}.
[bold]has,Ann,a cat,{subject} has {object}.,"The owner of {object}, they say, is {subject}."
[bold]has,Bob,a dog,{subject} has {object}.,"The owner of {object}, they say, is {subject}."
"""


@pytest.fixture(scope="module")
def run(untrained_run, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "tiny"
    shutil.copytree(untrained_run, run)
    torch.manual_seed(0)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=384, n_positions=64, n_embd=32, n_layer=1, n_head=2))
    other.save_pretrained(run.parent / "gpt2")
    shutil.copy(run / "tokenizer.json", run.parent / "gpt2")
    return run


@pytest.fixture(scope="module")
def split(run) -> TokenSplit:
    return tokenize_documents([(run / "0.txt").read_text()], read_tokenizer_file(run / "tokenizer.json"))


def measure(kind: str, run: Path, *arguments: object, code: int = 0) -> dict:
    """The record of `new-llm eval` of the run's infini model, which must exit with this code."""
    out = run.parent / "out.json"
    out.unlink(missing_ok=True)
    flags = ["--run", run, "--model", "infini", "--precision", "fp32", "--out", out, *arguments]
    assert main(["eval", kind, *map(str, flags)]) == code
    return json.loads(out.read_text())


def test_a_cache_is_tuned_on_the_text_that_is_named_for_it(run, split, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text(SPEECHES[1][:2000], encoding="utf-8")
    plain = ["--data.source", run / "0.txt", "--protocol", "streaming"]
    flags = [*plain, "--cache", 30, "--ngrams", 2]
    given = measure("ppl", run, *flags)
    tuned = measure("ppl", run, *flags, "--cache.tuning-source", other, "--cache.tuning-tokens", 200)
    assert "with a cache added to the model (990 numbers" in capsys.readouterr().out
    bare = measure("ppl", run, *plain)
    assert "cache" not in bare["subject"]
    perplexities = [record["result"]["perplexity"] for record in (tuned, given, bare)]
    assert perplexities == sorted(perplexities)
    facts = tuned["subject"]["cache"]
    assert (facts["tuned_on"], facts["tuning_tokens"]) == (str(other), 200)
    assert given["subject"]["cache"]["tuned_on"] is None
    assert (facts["size"]["state_numbers"], facts["size"]["bytes_per_token"]) == (30 * 33, 2)
    config = CacheConfig(num_states=30, ngram_order=2, theta=facts["theta"], weights=facts["weights"])
    model = evaluation.CachedModel(load_best(run, "infini"), config)
    expected = evaluation.evaluate_streaming(model, split, batch_size=1)
    assert tuned["result"]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)


def test_each_protocol_is_the_library_s_and_its_record_says_what_how_and_by_which_code(run, split):
    model, prefix = load_best(run, "infini"), read_tokenizer_file(run / "tokenizer.json").token_to_id(END_OF_TEXT)
    rows = {"batch_size": 8}
    for protocol, flags, expected in (
        ("streaming", [], evaluation.evaluate_streaming(model, split, **rows)),
        ("independent", [], evaluation.evaluate_independent(model, split, **rows)),
        ("sliding", ["--stride", 16], evaluation.evaluate_sliding_window(model, split, context=48, stride=16, **rows)),
        ("rolling", [], evaluation.evaluate_rolling(model, split, context=48, prefix_token=prefix, **rows)),
    ):
        record = measure("ppl", run, "--data.source", run / "0.txt", "--protocol", protocol, "--context", 48, *flags)
        assert record["result"]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
        assert record["kind"] == record["result"]["protocol"] == protocol
    assert record["status"] == "complete"
    assert record["command"].startswith("new-llm")
    assert set(record["code"]) == {"version", "git_revision", "git_dirty"}
    assert record["environment"]["precision"] == "fp32"
    assert (record["subject"]["model"], record["subject"]["segment_length"]) == ("infini", 48)
    assert len(record["subject"]["weights_fingerprint"]) == 64
    assert record["text"]["source"] == str(run / "0.txt")
    assert record["text"]["num_bytes"] == (run / "0.txt").stat().st_size
    assert record["settings"]["segments_per_call"] == 8


def test_by_default_the_record_lies_in_the_folder_of_evaluations(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["eval", "ppl", "--run", str(run), "--model", "pythia", "--data.source", str(run / "0.txt")]
    assert main(flags) == main(flags) == 0
    (path,) = (tmp_path / "runs" / "evaluations").iterdir()  # no experiment's folder; the same again, the same name
    assert path.name.startswith("sliding-pythia-")
    (run / "config.yaml").write_text("name: tiny\n")
    assert main(flags) == 0
    (run / "config.yaml").unlink()
    assert next((run / "evaluations").iterdir()).name.startswith("sliding-pythia-")


def test_wikitext_s_text_is_one_document_unless_its_articles_are_asked_for(run, tmp_path):
    path, out = tmp_path / "wiki.test.raw", tmp_path / "out.json"
    articles = [f" \n = Title {number} = \n \n {SPEECHES[number][:300].strip()} \n" for number in range(3)]
    path.write_text("".join(articles), encoding="utf-8")
    flags = ["--run", str(run), "--model", "infini", "--data.source", str(path), "--out", str(out)]
    for command, count in ((["evaluate-wikitext"], 1), (["eval", "ppl"], 3)):
        assert main([*command, *flags]) == 0
        assert json.loads(out.read_text())["text"]["num_documents"] == count


def test_inspect_makes_a_page_of_a_text(run, capsys):
    assert main(["inspect", "--run", str(run), "--model", "infini", "--text", str(run / "0.txt")]) == 0
    page = Path(capsys.readouterr().out.split("page: ")[1].splitlines()[0])
    source = page.read_text(encoding="utf-8")
    assert 'class="card passages"' in source
    assert "infini: the memory was worth" in source
    assert 'id="summary"' not in source
    assert len(json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["result"]["passages"]) == 12


def test_long_documents_with_baselines(run, capsys):
    gpt2 = run.parent / "gpt2"
    flags = ["--baselines", f"{run}:pythia", gpt2, "--window-baselines", f"{run}:pythia", "--window-stride", 30]
    flags += ["--edges", 0, 100, 5000, "--min-tokens", 300, "--data.source", run / "speeches.jsonl"]
    record = measure("long", run, *flags)
    assert (record["kind"], record["status"], record["settings"]["confidence"]) == ("long", "complete", 0.95)
    result, own = record["result"], ("carried", "reset", "foreign")
    names = [f"tiny:pythia, {what}" for what in ("segments of 48", "windows of 96")]
    assert set(result["overall"]["perplexity"]) == {*own, *names, "gpt2, segments of 48"}
    assert [(entry["start"], entry["end"]) for entry in result["ranges"]] == [(0, 100), (100, 5000)]
    baseline = result["baselines"]["tiny:pythia, windows of 96"]
    assert (baseline["segment_length"], baseline["stride"], baseline["subject"]["model"]) == (96, 30, "pythia")
    picture = run.parent / "out.svg"
    assert picture.read_text().count("<svg") == 1
    printed = capsys.readouterr().out
    assert "memory carried" in printed
    assert str(picture) in printed


def test_recall_writes_its_charts(run, capsys):
    flags = ["--lengths", 1, 2, 3, "--depths", 0, 1, "--trials", 2, "--tasks", "passkey", "--num-candidates", 4]
    record = measure("recall", run, "--data.source", run / "speeches.jsonl", *flags)
    assert (record["kind"], record["status"], record["settings"]["trials"]) == ("recall", "complete", 2)
    places = [(cell["length"], cell["depth"]) for cell in record["result"]["cells"]]
    assert places == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert "<svg" in (run.parent / "out.svg").read_text()
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("pass keys: greedy exact match", "a random guess is right in 25.0%", "12 of 12 texts"):
        assert words in printed


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("ppl", "--protocol streaming --segments-per-call 2"),
        ("long", "--min-tokens 100"),
        ("recall", "--batch-size 4 --lengths 2 --num-candidates 2"),
    ],
)
def test_an_interrupted_measurement_leaves_a_partial_labelled_result(run, kind, flags, capsys, monkeypatch):
    catch, asked = run_measures.catch_stop_signals, []

    @contextlib.contextmanager
    def interrupt_soon():
        with catch() as stops:
            yield lambda: asked.append(signal.raise_signal(signal.SIGINT) if len(asked) == 2 else None) or stops()

    monkeypatch.setattr(run_measures, "catch_stop_signals", interrupt_soon)
    record = measure(kind, run, "--data.source", run / "speeches.jsonl", *flags.split(), code=130)
    assert (record["status"], record["result"]["is_complete"]) == ("partial", False)
    captured = capsys.readouterr()
    assert "interrupted" in captured.err
    assert "partial" in captured.out


# Runs as an experiment leaves them, with the data that they were trained on: the reversal curse, and the doctor


def make_run(folder: Path, source: Path, segment_length: int = 32) -> Path:
    data = {"source": str(source), "tokenizer_vocab_size": 384, "seq_length": 64, "segments_per_sample": 2}
    data["max_reversal_share"] = 1.0
    config = ExperimentConfig(models=("infini",), model=SHAPE, data=data, device="cpu", seed=5)
    prepared = prepare_data(config.data)
    save_model(make_model("infini", prepared.vocab_size, segment_length=segment_length), folder / "infini" / "best")
    prepared.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.yaml").write_text(config.to_yaml())
    write_json(folder / "data.json", prepared.info)
    return folder


@pytest.fixture(scope="module")
def known_run(addresses, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("known") / "run", addresses)


def test_pairs_drawn_for_each_relation(known_run, capsys):
    flags = ["--pairs-per-relation", 2, "--seed", 3, "--num-resamples", 200, "--confidence", 0.9]
    record = measure("reversal", known_run, *flags)
    pairs, tokenizer = draw_pairs(get_reversal_pairs(), 2, 3), read_tokenizer_file(known_run / "tokenizer.json")
    model, options = load_best(known_run, "infini"), {"num_resamples": 200, "confidence": 0.9, "seed": 3}
    assert record["text"] == record["result"].pop("text")
    assert record["result"].pop("places") == {}  # the knowledge is in the weights alone
    assert record["result"] == evaluation.evaluate_reversal_curse(model, tokenizer, pairs, **options).to_dict()
    assert (record["kind"], record["status"]) == ("reversal", "complete")
    assert (record["text"]["num_pairs"], record["text"]["num_own"], record["text"]["num_trained"]) == (20, 20, 240)
    assert (record["settings"]["seed"], record["settings"]["pairs_per_relation"]) == (3, 2)
    shown = capsys.readouterr().out
    assert all(
        words in shown for words in ("90% intervals from 200", "20 pairs in 10 relations", "contained 240 sentences")
    )


def test_pairs_of_a_file(known_run, tmp_path, capsys):
    path = tmp_path / "mine.csv"
    path.write_text(CSV, encoding="utf-8")
    record = measure("reversal", known_run, "--pairs", path)
    sizes = [(entry["relation"], entry["num_pairs"]) for entry in record["result"]["per_relation"]]
    assert sizes == [("plays", 3), ("[bold]has", 2)]
    assert record["text"]["source"] == record["settings"]["pairs"] == str(path)
    assert (record["text"]["num_own"], record["text"]["num_trained"]) == (0, 240)
    assert "[bold]has" in capsys.readouterr().out
    path.write_text(CSV.replace("a cat", "a cow"), encoding="utf-8")
    changed = measure("reversal", known_run, "--pairs", path)
    assert changed["text"]["pairs_fingerprint"] != record["text"]["pairs_fingerprint"]


@pytest.mark.parametrize("flag", ["--data.source", "--cache.tuning-source"])
def test_a_cache_that_is_tuned_on_measured_text_is_said_to_be(flag, known_run, addresses, capsys):
    flags = ["--protocol", "streaming", "--max-tokens", 500, "--ngrams", 1, "--cache.tuning-tokens", 20_000]
    record = measure("ppl", known_run, *flags)  # on validation documents, tuned on training documents
    assert record["subject"]["cache"]["documents_in_text"] == 0
    assert "too good" not in capsys.readouterr().out
    record = measure("ppl", known_run, *flags, flag, addresses)
    assert record["subject"]["cache"]["documents_in_text"] > 0
    assert "which the measured text contains, so the figures are too good" in " ".join(capsys.readouterr().out.split())


def test_facts_told_in_a_text(addresses, tmp_path):
    run = make_run(tmp_path / "told", addresses, segment_length=160)
    small = ["--fresh-texts", 5, "--facts-per-text", 2, "--pairs-per-relation", 2, "--cache.tuning-tokens", 2000]
    record = measure("reversal", run, "--places", "memory", "--longest-match", *small)
    assert record["text"]["num_documents"] > 0
    hits = record["result"]["places"]["memory"]["forward"]
    assert sum(hits["num_questions"]) == 10
    assert sum(hits["exact"]) > 0


DOCTOR = ("--segment-tokens", "8", "--max-tokens", "1000")


def levels(record: dict, level: str) -> set[str]:
    return {finding["check"] for finding in record["result"]["findings"] if finding["level"] == level}


def test_a_run_is_examined_with_its_own_data_and_a_leak_is_exit_code_1(known_run, monkeypatch, capsys):
    record = measure("doctor", known_run, *DOCTOR)
    assert levels(record, "fault") == levels(record, "skipped") == set()
    assert {"skill", "gates"} <= levels(record, "warning") <= {"skill", "gates", "shift"}  # it is not trained
    from new_llm.evaluation.doctor import CHECKS  # only here: the command itself must load the doctor

    assert [finding["check"] for finding in record["result"]["findings"]] == list(CHECKS)
    assert (record["kind"], record["settings"]["segment_tokens"]) == ("doctor", 8)
    assert record["text"]["source"].startswith("validation documents of")
    reversal = next(finding for finding in record["result"]["findings"] if finding["check"] == "reversal")
    assert reversal["found"].startswith("all 240 forward sentences are in training")
    shown = capsys.readouterr().out
    assert "to do: " in shown
    assert "no fault was found" in shown

    def look_ahead(self, hidden, *arguments):
        return forward(self, hidden + 0.1 * hidden.roll(-1, -2), *arguments)

    forward = PythiaLayer.forward
    monkeypatch.setattr(PythiaLayer, "forward", look_ahead)
    assert levels(measure("doctor", known_run, *DOCTOR, code=1), "fault") == {"causality"}
    assert "faults found: 1; don't trust measurements of this model" in capsys.readouterr().err


def test_a_source_that_has_changed_is_told_and_none_is_the_embedded_text(addresses, tmp_path, capsys):
    run = make_run(tmp_path / "run", Path(shutil.copytree(addresses, tmp_path / "text")))
    first, *others = sorted((tmp_path / "text").iterdir())
    for path in others[:4]:
        path.write_text("Another text altogether. " * 200)
    # The tokenizer, trained on the source, is another one.
    assert main(["eval", "doctor", "--run", str(run), "--checks", "record"]) == 2
    assert "has changed since the run: its tokenizer differs" in capsys.readouterr().err
    flags = [*DOCTOR, "--checks", "record", "--data.source", first]
    assert levels(measure("doctor", run, *flags), "warning") == {"record"}
    alone = tmp_path / "alone"  # a model without a run, which is examined on the embedded text
    shutil.copytree(run / "infini", alone / "infini")
    shutil.copy(run / "tokenizer.json", alone)
    record = measure("doctor", alone, *DOCTOR)
    assert levels(record, "skipped") == {"record", "batches", "documents", "spans", "reversal"}
    assert record["text"]["source"] == "sotu"
