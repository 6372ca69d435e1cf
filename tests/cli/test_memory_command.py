"""`new-llm memory`: fill, show, merge and compare."""

import re
import signal
import subprocess
from pathlib import Path

import pytest

from new_llm.cli.main import main
from new_llm.data.tokenizer import read_tokenizer_file
from new_llm.models import load_memory_file
from new_llm.models.memory_file import read_memory_file
from tiny import COMMAND, ENVIRONMENT, load_best, refuse, wait_until


def call(*arguments: object) -> int:
    return main(["memory", *map(str, arguments)])


def fill(run: Path, out: Path, *options: object, model: str = "hierarchical") -> int:
    texts = [run / "0.txt", run / "1.txt"]
    return call("fill", "--run", run, "--model", model, "--text", *texts, "--out", out, *options)


def test_a_memory_is_filled_from_files(untrained_run, tmp_path, capsys):
    out = tmp_path / "new" / "m.safetensors"
    assert fill(untrained_run, out) == 0
    captured = capsys.readouterr()
    found = re.fullmatch(
        r"(\S+): ([\d,]+) tokens in ([\d,]+) segments of 2 files, [\d,]+ tokens/s, ([\d,]+) bytes\n", captured.out
    )
    assert found is not None
    assert captured.err == "reading 2 files, 10,000 bytes\n"
    assert (found[1], int(found[4].replace(",", ""))) == (str(out), out.stat().st_size)
    assert list(out.parent.iterdir()) == [out]
    tokenizer = read_tokenizer_file(untrained_run / "tokenizer.json")
    num_tokens = sum(len(tokenizer.encode((untrained_run / f"{n}.txt").read_text()).ids) for n in (0, 1))
    assert read_memory_file(out).tokens_seen == num_tokens == int(found[2].replace(",", ""))
    load_memory_file(load_best(untrained_run, "hierarchical"), out)


def test_a_cache_of_keys_is_filled_in_order_and_can_not_be_merged(untrained_run, tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    assert fill(untrained_run, out, model="transformer_xl") == 0
    assert "note: memories of different texts do not add here" in capsys.readouterr().err
    model = load_best(untrained_run, "transformer_xl")
    load_memory_file(model, out)
    assert int(model.get_memory_state()[1]["num_tokens"]) == 20
    message = "(transformer_xl): memories of different texts can't be added"
    assert message in refuse(capsys, "memory", "merge", out, out, "--out", out)


def test_show_merge_compare(untrained_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    paths = [tmp_path / f"{number}.safetensors" for number in (0, 1)]
    arguments = ["fill", "--run", untrained_run / "hierarchical", "--text"]
    for number, path in enumerate(paths):
        assert call(*arguments, untrained_run / f"{number}.txt", "--out", path) == 0
    assert fill(untrained_run, tmp_path / "both.safetensors") == 0
    assert call("merge", *paths, "--out", tmp_path / "sum.safetensors") == 0
    capsys.readouterr()

    assert call("compare", tmp_path / "both.safetensors", tmp_path / "sum.safetensors") == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.startswith("layer ")]
    memories = [row for row in rows if row[2] == "fine_memories"]
    assert [row[:4] for row in memories] == [["layer", "0:", "fine_memories", str(number)] for number in range(4)]
    assert all(float(row[-2]) < 1e-6 for row in rows)
    assert all(float(row[-1]) == 1 for row in memories)
    assert call("show", tmp_path / "sum.safetensors") == 0
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
