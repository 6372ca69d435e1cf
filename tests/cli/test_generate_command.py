"""`new-llm generate`, text on stdout and statistics on stderr, and `new-llm memory`."""

import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from new_llm.cli.main import main
from new_llm.config.terminal import make_printable
from new_llm.data.tokenizer import read_tokenizer_file
from new_llm.models import load_memory_file
from new_llm.models.memory_file import read_memory_file
from tiny import COMMAND, ENVIRONMENT, load_best, wait_until

STATISTICS = r"(\d+) new tokens? after (\d+) prompt tokens? in [\d.]+ s, [\d,]+ tokens/s, 1 pass per token\n"
PROMPT = "The Congress — and the people — "


def call(run: Path, *arguments: object, model: str = "infini", prompts: tuple[str, ...] = (PROMPT,)) -> int:
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    return main(["generate", "--run", str(run), "--model", model, *given, *map(str, arguments)])


def expect(untrained_run: Path, prompt: str = PROMPT, memory: Path | None = None, **options) -> str:
    model = load_best(untrained_run, "infini")
    tokenizer = read_tokenizer_file(untrained_run / "tokenizer.json")
    if memory is not None:
        load_memory_file(model, memory)
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    _, statistics = model.generate(ids, tokenizer=tokenizer, eos_token_id=0, **options)
    return prompt + statistics.texts[0] + "\n"


def test_text_goes_to_stdout_streamed_or_not_and_statistics_to_stderr_and_stop_ends_the_text(untrained_run, capsys):
    assert call(untrained_run, "--max-new-tokens", 40) == 0
    captured = capsys.readouterr()
    text = expect(untrained_run, max_new_tokens=40)
    assert captured.out == text
    found = re.fullmatch(STATISTICS, captured.err)
    assert int(found[1]) == 40
    stop = text[len(PROMPT) :][4:7]
    assert call(untrained_run, "--max-new-tokens", 40, "--stop", stop) == 0
    captured = capsys.readouterr()
    assert captured.out == PROMPT + text[len(PROMPT) :].split(stop)[0] + "\n"
    assert int(re.fullmatch(STATISTICS, captured.err)[1]) < 40
    options = {"max_new_tokens": 60, "temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 3}
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    for stream in ([], ["--stream"]):
        assert call(untrained_run, "--do-sample", *flags, *stream) == 0
        assert capsys.readouterr().out == expect(untrained_run, do_sample=True, **options)


def test_memory_is_read_stays_as_it_was_and_is_saved_when_asked(untrained_run, tmp_path, capsys):
    memory, out = untrained_run / "infini.safetensors", tmp_path / "out.safetensors"
    before, tokenizer = memory.read_bytes(), read_tokenizer_file(untrained_run / "tokenizer.json")
    assert call(untrained_run, "--memory", memory, "--save-memory", out, "--max-new-tokens", 30) == 0
    found = capsys.readouterr().out
    assert found == expect(untrained_run, memory=memory, max_new_tokens=30)
    assert found != expect(untrained_run, max_new_tokens=30)
    assert memory.read_bytes() == before
    num_read = len(tokenizer.encode(PROMPT).ids) + 30
    assert read_memory_file(out).tokens_seen == read_memory_file(memory).tokens_seen + num_read


def test_prompts_come_from_flags_a_file_or_the_standard_input(untrained_run, tmp_path, capsys, monkeypatch):
    assert call(untrained_run, "--max-new-tokens", 25, prompts=(PROMPT, "War")) == 0
    texts = [expect(untrained_run, prompt, max_new_tokens=25) for prompt in (PROMPT, "War")]
    assert capsys.readouterr().out == f"--- 1 ---\n{texts[0]}--- 2 ---\n{texts[1]}"
    (tmp_path / "prompt.txt").write_bytes(f"\ufeff{PROMPT}\r\n".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    for place in (tmp_path / "prompt.txt", "-"):
        assert call(untrained_run, "--prompt-file", place, prompts=()) == 0
        assert capsys.readouterr().out == expect(untrained_run)


def test_comparison_shows_both_continuations(untrained_run, capsys):
    memory = untrained_run / "infini.safetensors"
    texts = [expect(untrained_run, memory=memory), expect(untrained_run)]
    assert call(untrained_run, "--compare-memory", memory, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["memory"] for line in lines] == [str(memory), None]
    assert [line["prompt"] + line["text"] + "\n" for line in lines] == texts
    assert {(line["num_tokens"], line["statistics"]["num_tokens"]) for line in lines} == {(50, 50)}
    assert call(untrained_run, "--compare-memory", memory) == 0
    shown = capsys.readouterr().out
    _, prompt, *parts = re.split(r"--- (?:prompt|with infini\.safetensors|with an empty memory) ---\n", shown)
    assert ["".join((prompt + part).split()) for part in parts] == ["".join(make_printable(t).split()) for t in texts]


# `new-llm memory`: fill, show, merge and compare


def call_memory(*arguments: object) -> int:
    return main(["memory", *map(str, arguments)])


def fill(run: Path, out: Path, *options: object, model: str = "hierarchical") -> int:
    texts = [run / "0.txt", run / "1.txt"]
    return call_memory("fill", "--run", run, "--model", model, "--text", *texts, "--out", out, *options)


def test_a_memory_is_filled_from_files(untrained_run, tmp_path, capsys):
    out = tmp_path / "new" / "m.safetensors"
    assert fill(untrained_run, out) == 0
    captured = capsys.readouterr()
    found = re.fullmatch(
        r"(\S+): ([\d,]+) tokens in ([\d,]+) segments of 2 files, [\d,]+ tokens/s, ([\d,]+) bytes\n", captured.out
    )
    assert captured.err == "reading 2 files, 10,000 bytes\n"
    assert (found[1], int(found[4].replace(",", ""))) == (str(out), out.stat().st_size)
    assert list(out.parent.iterdir()) == [out]
    tokenizer = read_tokenizer_file(untrained_run / "tokenizer.json")
    num_tokens = sum(len(tokenizer.encode((untrained_run / f"{n}.txt").read_text()).ids) for n in (0, 1))
    assert read_memory_file(out).tokens_seen == num_tokens == int(found[2].replace(",", ""))
    load_memory_file(load_best(untrained_run, "hierarchical"), out)


def test_show_merge_compare(untrained_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    paths = [tmp_path / f"{number}.safetensors" for number in (0, 1)]
    arguments = ["fill", "--run", untrained_run / "hierarchical", "--text"]
    for number, path in enumerate(paths):
        assert call_memory(*arguments, untrained_run / f"{number}.txt", "--out", path) == 0
    assert fill(untrained_run, tmp_path / "both.safetensors") == 0
    assert call_memory("merge", *paths, "--out", tmp_path / "sum.safetensors") == 0
    capsys.readouterr()

    assert call_memory("compare", tmp_path / "both.safetensors", tmp_path / "sum.safetensors") == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.startswith("layer ")]
    memories = [row for row in rows if row[2] == "fine_memories"]
    assert [row[:4] for row in memories] == [["layer", "0:", "fine_memories", str(number)] for number in range(4)]
    assert all(float(row[-2]) < 1e-6 for row in rows)
    assert all(float(row[-1]) == 1 for row in memories)
    assert call_memory("show", tmp_path / "sum.safetensors") == 0
    shown = capsys.readouterr().out
    tokens = read_memory_file(tmp_path / "sum.safetensors").tokens_seen
    assert f"{tokens:,} tokens in segments of 16 tokens" in shown
    assert "layer 0: hierarchical, can be merged: num_memories 4, segments_per_memory 1, use_delta_rule False" in shown
    assert re.search(r"layer 0: fine_memories 3 +2 × 16 × 16 +\S+\n", shown)


def is_open(pid: int, file: Path) -> bool:
    try:
        return any(link.readlink() == file for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:  # closed meanwhile
        return False


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_fill_leaves_the_old_file(untrained_run, tmp_path, sent):
    out, text = tmp_path / "m.safetensors", tmp_path / "long.txt"
    assert fill(untrained_run, out) == 0
    before = out.read_bytes()
    text.write_text((untrained_run / "0.txt").read_text() * 2000)
    arguments = ["fill", "--run", untrained_run / "hierarchical", "--text", text, "--out", out]
    process = subprocess.Popen([*COMMAND, "memory", *map(str, arguments)], env=ENVIRONMENT, stderr=-1, text=True)
    assert wait_until(lambda: is_open(process.pid, text), process)
    process.send_signal(sent)
    _, errors = process.communicate()
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert errors.splitlines()[-1] == "new-llm: interrupted"
        assert "Traceback" not in errors
    assert out.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == sorted([out, text])
