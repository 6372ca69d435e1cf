"""Damaged and hostile files for every reader: each comes back or refuses in one line, in bounded time and memory.

A sample runs in the default suite. The whole (`make test-slow`) runs in processes whose memory is limited, and which
note what a reader opens for writing, starts or connects to. `NEW_LLM_FUZZ_INPUTS` and `NEW_LLM_FUZZ_SEED` choose
other ones.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from feeding import Silent, feed, write_files
from hostile import build_hostile_files
from targets import Target, build_targets, damage

from new_llm.config import UserError

SAMPLE = 6
"""Inputs of the default suite for each reader."""
NUM_INPUTS = int(os.environ.get("NEW_LLM_FUZZ_INPUTS", "12000"))
SEED = os.environ.get("NEW_LLM_FUZZ_SEED", "0")
LARGE = ("GB", "billions", "millions", "again and again", "endless", "checkpoint", "auto:")
"""Words in the names of hostile files that are left to the slow suite: they take long to make or to refuse."""
WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> dict[str, Target]:
    return build_targets(tmp_path_factory.mktemp("fuzz"), with_runs=False)


@pytest.mark.filterwarnings("ignore")
def test_readers_take_what_is_valid_and_survive_a_sample_of_damage(targets, tmp_path):
    faults = list[str]()
    for name, target in targets.items():
        folder = tmp_path / "input"
        write_files(folder, target.files)
        assert feed(target, folder, Silent()) is None, f"{name}: a valid folder"
        for number in range(SAMPLE):
            file, raw = damage(target, random.Random(f"sample {name} {number}"))
            (folder / file).write_bytes(raw)
            if fault := feed(target, folder, Silent()):
                faults.append(f"{name} {number}: {fault}")
            write_files(folder, target.files)
    assert not faults, "\n".join(faults)


def test_hostile_files_are_refused_in_one_line(targets, tmp_path):
    chosen = {
        name: file for name, file in build_hostile_files(targets).items() if not any(word in name for word in LARGE)
    }
    assert len(chosen) > 50
    for name, hostile in chosen.items():
        folder = tmp_path / name.replace("/", "-")
        folder.mkdir()
        hostile.make(folder)
        with pytest.raises(UserError, match=hostile.message) as caught:
            hostile.read(folder)
        assert "\n" not in str(caught.value), name
        assert not (folder / "ran").exists(), f"{name}: code was executed"


def run_worker(*arguments: str) -> list[dict]:
    done = subprocess.run([sys.executable, WORKER, *arguments], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, f"the process died: {done.stderr[-3000:]}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_ten_thousand_damaged_files(tmp_path):
    *faults, counts = run_worker(str(tmp_path / "work"), str(NUM_INPUTS), SEED)
    print(f"{counts['total']:,} damaged files over {len(counts['done'])} readers, peak {counts['peak_mib']:,} MiB")
    assert not faults, "\n".join(f"{fault['target']} {fault.get('number')}: {fault['fault']}" for fault in faults)
    assert counts["total"] >= min(NUM_INPUTS, 10_000)
    assert min(counts["done"].values()) > 0


@pytest.mark.slow
def test_hostile_files_in_bounded_memory(tmp_path):
    *files, peak = run_worker(str(tmp_path / "work"), "hostile")
    print(f"{len(files)} hostile files, the slowest {max(file['seconds'] for file in files)} s, {peak}")
    assert len(files) > 70
    assert not [f"{file['name']}: {file['fault']}" for file in files if file["fault"]]
