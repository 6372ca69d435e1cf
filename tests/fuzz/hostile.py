"""Files made to do harm: bombs, endless lines, lying sizes, payloads, names that lead elsewhere.

Each is made in an empty folder, and read by a function that is expected to refuse it with words that match. Payloads
would write the file `ran` into the folder.
"""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from targets import Read, Target

from new_llm.config.loading import read_settings
from new_llm.data.local_files import read_file
from new_llm.data.tokenizer import read_tokenizer_file
from new_llm.experiments.config import ExperimentConfig
from new_llm.models import load_model
from new_llm.models.hf import load_pythia
from new_llm.models.hf.infini_adapter import read_adapter_file
from new_llm.models.memory_file import read_memory_file
from new_llm.report.results import load_results

Make = Callable[[Path], Any]
WEIGHTS, PICKLE, MEMORY, PT = "model.safetensors", "pytorch_model.bin", "memory.safetensors", "a.pt"


@dataclass(frozen=True)
class Hostile:
    """A file made to do harm, how it is read, and the words of its refusal."""

    make: Make
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
    parts = (_make_texts(), _make_json(), _make_models(targets), _make_others(targets))
    return {name: Hostile(*values) for part in parts for name, values in part.items()}


# Ways to make them


def write(name: str, content: bytes | str) -> Make:
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def grow(name: str, size: int = 10 << 30) -> Make:
    """Zeros at a file's end, which take no place on the disk."""

    def make(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, size)

    return make


def make_pipe(name: str) -> Make:
    return lambda folder: os.mkfifo(folder / name)


def make_link(name: str, goal: str) -> Make:
    return lambda folder: (folder / name).symlink_to(goal)


def spoil(files: dict[str, bytes], *changes: Make) -> Make:
    def make(folder: Path) -> None:
        for name, raw in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(raw)
        for change in changes:
            change(folder)

    return make


def edit(name: str, *, layer: dict[str, Any] | None = None, **values: Any) -> Make:
    def change(folder: Path) -> None:
        structure = json.loads((folder / name).read_text()) | values
        for entry in structure["layers"] if layer else ():
            entry |= layer
        (folder / name).write_text(json.dumps(structure))

    return change


def put_in(name: str, value: float) -> Make:
    def change(folder: Path) -> None:
        tensors = load_file(path := next(folder.rglob(name)))
        next(iter(tensors.values())).view(-1)[3] = value
        save_file(tensors, path)

    return change


def head(name: str, header: Any, length: int | None = None) -> Make:
    text = json.dumps(header).encode()
    return write(name, (len(text) if length is None else length).to_bytes(8, "little") + text + b"\0" * 64)


def save_payload(name: str) -> Make:
    return lambda folder: torch.save({"weight": Payload(folder)}, next(folder.rglob(name), folder / name))


def save_pickle(name: str) -> Make:
    return lambda folder: (folder / name).write_bytes(pickle.dumps({"weight": Payload(folder)}))


def save_view(name: str, wrap: Callable[[torch.Tensor], Any]) -> Make:
    """A tensor of a few bytes that is 120 GB wherever it is copied."""
    return lambda folder: torch.save(wrap(torch.zeros(1).expand(30_000_000, 1000)), folder / name)


def pack_zip(name: str) -> Make:
    def change(folder: Path) -> None:
        raw = io.BytesIO()
        torch.save({"weight": torch.zeros(1 << 24)}, raw)
        with zipfile.ZipFile(raw) as plain, zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as packed:
            for entry in plain.namelist():
                packed.writestr(entry, plain.read(entry))

    return change


def write_table(texts: pa.Array) -> Make:
    return lambda folder: pq.write_table(pa.table({"text": texts}), folder / "a.parquet")


def pack(opener: Callable[[Path], Any], name: str, chunks: int, chunk: bytes) -> Make:
    def make(folder: Path) -> None:
        with opener(folder / name) as file:
            for _ in range(chunks):
                file.write(chunk)

    return make


def open_zst(path: Path) -> Any:
    return pa.CompressedOutputStream(str(path), "zstd")


# The files


def _make_texts() -> dict[str, tuple[Make, Read, str]]:
    def read(name: str) -> Read:
        return lambda folder: sum(len(text) for _, text in read_file(folder / name, "text"))

    one = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["x" * 500_000]))
    empty = pa.DictionaryArray.from_arrays(pa.array([0] * 4_000_000, pa.int8()), pa.array([""]))
    fields = json.dumps({f"{i}" * 50: i for i in range(100_000)})
    ratio = "unpacks to more than 200 times its size"
    return {
        "txt: 10 GB": (grow("a.txt"), read("a.txt"), "one document of more than 134,217,728 bytes"),
        "txt: a device": (make_link("a.txt", "/dev/zero"), read("a.txt"), "not a regular file"),
        "txt: a pipe": (make_pipe("a.txt"), read("a.txt"), "not a regular file"),
        "jsonl: a line of 10 GB": (grow("a.jsonl"), read("a.jsonl"), "line 1 is longer than"),
        "jsonl: many fields": (write("a.jsonl", fields), read("a.jsonl"), "and 99,992 more"),
        "zst: 4 GB of one line": (
            pack(open_zst, "a.jsonl.zst", 4096, b" " * (1 << 20)),
            read("a.jsonl.zst"),
            "times its size|line 1 is longer",
        ),
        "parquet: one text again and again": (write_table(one), read("a.parquet"), ratio),
        "parquet: millions of empty rows": (write_table(empty), read("a.parquet"), ratio),
    }


def _make_json() -> dict[str, tuple[Make, Read, str]]:
    def read_tokenizer(folder: Path) -> Any:
        return read_tokenizer_file(folder / "tokenizer.json")

    def read_config(folder: Path) -> Any:
        return read_settings(folder / "config.yaml", ExperimentConfig)

    deep, results, tokenizer, config = '{"a":' * 100_000, "results.json", "tokenizer.json", "config.yaml"
    return {
        "results: 10 GB": (grow(results), load_results, "more than 67,108,864 bytes"),
        "tokenizer: deep": (write(tokenizer, deep), read_tokenizer, "not a valid tokenizer file"),
        "tokenizer: 10 GB": (grow(tokenizer), read_tokenizer, "more than 268,435,456 bytes"),
        "tokenizer: a pickle": (save_pickle(tokenizer), read_tokenizer, "tokenizer|UTF-8"),
        "yaml: an object": (
            write(config, "models: !!python/object/apply:os.system ['touch ran']"),
            read_config,
            "could not determine a constructor",
        ),
        "yaml: aliases": (write(config, "a: &a [x]\nb: [*a, *a]\n"), read_config, "aliases are not allowed"),
    }


def _make_models(targets: dict[str, Target]) -> dict[str, tuple[Make, Read, str]]:
    own, neox, binary, auto = (
        targets[name].files for name in ("model folder", "gpt-neox folder", "gpt-neox pickle", "auto folder")
    )
    load_any = targets["auto folder"].read
    index = "model.safetensors.index.json"
    claims = {"weight": {"dtype": "F32", "shape": [10**12, 10**12], "data_offsets": [0, 64]}}
    layers = [{"kind": "pythia"}] * 300_000
    unreadable, irregular = "not a safetensors file", "not a regular file"
    structures: dict[str, tuple[Make, str]] = {
        "a huge vocabulary": (edit("model.json", vocab_size=10**14), "vocab_size"),
        "millions of layers": (edit("model.json", layers=layers), "at most 1024 items"),
        "a huge layer": (edit("model.json", layer={"hidden_size": 1 << 40}), "hidden_size"),
        "NaN": (put_in(WEIGHTS, float("nan")), "holds NaN or infinite values"),
        "a huge header": (head(WEIGHTS, {}, 1 << 62), unreadable),
        "claimed shapes": (head(WEIGHTS, claims), unreadable),
        "a pickle": (save_pickle(WEIGHTS), unreadable),
        "zeros at its end": (grow(WEIGHTS), f"{unreadable}|memory"),
    }
    checkpoints: dict[str, tuple[dict[str, bytes], Make, str]] = {
        "NaN": (neox, put_in(WEIGHTS, float("nan")), "NaN or infinite"),
        "a huge width": (neox, edit("config.json", hidden_size=1 << 40), "config.json: PythiaConfig: hidden_size"),
        "a payload": (binary, save_payload(PICKLE), "not readable as plain"),
        "a bare pickle": (binary, save_pickle(PICKLE), "not a file of torch.save"),
        "a view of 120 GB": (binary, save_view(PICKLE, lambda view: {"a": view}), "larger than the file"),
        "a sparse tensor": (
            binary,
            lambda folder: torch.save({"a": torch.eye(3).to_sparse()}, folder / PICKLE),
            "not a dense one",
        ),
        "packed entries": (binary, pack_zip(PICKLE), "holds packed entries"),
        "an index that leads out": (
            {"config.json": neox["config.json"]},
            write(index, '{"weight_map": {"a": "../../etc/passwd"}}'),
            "is no file of this folder",
        ),
    }
    autos: dict[str, tuple[Make, str]] = {
        "code of the folder": (
            spoil(
                {"evil.py": b"open('ran', 'w')\n"},
                write("config.json", '{"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}'),
            ),
            "can't be loaded as a causal language model",
        ),
        "a huge layer": (spoil(auto, edit("config.json", layer={"hidden_size": 10**9})), "hidden_size"),
        "a huge vocabulary": (spoil(auto, edit("config.json", vocab_size=10**9)), "vocab_size"),
    }
    return (
        {f"model: {name}": (spoil(own, change), load_model, words) for name, (change, words) in structures.items()}
        | {"model: a pipe": (spoil({"model.json": own["model.json"]}, make_pipe(WEIGHTS)), load_model, irregular)}
        | {
            f"gpt-neox: {name}": (spoil(f, change), load_pythia, words)
            for name, (f, change, words) in checkpoints.items()
        }
        | {f"auto: {name}": (make, load_any, words) for name, (make, words) in autos.items()}
    )


def _make_others(targets: dict[str, Target]) -> dict[str, tuple[Make, Read, str]]:
    def read_memory(folder: Path) -> Any:
        return read_memory_file(folder / MEMORY)

    def read_adapter(folder: Path) -> Any:
        return read_adapter_file(folder / PT)

    overlapping = {name: {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]} for name in "ab"}
    files: dict[str, tuple[Make, Read, str]] = {
        "memory: zeros at its end": (
            spoil(targets["memory"].files, grow(MEMORY, 3 << 30)),
            read_memory,
            "not a safetensors file|memory",
        ),
        "memory: overlapping tensors": (head(MEMORY, overlapping), read_memory, "not a safetensors file"),
        "memory: a payload": (save_payload(MEMORY), read_memory, "but a pickle"),
        "memory: a huge header": (head(MEMORY, {}, 1 << 62), read_memory, "not a safetensors file"),
        "memory: a device": (make_link(MEMORY, "/dev/zero"), read_memory, "not a regular file"),
        "adapter: a payload": (save_payload(PT), read_adapter, "not readable as plain tensors"),
        "adapter: a view of 120 GB": (
            save_view(PT, lambda view: {"metadata": {}, "tensors": [({"a": view},)]}),
            read_adapter,
            "larger than the file",
        ),
    }
    if checkpoint := targets.get("checkpoint, any manifest"):
        files |= {
            "checkpoint: a payload": (
                spoil(checkpoint.files, save_payload("trainer.pt")),
                checkpoint.read,
                "not readable as plain tensors",
            ),
            "checkpoint: NaN": (
                spoil(checkpoint.files, put_in(WEIGHTS, float("nan"))),
                checkpoint.read,
                "NaN or infinite",
            ),
        }
    return files
