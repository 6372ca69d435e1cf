"""Damaged and hostile files for every reader: each comes back or refuses in one line, in bounded time and memory.

A sample runs in the default suite. The whole runs by `pytest -m slow tests/fuzz`, in a process whose memory is limited
and which notes what a reader opens for writing, starts or connects to. `NEW_LLM_FUZZ_INPUTS` and `NEW_LLM_FUZZ_SEED`
choose other inputs.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import build_hostile_files
from targets import Target, build_targets, damage, find_texts
from worker import Watch, feed, write_files

from new_llm.config import UserError
from tiny import refuse, write_lines

SAMPLE = 3
"""Inputs of the default suite for each reader."""
LARGE = ("GB", "millions", "again and again", "auto:")
"""Words in the names of hostile files that are left to the slow suite: they take long to make or to refuse."""


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> dict[str, Target]:
    return build_targets(tmp_path_factory.mktemp("fuzz"), with_runs=False)


@pytest.mark.filterwarnings("ignore")
def test_readers_take_what_is_valid_and_survive_a_sample_of_damage(targets, tmp_path):
    faults, watch = list[str](), Watch(hook=False)
    for name, target in targets.items():
        folder = tmp_path / "input"
        write_files(folder, target.files)
        assert feed(target.read, folder, watch) is None, f"{name}: a valid folder"
        for number in range(SAMPLE):
            file, raw = damage(target, random.Random(f"sample {name} {number}"))
            (folder / file).write_bytes(raw)
            if fault := feed(target.read, folder, watch):
                faults.append(f"{name} {number}: {fault}")
            write_files(folder, target.files)
    assert not faults, "\n".join(faults)


def test_hostile_files_are_refused_in_one_line(targets, tmp_path):
    files = build_hostile_files(targets)
    for name in (name for name in files if not any(word in name for word in LARGE)):
        write_files(folder := tmp_path / "input", {})
        files[name].make(folder)
        with pytest.raises(UserError, match=files[name].message) as caught:
            files[name].read(folder)
        assert "\n" not in str(caught.value), name
        assert not (folder / "ran").exists(), f"{name}: code was executed"


def run_worker(*arguments: str) -> list[dict]:
    worker = Path(__file__).with_name("worker.py")
    done = subprocess.run([sys.executable, worker, *arguments], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, f"the process died: {done.stderr[-3000:]}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_ten_thousand_damaged_files(tmp_path):
    inputs, seed = os.environ.get("NEW_LLM_FUZZ_INPUTS", "10000"), os.environ.get("NEW_LLM_FUZZ_SEED", "0")
    *faults, counts, peak = run_worker(str(tmp_path / "work"), inputs, seed)
    print(f"{counts}, {peak}")
    assert not faults, "\n".join(f"{fault['target']} {fault.get('number')}: {fault['fault']}" for fault in faults)
    assert counts["total"] >= int(inputs)


@pytest.mark.slow
def test_hostile_files_in_bounded_memory(tmp_path):
    *files, peak = run_worker(str(tmp_path / "work"), "hostile")
    print(f"{len(files)} hostile files, the slowest {max(file['seconds'] for file in files)} s, {peak}")
    assert not [f"{file['name']}: {file['fault']}" for file in files if file["fault"]]


def test_names_that_lead_out(tmp_path, monkeypatch, capsys):
    (inside := tmp_path / "outer" / "inner").mkdir(parents=True)
    monkeypatch.chdir(inside)
    write_lines(inside / "a.jsonl", find_texts())
    for name in ("../../x", "/tmp/x", "..", "a/b", "x\n"):
        assert "name" in refuse(capsys, "experiment", "--data.source", "a.jsonl", "--name", name)
    assert {path.name for path in tmp_path.rglob("*")} == {"outer", "inner", "a.jsonl"}
