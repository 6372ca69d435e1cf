"""The command itself: help, one line for every failure, any terminal, completion of its words."""

import json
import os
import re
import shutil
import subprocess
import sys
from typing import ClassVar

import pytest

from new_llm.cli import main as program
from new_llm.cli.command import Command, write_completion
from new_llm.cli.main import COMMANDS, load_command, main
from new_llm.config.errors import HubError, UserError
from new_llm.config.terminal import make_line, make_printable, open_console
from new_llm.data.tokenizer import train_tokenizer
from tiny import COMMAND, ENVIRONMENT, ROOT, SPEECHES, refuse, run_python

TRAINING = {"experiment", "experiment-selective", "train-adapter", "evaluate-wikitext", "lm-eval", "completion"}
"""Commands whose flags are the fields of what torch's modules hold."""


class PanicException(BaseException):
    """As libraries written in Rust raise it."""

    __module__ = "pyo3_runtime"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("a.yaml: is \x1b[31mred\nand long"), 2, r"a.yaml: is \x1b[31mred and long"),
        (KeyError("x"), 1, "KeyError: 'x' (new_llm/cli/main.py, line "),
        (MemoryError(), 2, "out of memory (MemoryError); a smaller model, batch or text needs less"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 2, "out of memory (RuntimeE"),
        (PanicException("regex stack overflow"), 2, "the tokenizer library failed (PanicException: regex"),
        (RuntimeError("Could not determine home directory."), 2, "there is no home directory for ~: set HOME"),
        (OSError(28, "No space left on device", "runs/a/x"), 2, "runs/a/x: No space left on device: free some space"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (HubError("pile: out of reach"), 2, "pile: out of reach: take --that instead"),
    ],
)
def test_every_failure_is_a_line_and_an_exit_code(error, code, words, monkeypatch, capsys):
    class Failing(Command):
        without_hub: ClassVar[str] = "take --that instead"

        @classmethod
        def read(cls, arguments: list[str], prog: str) -> Command:
            raise error

        def execute(self) -> int:
            return 0

    monkeypatch.setattr(program, "load_command", lambda name: Failing)
    assert main(["runs"]) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"new-llm: {words}")
    assert len(lines) == (2 if code == 1 else 1)
    assert code != 1 or "please report it, with the output of the same command with --debug" in lines[1]
    assert main(["runs", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_little_address_space_is_one_line(tmp_path):
    command = ["prlimit", f"--as={400 << 20}", *COMMAND, "generate", "--run", "x", "--prompt", "x"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "new-llm: out of memory" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_in_a_narrow_terminal_that_knows_ascii_alone_does_not_wait_for_torch(tmp_path):
    quick = [[], ["memory", "fill"], ["memory", "merge"], *([name] for name in COMMANDS if name not in TRAINING)]
    calls = quick + [[name] for name in TRAINING if name != "lm-eval"]
    script = (
        "import sys\nfrom new_llm.cli.main import main\n"
        f"for number, arguments in enumerate({calls!r}):\n"
        "    try: main([*arguments, '--help'])\n    except SystemExit as stopped: assert not stopped.code\n"
        f"    if number < {len(quick)}: assert not {{'torch', 'transformers'}} & sys.modules.keys(), arguments"
    )
    shown = run_python("-c", script, cwd=tmp_path, PYTHONIOENCODING="ascii", COLUMNS="20")
    assert all(f"usage: new-llm {' '.join(words)}" in shown for words in calls)


def test_an_error_in_a_terminal_that_knows_ascii_alone(tmp_path):
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}
    command = [*COMMAND, "memory", "show", "–‖±α.x"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("new-llm: -|+-alpha.x: ")


def test_text_from_files_is_no_command_to_the_terminal(capsys):
    from rich.table import Table

    hostile = "[bold]x[/x] :smile: \x1b]0;title\x07\r\u202eabc\x9b31m \udc80"
    table = Table(hostile, title=hostile)
    table.add_row(hostile)
    console = open_console(width=200)
    console.print(table)
    console.print(hostile)
    shown = capsys.readouterr().out
    assert not set("\x1b\x07\r\u202e\x9b\udc80") & set(shown)
    assert shown.count(r"[bold]x[/x] :smile: \x1b]0;title") == 4
    assert make_line("a\n b\u2028c\td\x00") == r"a b c d\x00"
    assert make_printable("a\n\tb – é 日本") == "a\n\tb – é 日本"


def test_advice_names_flags_that_there_are():
    kinds = map(load_command, COMMANDS)
    advice = " ".join(one.without_hub for kind in kinds for one in getattr(kind, "commands", {"": kind}).values())
    assert set(re.findall(r"--[\w.-]+", advice)) <= set(re.findall(r"--[\w.-]+", write_completion("bash")))


@pytest.mark.slow
def test_a_wheel_holds_all_that_commands_need(tmp_path):
    shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".git", ".venv", "runs", "site"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, str(tmp_path), str(tmp_path / "source")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    settings = ["--models", "pythia_segments", "infini", "--model.hidden-size", "32", "--data.num-samples", "8"]
    command = [*COMMAND, "experiment", "--config", "quick", "--name", "one", *settings]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "runs" / "one" / "report.html").is_file()


@pytest.mark.skipif(shutil.which("bash") is None or shutil.which("python3") is None, reason="needs bash and python3")
def test_bash_completes(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    cases = {
        "exp": {"experiment", "experiment-selective", "export"},
        "eval re": {"recall", "reversal"},
        "memory fill --ou": {"--out"},
        "generate --max-new": {"--max-new-tokens"},
        "experiment --train.compile t": {"true"},
    }
    for words in cases:
        script += (
            f"\nCOMP_WORDS=(new-llm {words}); COMP_CWORD={len(words.split())}; COMPREPLY=()\n"
            "$(complete -p new-llm | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
            'echo "${COMPREPLY[@]}"\n'
        )
    found = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=True, timeout=60)
    assert [set(line.split()) for line in found.stdout.splitlines()] == list(cases.values()), found.stderr


# Bad input to any command is one line that says what is wrong; the exit code is 2, and nothing is written


EVAL = "--run {run} --model infini --data.source {run}/speeches.jsonl --precision fp32"
LONG = f"eval long {EVAL} --min-tokens 100"
REVERSAL = "eval reversal --run {run} --model infini"
FILL = "memory fill --run {run}/infini --text {run}/0.txt --out m.safetensors"
GENERATE = "generate --run {run} --model infini --prompt x"
EXPORT = "export --run {run} --out out"
CASES = [
    (
        "experiment --models infini",
        "use --config quick, the embedded text (--data.source sotu) or local files (--data.source FILE: .txt, .jsonl",
    ),
    (
        "train-adapter --num-docs 100 --epochs 50 --base EleutherAI/no-such-pythia",
        "base with `new-llm experiment --models pythia --data.source sotu --name base` and pass `--base runs/base`",
    ),
    (
        "eval ppl --run {run} --model infini --data.source wikitext-2",
        "use a local folder (--run) and a local text (--data.source)",
    ),
    ("experimint", "experiment"),
    ("experiment --epoch 3", "unknown option --epoch 3 (see new-llm exp"),
    ("experiment --data.source absent.txt", "absent.txt"),
    ("experiment --config fast", "not one of New-LLM's own configs: pythia-70m-pile, quick"),
    ("experiment --models", "models: "),
    ("experiment --seeds --models pythia", "--seeds: a value is missing (see new-llm experiment --help)"),
    ("study mechanisms --only", "--only: a value is missing"),
    ("experiment --model.options", "--model.options: a value is missing"),
    ("experiment --models infinii", "infini"),
    ("experiment --models my_layers:Absent", "no module named my_layers"),
    ("experiment --models json:dumps", "json:dumps"),
    ("experiment --models pythia --eval.measures json:dumps", "not a subclass"),
    ("experiment --models pythia --eval.measures slidng", "unknown measure 'slidng'; known are "),
    ("experiment --models pythia --data.source my_sources:absent", "no module named my_sources"),
    ("experiment --device tpu", "--device: 'tpu' is an invalid choice; allowed are auto, cpu, cuda (see"),
    ("experiment --train.compile yes", "--train.compile: 'yes' is an invalid choice; allowed are "),
    ("experiment --resume --eval.measures nope", "--resume needs --name"),
    ("experiment --resume --name absent", "absent"),
    ("experiment --model.hidden-size 48 --model.num-attention-heads 4", "rotary_pct: 0.25 of a head of width 12"),
    ("experiment --models infini --model.num-memory-heads 3", "infini can't be built: num_memory_heads: 3"),
    ("experiment --models pythia --recipe tuned", "model.recipe: no model of this run takes it (pythia); it is an opt"),
    ("experiment --models pythia --segment-length 8", "model.segment_length: no model of this run takes it (pythia)"),
    ("study mechanisms --jobs 0", "--jobs: 0"),
    ("study mechanism", "not one of New-LLM's own studies: ablations, "),
    ("train-adapter --out adapter.bin", "must end with"),
    ("train-adapter --train.sharding fsdp", "an adapter needs ddp"),
    ("train-adapter --segments-per-sample 3", "not a multiple"),
    ("train-adapter --layers 0 0", "new-llm: adapter.layers: [0, 0] names a layer twice"),
    ("eval", "choose one of doctor, long, measures, positions, ppl, recall, reversal (see new-llm eval --help)"),
    ("eval nope", "unknown command 'eval nope'; allowed are doctor, long, measures, positions, ppl, recall, reversal"),
    ("eval ppl", "--run: give a run folder"),
    ("eval ppl --run /nope/nope", "no such directory; give a directory written by"),
    ("eval ppl --run {run}", "several models; choose one with --model: hierarchical, infini, multi_memory, pythia, "),
    ("eval ppl --run {run} --model nope", "no model 'nope' here"),
    ("eval ppl --run {run} --model infini", "belongs to no run, so give a text"),
    ("eval ppl --run {run} --model infini --data.source nope.txt", "nope.txt: no such file"),
    (f"eval ppl {EVAL} --data.whole-files", "speeches.jsonl: contains rec"),
    ("eval ppl --run {run} --model infini --revision main", "--revision: only for Hugging Face models"),
    ("eval ppl --run {run} --context 8 --stride 9", "stride: 9 exceeds eval.context (8)"),
    ("eval ppl --run {run} --position-edges 4 2", "position_edges: [4, 2] must start with 0"),
    (f"{LONG} --min-tokens 100000", "no document has 100,000 tokens; the longest of 4 has"),
    (f"{LONG} --edges 5 10", "must start with 0 and increase"),
    (f"{LONG} --max-tokens-per-document 10", "is less than min_tokens"),
    (f"{LONG} --baselines {{other}}:pythia", "its tokenizer differs from that of infini"),
    (f"{LONG} --window-baselines {{run}}:pythia --window-stride 97", "exceeds the window"),
    (f"{LONG} --baselines {{run}}:pythia {{run}}:pythia", "is given twice"),
    (f"eval recall {EVAL} --lengths 2 2", "names a value twice"),
    (f"{REVERSAL} --pairs {{other}}/bad.jsonl", "bad.jsonl: line 1: forward_prompt is missing"),
    (f"{REVERSAL} --max-sentences 10", "sentences to score exceed the limit of 10"),
    (f"{REVERSAL} --data.source sotu", "a text is only read with --places memory or context"),
    (f"eval doctor {EVAL} --checks nothing", "checks: unknown check 'nothing'; known checks are record"),
    (f"eval doctor {EVAL} --segment-tokens 100000", "at least 900000 are needed"),
    ("inspect --run {run} --model pythia --text {run}/0.txt", "what the memory knew does not apply"),
    (f"{GENERATE} --temperature 0", "temperature"),
    (f"{GENERATE} --eos-token-id 100000", "eos_token_id: 100000; the model's vocabulary is 0 to"),
    (f"{GENERATE} --memory {{run}}/multi_memory.safetensors", "multi_memory"),
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
    ("lm-eval --tasks x", "lm-evaluation-harness is not installed: pip install 'new-llm[lm-eval]'"),
    ("experiment --name x --data.source sotu --train.trackers wandb", "wandb is not installed: pip install wandb"),
    ("export --run x", "missing --out (see new-llm export --help)"),
    (f"{EXPORT} --model infini --format gpt_neox", "no layers like 0 (InfiniLayer)"),
    (f"{EXPORT} --model infini --out {{run}}/infini/best", "choose another folder"),
    (f"{EXPORT} --model infini --out {{run}}/0.txt/x", "Not a directory"),
]


@pytest.fixture(scope="module")
def other(untrained_run, tmp_path_factory):
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
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for package in ("lm_eval", "wandb"):  # as if they were not installed
        monkeypatch.setitem(sys.modules, package, None)
    before = [sorted(folder.rglob("*")) for folder in (untrained_run, other)]
    line = refuse(capsys, command.format(run=untrained_run, other=other))
    assert message in line
    assert not re.search(r"\b[A-Z]\w+(Config|Options):", line)  # classes of ours
    assert [sorted(folder.rglob("*")) for folder in (untrained_run, other)] == before
    assert list(tmp_path.iterdir()) == []
