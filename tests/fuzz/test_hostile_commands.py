"""The commands with hostile files: one line on stderr, exit code 2, nothing written elsewhere."""

import json
from pathlib import Path

import pytest
from hostile import Payload, write
from targets import find_texts

from new_llm.cli.main import main

LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\n" + "".join(
    f"b{i}: &b{i} [*b{i - 1 if i else ''}, *b{i - 1 if i else ''}]\n" for i in range(40)
)


def list_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def complain(capsys, *arguments: object) -> str:
    """The one line that a command says of bad input."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("new-llm: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err + out
    return lines[0]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    inside = tmp_path / "outer" / "inner"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    return inside


def test_configurations(place, capsys):
    write("bomb.yaml", LAUGHS)(place)
    write("object.yaml", "seed: !!python/object/apply:os.system ['touch ran']")(place)
    assert "aliases are not allowed" in complain(capsys, "experiment", "--config", "bomb.yaml")
    assert "could not determine a constructor" in complain(capsys, "experiment", "--config", "object.yaml")
    assert "aliases are not allowed" in complain(capsys, "study", "bomb.yaml")
    assert list_files(place.parents[1]) == {"outer", "outer/inner", "outer/inner/bomb.yaml", "outer/inner/object.yaml"}


def test_names_that_lead_out(place, capsys):
    write("a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in find_texts()))(place)
    for name in ("../../x", "/tmp/x", "..", "a/b", "x\n"):
        assert "name" in complain(capsys, "experiment", "--data.source", "a.jsonl", "--name", name)
    assert list_files(place.parents[1]) == {"outer", "outer/inner", "outer/inner/a.jsonl"}


def test_texts_models_memories_and_results(place, capsys):
    Path("a.jsonl").write_bytes(b'{"text": ' + b"[" * 100_000)
    assert "line 1: not a JSON object" in complain(
        capsys, "experiment", "--data.source", "a.jsonl", "--name", "x", "--data.cache-dir", place / "cache"
    )
    Path("results.json").write_text('{"a":' * 50_000)
    assert "not valid JSON" in complain(capsys, "report", "results.json")
    import torch

    torch.save({"weight": Payload(place)}, "memory.safetensors")
    assert "but a pickle" in complain(capsys, "memory", "show", "memory.safetensors")
    Path("model").mkdir()
    Path("model/model.json").write_text(json.dumps({"format_version": 1, "vocab_size": 10**15, "layers": []}))
    torch.save({"weight": Payload(place)}, "model/model.safetensors")
    line = complain(capsys, "eval", "ppl", "--run", "model", "--data.source", "a.jsonl")
    assert "model" in line
    assert not (place / "ran").exists()
