"""Valid folders that are made to do harm: bombs, endless lines, lying sizes, payloads, names that lead elsewhere.

Each is read as its target is, and must be refused with words that match. Payloads would write the file `ran`.
"""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from disk_faults import edit_json

Change = Callable[[Path], Any]
WEIGHTS, PICKLE, MEMORY, ADAPTER = "model.safetensors", "pytorch_model.bin", "memory.safetensors", "adapter.pt"


class Payload:
    """What a pickle would call when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "ran"

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def write(name: str, content: bytes | str) -> Change:
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def grow(name: str, size: int = 10 << 30) -> Change:
    """Zeros at a file's end, which take no place on the disk."""
    return lambda folder: os.truncate(folder / name, size)


def put(make: Callable[[Path], Any], name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_nan(folder: Path) -> None:
    tensors = load_file(path := next(folder.rglob(WEIGHTS)))
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, path)


def head(name: str, header: Any, length: int | None = None) -> Change:
    text = json.dumps(header).encode()
    return write(name, (len(text) if length is None else length).to_bytes(8, "little") + text + b"\0" * 64)


def save_payload(name: str) -> Change:
    return lambda folder: torch.save({"weight": Payload(folder)}, next(folder.rglob(name)))


def save_pickle(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes(pickle.dumps({"weight": Payload(folder)}))


def save(name: str, value: Any) -> Change:
    return lambda folder: torch.save(value, folder / name)


def pack_entries(folder: Path) -> None:
    raw = io.BytesIO()
    torch.save({"weight": torch.zeros(1 << 24)}, raw)
    with zipfile.ZipFile(raw) as plain, zipfile.ZipFile(folder / PICKLE, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))


def repeat_text(num_rows: int, text: str) -> Change:
    """A table that holds one text again and again, and takes hardly any place."""

    def change(folder: Path) -> None:
        texts = pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int32()), pa.array([text]))
        pq.write_table(pa.table({"text": texts}), folder / "table.parquet")

    return change


def pack_line(folder: Path) -> None:
    with pa.CompressedOutputStream(str(folder / "packed.jsonl.zst"), "zstd") as file:
        for _ in range(4096):
            file.write(b" " * (1 << 20))


VIEW = torch.zeros(1).expand(30_000_000, 1000)  # of a few bytes, but 120 GB wherever it is copied
CLAIMS = {"weight": {"dtype": "F32", "shape": [10**12, 10**12], "data_offsets": [0, 64]}}
OVERLAPS = {name: {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]} for name in "ab"}
INDEX = '{"weight_map": {"a": "../../etc/passwd"}}'
RATIO, BROKEN, IRREGULAR = "unpacks to more than 200 times its size", "not a safetensors file", "not a regular file"
HOSTILE = {
    "text.txt": [
        ("10 GB", grow("text.txt"), "one document of more than 1,048,576 bytes"),
        ("a device", put(link_to_device, "text.txt"), IRREGULAR),
        ("a pipe", put(os.mkfifo, "text.txt"), IRREGULAR),
    ],
    "lines.jsonl": [
        ("a line of 10 GB", grow("lines.jsonl"), "is longer than"),
        ("many fields", write("lines.jsonl", json.dumps({f"{i:050}": i for i in range(9999)})), "and 9,991 more"),
    ],
    "packed.jsonl.zst": [("4 GB of one line", pack_line, "times its size|line 1 is longer")],
    "table.parquet": [
        ("one text again and again", repeat_text(20_000, "x" * 500_000), RATIO),
        ("millions of empty rows", repeat_text(4_000_000, ""), RATIO),
    ],
    "tokenizer.json": [
        ("deep", write("tokenizer.json", '{"a":' * 100_000), "not a valid tokenizer file"),
        ("10 GB", grow("tokenizer.json"), "more than 268,435,456 bytes"),
        ("a pickle", save_pickle("tokenizer.json"), "tokenizer|UTF-8"),
    ],
    "model folder": [
        ("a huge vocabulary", edit_json("model.json", vocab_size=10**14), "vocab_size"),
        ("millions of layers", edit_json("model.json", layers=[{"kind": "pythia"}] * 300_000), "at most 1024 items"),
        ("a huge layer", edit_json("model.json", layer={"hidden_size": 1 << 40}), "hidden_size"),
        ("NaN", put_nan, "holds NaN or infinite values"),
        ("a huge header", head(WEIGHTS, {}, 1 << 62), BROKEN),
        ("claimed shapes", head(WEIGHTS, CLAIMS), BROKEN),
        ("a pickle", save_pickle(WEIGHTS), BROKEN),
        ("10 GB", grow(WEIGHTS), f"{BROKEN}|memory"),
        ("a pipe", put(os.mkfifo, WEIGHTS), IRREGULAR),
    ],
    "gpt-neox folder": [
        ("NaN", put_nan, "NaN or infinite"),
        ("a huge width", edit_json("config.json", hidden_size=1 << 40), "config.json: hidden_size"),
    ],
    "gpt-neox pickle": [
        ("a payload", save_payload(PICKLE), "not readable as plain"),
        ("a bare pickle", save_pickle(PICKLE), "not a file of torch.save"),
        ("a view of 120 GB", save(PICKLE, {"a": VIEW}), "larger than the file"),
        ("a sparse tensor", save(PICKLE, {"a": torch.eye(3).to_sparse()}), "not a dense one"),
        ("compressed entries", pack_entries, "holds compressed entries"),
    ],
    "gpt-neox index": [
        ("one that leads out", write("model.safetensors.index.json", INDEX), "is not a file in this folder"),
    ],
    "auto folder": [
        (
            "code of the folder",
            edit_json("config.json", model_type="evil", auto_map={"AutoModelForCausalLM": "evil.Model"}),
            "can't be loaded as a causal language model",
        ),
        ("a huge layer", edit_json("config.json", layer={"hidden_size": 10**9}), "hidden_size"),
        ("a huge vocabulary", edit_json("config.json", vocab_size=10**9), "vocab_size"),
    ],
    "memory": [
        ("10 GB", grow(MEMORY), f"{BROKEN}|memory"),
        ("overlapping tensors", head(MEMORY, OVERLAPS), BROKEN),
        ("a payload", save_payload(MEMORY), "but a pickle"),
        ("a huge header", head(MEMORY, {}, 1 << 62), BROKEN),
        ("a device", put(link_to_device, MEMORY), IRREGULAR),
    ],
    "adapter, as .pt": [
        ("a payload", save_payload(ADAPTER), "not readable as plain tensors"),
        (
            "a view of 120 GB",
            save(ADAPTER, {"metadata": {}, "tensors": [({"a": VIEW},)]}),
            "larger than the file",
        ),
    ],
    "checkpoint, any manifest": [
        ("a payload", save_payload("trainer.pt"), "not readable as plain tensors"),
        ("NaN", put_nan, "NaN or infinite"),
    ],
    "report": [("results of 10 GB", grow("run/results.json"), "more than 67,108,864 bytes")],
}
"""By the target that is spoiled: what is done to it, by name, and the words of its refusal."""
