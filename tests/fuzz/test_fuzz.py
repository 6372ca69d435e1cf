"""Damaged and hostile files for every reader: each comes back or refuses in one line, in bounded time and memory.

A sample runs in the default suite. The whole runs by `pytest -m slow tests/fuzz`, in a process whose memory is limited
and which notes what a reader opens for writing, starts or connects to. `NEW_LLM_FUZZ_INPUTS` and `NEW_LLM_FUZZ_SEED`
choose other inputs.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from targets import TEXTS, Target, build_targets
from worker import check_damaged, check_hostile, find_faults

from tiny import refuse, write_lines

LARGE = ("GB", "millions", "again and again", "auto folder")
"""Words in the names of hostile files that are left to the slow suite: they take long to make or to refuse."""


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> dict[str, Target]:
    return build_targets(tmp_path_factory.mktemp("fuzz"), with_runs=False)


@pytest.mark.filterwarnings("ignore")
def test_readers_take_what_is_valid_and_survive_a_sample_of_damage(targets, tmp_path):
    assert list(check_damaged(tmp_path, targets, 3, "sample")) == []


def test_hostile_files_are_refused_in_one_line(targets, tmp_path):
    assert not [found for found in check_hostile(tmp_path, targets, LARGE) if found["fault"]]


def find_faults_alone(*arguments) -> list[dict]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(find_faults, *arguments).result()


@pytest.mark.slow
def test_ten_thousand_damaged_files(tmp_path):
    inputs, seed = os.environ.get("NEW_LLM_FUZZ_INPUTS", "10000"), os.environ.get("NEW_LLM_FUZZ_SEED", "0")
    faults = find_faults_alone(tmp_path, inputs, seed)
    assert not faults, "\n".join(f"{fault['name']}: {fault['fault']}" for fault in faults)


@pytest.mark.slow
def test_hostile_files_in_bounded_memory(tmp_path):
    assert not find_faults_alone(tmp_path, "hostile")


def test_names_that_lead_out(tmp_path, monkeypatch, capsys):
    (inside := tmp_path / "outer" / "inner").mkdir(parents=True)
    monkeypatch.chdir(inside)
    write_lines(inside / "a.jsonl", TEXTS)
    for name in ("../../x", "/tmp/x", "..", "a/b", "x\n"):
        assert "name" in refuse(capsys, "experiment", "--data.source", "a.jsonl", "--name", name)
    assert {path.name for path in tmp_path.rglob("*")} == {"outer", "inner", "a.jsonl"}
