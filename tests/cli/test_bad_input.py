"""Bad input to any command is one line that says what is wrong; the exit code is 2, and nothing is written."""

import json
import shutil
from pathlib import Path

import pytest

from new_llm.data.tokenizer import train_tokenizer
from tiny import SPEECHES, refuse

EVAL = "--run {run} --model infini --data.source {run}/speeches.jsonl --precision fp32"
LONG = f"eval long {EVAL} --min-tokens 100"
REVERSAL = "eval reversal --run {run} --model infini"
FILL = "memory fill --run {run}/infini --text {run}/0.txt --out m.safetensors"
GENERATE = "generate --run {run} --model infini --prompt x"
EXPORT = "export --run {run} --out out"
CASES = [
    ("experimint", "experiment"),
    ("experiment --epoch 3", "unknown option --epoch 3 (see new-llm exp"),
    ("experiment --data.sorce=x", "unknown option --data.sorce=x (see"),
    ("experiment --data.source absent.txt", "absent.txt"),
    ("experiment --config absent.yaml", "absent.yaml"),
    ("experiment --config fast", "none of the project's own configs: pythia-70m-pile, quick"),
    ("experiment --models", "models: "),
    ("experiment --models infinii", "infini"),
    ("experiment --device tpu", "--device: 'tpu' is an invalid choice; allowed are auto, cpu, cuda (see"),
    ("experiment --resume", "--name"),
    ("experiment --resume --name absent", "absent"),
    ("experiment --model.hidden-size 48 --model.num-attention-heads 4", "rotary_pct: 0.25 of heads 12 wide"),
    ("experiment --models infini --model.num-memory-heads 3", "infini can't be built: num_memory_heads: 3"),
    ("study mechanisms --jobs 0", "--jobs: 0"),
    ("study mechanism", "none of the project's own studies: ablations, "),
    ("completion tcsh", "bash"),
    ("train-adapter --out adapter.bin", "must end with"),
    ("train-adapter --train.sharding fsdp", "trains with ddp"),
    ("train-adapter --segments-per-sample 3", "not a multiple"),
    ("train-adapter --resume --name absent", "absent"),
    ("eval", "choose one of doctor, long, measures, positions, ppl, recall, reversal (see new-llm eval --help)"),
    ("eval ppl", "--run: a model is needed"),
    ("eval ppl --run /nope/nope", "no such folder"),
    ("eval ppl --run {run}", "several models; choose one by --model: hierarchical, infini, multi_memory, pythia, "),
    ("eval ppl --run {run} --model nope", "no model 'nope' here"),
    ("eval ppl --run {run} --model infini", "belongs to no run, so a text must be named"),
    ("eval ppl --run {run} --model infini --data.source nope.txt", "nope.txt: no such file"),
    (f"eval ppl {EVAL} --data.whole-files", "speeches.jsonl: holds rec"),
    ("eval ppl --run {run} --model infini --revision main", "--revision: is for Hugging Face models"),
    ("eval ppl --run {run} --context 8 --stride 9", "stride: 9 is over eval.context (8)"),
    ("eval ppl --run {run} --position-edges 4 2", "position_edges: [4, 2] must start with 0"),
    ("eval ppl --run {run} --picture a.gif", "must end with .svg or .png"),
    (f"{LONG} --min-tokens 100000", "no document has 100,000 tokens; the longest of 4 has"),
    (f"{LONG} --edges 5 10", "must start with 0 and increase"),
    (f"{LONG} --max-tokens-per-document 10", "is under min_tokens"),
    (f"{LONG} --baselines {{run}}:nothing", "nothing"),
    (f"{LONG} --baselines {{other}}:pythia", "its tokenizer is not that of infini"),
    (f"{LONG} --window-baselines {{run}}:pythia --window-stride 97", "is over the window"),
    (f"{LONG} --baselines {{run}}:pythia {{run}}:pythia", "is named twice"),
    (f"eval recall {EVAL} --lengths 2 2", "names a value twice"),
    (f"{REVERSAL} --pairs none.csv", "none.csv: no such file"),
    (f"{REVERSAL} --pairs {{other}}/bad.jsonl", "bad.jsonl: line 1: forward_prompt is missing"),
    (f"{REVERSAL} --max-sentences 10", "at most 10 are scored"),
    (f"{REVERSAL} --data.source sotu", "a text is read only where --places names memory or context"),
    (f"eval doctor {EVAL} --checks nothing", "checks: 'nothing' is unknown; known are record"),
    (f"eval doctor {EVAL} --segment-tokens 100000", "at least 900000 are needed"),
    ("inspect --run {run} --model pythia --text {run}/0.txt", "what the memory knew does not apply"),
    ("inspect --run {run} --model infini --text {run}/0.text", "no such file"),
    (f"{GENERATE} --temperature 0", "temperature"),
    (f"{GENERATE} --eos-token-id 100000", "eos_token_id: 100000; the model knows 0 to"),
    (f"{GENERATE} --memory {{run}}/multi_memory.safetensors", "multi_memory"),
    (f"{GENERATE} --memory {{run}}/none.safetensors", "none.safetensors"),
    (f"{GENERATE} --save-memory out.bin", "must end in .safetensors"),
    (f"{GENERATE} --stream --prompt another", "--stream"),
    (f"{GENERATE} --prompt ''", "--prompt"),
    (f"{GENERATE} --prompt-file {{run}}/tokenizer.json", "can't be combined with --prompt"),
    (f"{GENERATE} --stream --json", "--json"),
    (f"{GENERATE} --compare-memory m.safetensors --do-sample", "can't be combined with --do-sample"),
    ("generate --run {run} --model pythia", "--prompt"),
    ("generate --run {run} --model pythia --prompt-file {run}", "not a regular file"),
    ("generate --run . --prompt x", "no saved model"),
    ("generate --run {run} --model pythia --prompt x --memory m.safetensors", "no memory layer"),
    ("memory fill --run {run} --text {run}/0.txt --out m.safetensors", "choose one by --model"),
    (f"{FILL} --text no.txt", "no.txt: no such file"),
    (f"{FILL} --out m.txt", "must end in .safetensors"),
    (f"{FILL} --text", "no text file"),
    ("memory show nowhere.safetensors", "no such file"),
    ("memory show {run}/tokenizer.json", "not a safetensors file"),
    ("memory show {run}/infini/best/model.safetensors", "not a memory file"),
    ("memory merge one.safetensors --out m.safetensors", "at least two"),
    ("memory merge a --out", "--out: a value is missing (see new-llm memory merge --help)"),
    ("report", "report: name at least one run folder"),
    ("report none", "none: no such file"),
    ("report {other}/a {other}/a", "a: this run is given twice"),
    ("report {other}/a --out {other}", "is a folder"),
    ("report {other}/a --out {other}/a/results.json/x.html", "a/results.json: "),
    ("runs --runs-dir nowhere", "nowhere"),
    ("export --run x", "missing --out (see new-llm export --help)"),
    (f"{EXPORT} --model infini --format gpt_neox", "no layers like 0 (InfiniLayer)"),
    (f"{EXPORT} --model infini --out {{run}}/infini/best", "choose another folder"),
    (f"{EXPORT} --model infini --out {{run}}/0.txt/x", "Not a directory"),
]


@pytest.fixture(scope="module")
def other(untrained_run, tmp_path_factory) -> Path:
    """A run with another tokenizer, results, and a file of pairs that has none."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(untrained_run / "pythia", folder / "pythia")
    train_tokenizer(SPEECHES, 300).save(str(folder / "tokenizer.json"))
    (folder / "bad.jsonl").write_text('{"relation": "r"}')
    (folder / "a").mkdir()
    results = {"schema_version": 1, "name": "a", "status": "complete", "config": {"seed": 0}, "models": []}
    (folder / "a" / "results.json").write_text(json.dumps(results))
    return folder


@pytest.mark.parametrize(("command", "message"), CASES)
def test_bad_input_is_one_line(command, message, untrained_run, other, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = [sorted(folder.rglob("*")) for folder in (untrained_run, other)]
    assert message in refuse(capsys, command.format(run=untrained_run, other=other))
    assert [sorted(folder.rglob("*")) for folder in (untrained_run, other)] == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "alternatives"),
    [
        ("experiment --models infini", ("--config quick", "sotu", ".jsonl")),
        (
            "train-adapter --num-docs 100 --epochs 50 --base EleutherAI/no-such-pythia",
            ("new-llm experiment --models pythia --data.source sotu --name base", "--base runs/base"),
        ),
    ],
)
def test_without_the_hub_one_line_names_the_alternatives(command, alternatives, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refuse(capsys, command)
    assert all(alternative in line for alternative in alternatives)
    assert list(tmp_path.iterdir()) == []
