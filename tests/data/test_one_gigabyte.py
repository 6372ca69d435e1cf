"""A large corpus in constant memory, killed and resumed. `NEW_LLM_CORPUS_BYTES=1000000000` makes it a gigabyte."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from corpora import prepare_command, write_corpus

CORPUS_BYTES = int(os.environ.get("NEW_LLM_CORPUS_BYTES", "60000000"))
GROWTH_MIB = 64
"""Peak memory that a corpus ten times as large may take beside; what is left of it is noise of the allocator."""


def prepare(source: Path, cache: Path) -> dict:
    options = {"source": source, "cache_dir": cache, "num_samples": None, "tokenizer_vocab_size": 1000}
    sizes = {"max_spool_characters": CORPUS_BYTES // 40, "shard_characters": CORPUS_BYTES // 20}
    done = subprocess.run(prepare_command(**options, **sizes), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def kill_when(cache: Path, source: Path, num_shards: int) -> None:
    options = {"source": source, "cache_dir": cache, "num_samples": None, "tokenizer_vocab_size": 1000}
    sizes = {"max_spool_characters": CORPUS_BYTES // 40, "shard_characters": CORPUS_BYTES // 20}
    command = prepare_command(**options, **sizes)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(cache.glob(f"*/{num_shards:05d}.json")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.kill()
    process.communicate()


def same_files(a: Path, b: Path) -> bool:
    names = [sorted(path.name for path in folder.iterdir() if path.name != "verified.json") for folder in (a, b)]
    return names[0] == names[1] and all((a / name).read_bytes() == (b / name).read_bytes() for name in names[0])


@pytest.mark.slow
def test_memory_is_constant_and_a_killed_pass_resumes_to_the_same_bytes(tmp_path):
    small, large = tmp_path / "small.jsonl.zst", tmp_path / "large.jsonl.zst"
    write_corpus(small, CORPUS_BYTES // 10)
    write_corpus(large, CORPUS_BYTES)
    first, whole = prepare(small, tmp_path / "small"), prepare(large, tmp_path / "whole")
    print({"small": first["mib"], "large": whole["mib"], "seconds": whole["seconds"]})
    assert whole["train"]["num_tokens"] > 8 * first["train"]["num_tokens"]
    assert whole["mib"] < first["mib"] + GROWTH_MIB
    for num_shards in (3, 11):  # killed twice
        kill_when(tmp_path / "killed", large, num_shards)
    resumed = prepare(large, tmp_path / "killed")
    assert resumed["split_fingerprint"] == whole["split_fingerprint"]
    folders = [next(path for path in (tmp_path / name).iterdir() if path.is_dir()) for name in ("whole", "killed")]
    assert same_files(*folders)
