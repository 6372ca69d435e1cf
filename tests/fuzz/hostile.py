"""Files made to do harm: bombs, endless lines, lying sizes, payloads, names that lead elsewhere.

Each is made in an empty folder, and read by a function that is expected to refuse it with words that match. Payloads
would write the file `ran` into the folder.
"""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from targets import Read, Target

from new_llm.config.loading import read_settings
from new_llm.data.local_files import read_file
from new_llm.data.tokenizer import read_tokenizer_file
from new_llm.experiments.config import ExperimentConfig, StudyConfig
from new_llm.report.results import load_results

HUGE = 10 << 30


@dataclass(frozen=True)
class Hostile:
    """A file made to do harm, how it is read, and the words of its refusal."""

    make: Callable[[Path], Any]
    read: Read
    message: str


class Payload:
    """What a pickle would call when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "ran"

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def build_hostile_files(targets: dict[str, Target]) -> dict[str, Hostile]:
    """All of them by name; the targets lend valid folders to spoil."""
    from hostile_tensors import make_tensors

    return _make_configurations() | _make_texts() | _make_json() | make_tensors(targets)


def write(name: str, content: bytes | str) -> Callable[[Path], Any]:
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def write_sparse(name: str, size: int = HUGE) -> Callable[[Path], Any]:
    def make(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(size)

    return make


def make_pipe(name: str) -> Callable[[Path], Any]:
    return lambda folder: os.mkfifo(folder / name)


def make_link(name: str, goal: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).symlink_to(goal)


def _make_configurations() -> dict[str, Hostile]:
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
    )
    merges = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))

    def read(folder: Path) -> Any:
        return read_settings(folder / "config.yaml", ExperimentConfig)

    yaml = {
        "aliases of aliases": (laughs, "aliases are not allowed"),
        "merges of merges": (merges, "aliases are not allowed"),
        "an alias of itself": ("models: &a [*a]", "aliases are not allowed"),
        "an object": ("models: !!python/object/apply:os.system ['touch ran']", "could not determine a constructor"),
        "a name": ("models: !!python/name:os.system", "could not determine a constructor"),
        "deep lists": ("models: " + "[" * 20_000, "nested|expected"),
        "deep mappings": ("".join(f"{' ' * i}a:\n" for i in range(400)), "YAML|nested too deeply"),
        "a twin key": ("seed: 1\nseed: 2\n", "the key 'seed' is there twice"),
        "a long file": ("# " + "x" * (1 << 19), "more than 262,144 bytes"),
        "a date that is none": ("seed: 2001-99-99", "not valid YAML: month must be in"),
        "a number that is none": ("seed: !!int ''", "not valid YAML"),
        "a truth that is none": ("seed: !!bool perhaps", "not valid YAML"),
        "a key that is a list": ("? [1, 2]\n: 3\n", "unhashable key"),
        "a key that is a date": ("2001-01-01: 3\n", "not a mapping of names"),
        "an infinite rate": ("train: {learning_rate: .inf}", "finite"),
        "a name that leads out": ("name: ../../x", "name: "),
        "a long name": (f"name: {'x' * 4000}", "at most 100 characters"),
        "two documents": ("seed: 1\n---\nseed: 2\n", "not valid YAML"),
    }
    found = {f"yaml: {name}": Hostile(write("config.yaml", text), read, words) for name, (text, words) in yaml.items()}
    study = "name: a\nquestion: b\ncpu_minutes: 1\nbase: {}\nvariants: {../../x: {}}\n"

    def read_study(folder: Path) -> Any:
        return read_settings(folder / "config.yaml", StudyConfig)

    return found | {
        "yaml: a pipe": Hostile(make_pipe("config.yaml"), read, "not a regular file"),
        "yaml: a device": Hostile(make_link("config.yaml", "/dev/zero"), read, "not a regular file"),
        "yaml: a variant that leads out": Hostile(write("config.yaml", study), read_study, "variants"),
    }


def _make_texts() -> dict[str, Hostile]:
    def read(name: str, **options: Any) -> Read:
        return lambda folder: sum(len(text) for _, text in read_file(folder / name, "text", **options))

    def pack(chunks: int, chunk: bytes, window_log: int = 20) -> Callable[[Path], Any]:
        def make(folder: Path) -> None:
            settings = zstandard.ZstdCompressionParameters(window_log=window_log)
            packer = zstandard.ZstdCompressor(compression_params=settings)
            with (folder / "a.jsonl.zst").open("wb") as file, packer.stream_writer(file, closefd=False) as stream:
                for _ in range(chunks):
                    stream.write(chunk)

        return make

    def write_table(texts: pa.Array) -> Callable[[Path], Any]:
        return lambda folder: pq.write_table(pa.table({"text": texts}), folder / "a.parquet")

    long_text = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["x" * 500_000]))
    empty = pa.DictionaryArray.from_arrays(pa.array([0] * 4_000_000, pa.int8()), pa.array([""]))
    line = b'{"text": "a"}\n'
    return {
        "txt: 10 GB": Hostile(write_sparse("a.txt"), read("a.txt"), "one document of more than 134,217,728 bytes"),
        "txt: a pipe": Hostile(make_pipe("a.txt"), read("a.txt"), "not a regular file"),
        "txt: a device": Hostile(make_link("a.txt", "/dev/zero"), read("a.txt"), "not a regular file"),
        "tokens: 10 GB": Hostile(write_sparse("a.tokens"), read("a.tokens"), "line 1 is longer than 134,217,728 bytes"),
        "jsonl: a line of 10 GB": Hostile(write_sparse("a.jsonl"), read("a.jsonl"), "line 1 is longer than"),
        "jsonl: a pipe": Hostile(make_pipe("a.jsonl"), read("a.jsonl"), "not a regular file"),
        "jsonl: deep": Hostile(
            write("a.jsonl", '{"text": ' + "[" * 1_000_000), read("a.jsonl"), "line 1: not a JSON object"
        ),
        "jsonl: a long number": Hostile(write("a.jsonl", '{"text": ' + "9" * 100_000 + "}"), read("a.jsonl"), "line 1"),
        "jsonl: many fields": Hostile(
            write("a.jsonl", json.dumps({f"{i}" * 50: i for i in range(100_000)})), read("a.jsonl"), "and 99,992 more"
        ),
        "zst: 4 GB of one line": Hostile(
            pack(4096, b" " * (1 << 20)), read("a.jsonl.zst"), "times its size|line 1 is longer"
        ),
        "zst: billions of lines": Hostile(
            pack(2048, b"\n" * (1 << 20)), read("a.jsonl.zst"), "unpacks to more than 200 times its size"
        ),
        "zst: millions of documents": Hostile(
            pack(1024, line * 70_000), read("a.jsonl.zst"), "unpacks to more than 200 times its size"
        ),
        "zst: a window of 1 GB": Hostile(pack(1, line, window_log=30), read("a.jsonl.zst"), "corrupt or truncated"),
        "parquet: one text again and again": Hostile(
            write_table(long_text), read("a.parquet"), "unpacks to more than 200 times its size"
        ),
        "parquet: millions of empty rows": Hostile(
            write_table(empty), read("a.parquet"), "unpacks to more than 200 times its size"
        ),
        "parquet: a pipe": Hostile(make_pipe("a.parquet"), read("a.parquet"), "not a regular file"),
    }


def _make_json() -> dict[str, Hostile]:
    def read_tokenizer(folder: Path) -> Any:
        return read_tokenizer_file(folder / "tokenizer.json")

    deep = '{"a":' * 100_000
    return {
        "results: deep": Hostile(write("results.json", deep), load_results, "nested too deeply|not valid JSON"),
        "results: 10 GB": Hostile(write_sparse("results.json"), load_results, "more than 67,108,864 bytes"),
        "results: a pipe": Hostile(make_pipe("results.json"), load_results, "not a regular file"),
        "results: a long number": Hostile(write("results.json", "9" * 100_000), load_results, "not valid JSON"),
        "tokenizer: deep": Hostile(write("tokenizer.json", deep), read_tokenizer, "not a valid tokenizer file"),
        "tokenizer: 10 GB": Hostile(write_sparse("tokenizer.json"), read_tokenizer, "more than 268,435,456 bytes"),
        "tokenizer: a pickle": Hostile(
            lambda folder: write("tokenizer.json", pickle.dumps(Payload(folder)))(folder),
            read_tokenizer,
            "tokenizer|UTF-8",
        ),
    }
