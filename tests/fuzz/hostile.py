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
import zstandard
from safetensors.torch import save_file
from targets import Read, Target

from new_llm.config import DataConfig, ExperimentConfig
from new_llm.config.limits import ReadLimits
from new_llm.config.run_settings import read_settings
from new_llm.config.study import StudyConfig
from new_llm.data.local_files import read_file
from new_llm.data.sources import open_source
from new_llm.data.tokenizer import read_tokenizer_file
from new_llm.models import TransformerLM
from new_llm.models.hf.adapter_file import read_adapter_file
from new_llm.models.memory_file import read_memory_file
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
    return _make_configurations() | _make_texts() | _make_json() | _make_tensors(targets)


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
        "aliases of aliases": (laughs, "values, aliases counted"),
        "merges of merges": (merges, "values, aliases counted"),
        "an alias of itself": ("models: &a [*a]", "an alias stands inside of what it repeats"),
        "an object": ("models: !!python/object/apply:os.system ['touch ran']", "could not determine a constructor"),
        "a name": ("models: !!python/name:os.system", "could not determine a constructor"),
        "deep lists": ("models: " + "[" * 20_000, "nested|expected"),
        "deep mappings": ("".join(f"{' ' * i}a:\n" for i in range(400)), "nested more than 50 deep|YAML"),
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
        "yaml: a pipe": Hostile(make_pipe("config.yaml"), read, "no regular file"),
        "yaml: a device": Hostile(make_link("config.yaml", "/dev/zero"), read, "no regular file"),
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
        "txt: 10 GB": Hostile(write_sparse("a.txt"), read("a.txt"), "one document of 10,737,418,240 bytes"),
        "txt: a pipe": Hostile(make_pipe("a.txt"), read("a.txt"), "no regular file"),
        "txt: a device": Hostile(make_link("a.txt", "/dev/zero"), read("a.txt"), "no regular file"),
        "tokens: 10 GB": Hostile(write_sparse("a.tokens"), read("a.tokens"), "line 1 is longer than 67,108,864 bytes"),
        "jsonl: a line of 10 GB": Hostile(write_sparse("a.jsonl"), read("a.jsonl"), "line 1 is longer than"),
        "jsonl: a pipe": Hostile(make_pipe("a.jsonl"), read("a.jsonl"), "no regular file"),
        "jsonl: deep": Hostile(
            write("a.jsonl", '{"text": ' + "[" * 1_000_000), read("a.jsonl"), "line 1 is no JSON object"
        ),
        "jsonl: a long number": Hostile(write("a.jsonl", '{"text": ' + "9" * 100_000 + "}"), read("a.jsonl"), "line 1"),
        "jsonl: many fields": Hostile(
            write("a.jsonl", json.dumps({f"{i}" * 50: i for i in range(100_000)})), read("a.jsonl"), "and 99,992 more"
        ),
        "zst: 4 GB of one line": Hostile(
            pack(4096, b" " * (1 << 20)), read("a.jsonl.zst"), "times its size|line 1 is longer"
        ),
        "zst: billions of lines": Hostile(
            pack(2048, b"\n" * (1 << 20)), read("a.jsonl.zst"), "unpacks to more than 1000 times its size"
        ),
        "zst: millions of documents": Hostile(
            pack(1024, line * 70_000),
            read("a.jsonl.zst", limits=ReadLimits(max_compression_ratio=20)),
            "unpacks to more than 20 times its size",
        ),
        "zst: a window of 1 GB": Hostile(
            pack(1, line, window_log=30), read("a.jsonl.zst"), "limits.max_zstd_window_bytes"
        ),
        "parquet: one text again and again": Hostile(
            write_table(long_text), read("a.parquet"), "unpacks to more than 1000 times its size"
        ),
        "parquet: millions of empty rows": Hostile(
            write_table(empty), read("a.parquet"), "unpacks to more than 1000 times its size"
        ),
        "parquet: a pipe": Hostile(make_pipe("a.parquet"), read("a.parquet"), "no regular file"),
        "megatron: a pipe": Hostile(
            lambda folder: (make_pipe("a.bin")(folder), write("a.idx", b"MMIDIDX\0\0")(folder)),
            lambda folder: open_source(DataConfig(source=str(folder / "a.idx"))),
            "no regular file|no such file",
        ),
    }


def _make_json() -> dict[str, Hostile]:
    def read_tokenizer(folder: Path) -> Any:
        return read_tokenizer_file(folder / "tokenizer.json")

    deep = '{"a":' * 100_000
    return {
        "results: deep": Hostile(write("results.json", deep), load_results, "nested too deeply|not valid JSON"),
        "results: 10 GB": Hostile(write_sparse("results.json"), load_results, "more than 67,108,864 bytes"),
        "results: a pipe": Hostile(make_pipe("results.json"), load_results, "no regular file"),
        "results: a long number": Hostile(write("results.json", "9" * 100_000), load_results, "not valid JSON"),
        "tokenizer: deep": Hostile(write("tokenizer.json", deep), read_tokenizer, "no valid tokenizer file"),
        "tokenizer: 10 GB": Hostile(write_sparse("tokenizer.json"), read_tokenizer, "more than 268,435,456 bytes"),
        "tokenizer: a pickle": Hostile(
            lambda folder: write("tokenizer.json", pickle.dumps(Payload(folder)))(folder),
            read_tokenizer,
            "tokenizer|UTF-8",
        ),
    }


def _make_tensors(targets: dict[str, Target]) -> dict[str, Hostile]:
    own, neox, binary = (targets[name].files for name in ("model folder", "gpt-neox folder", "gpt-neox pickle"))
    checkpoint = targets.get("checkpoint, any manifest", Target({}, (), lambda folder: None))

    def load_own(folder: Path) -> Any:
        return TransformerLM.load(folder)

    def load_neox(folder: Path) -> Any:
        return TransformerLM.from_pythia(folder)

    def spoil(files: dict[str, bytes], change: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def make(folder: Path) -> None:
            for name, raw in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(raw)
            change(folder)

        return make

    def edit(name: str, **values: Any) -> Callable[[Path], Any]:
        def change(folder: Path) -> None:
            structure = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(structure | values))

        return change

    def edit_layer(**values: Any) -> Callable[[Path], Any]:
        def change(folder: Path) -> None:
            structure = json.loads((folder / "model.json").read_text())
            structure["layers"][0] |= values
            (folder / "model.json").write_text(json.dumps(structure))

        return change

    def put_in(name: str, value: float) -> Callable[[Path], Any]:
        def change(folder: Path) -> None:
            from safetensors.torch import load_file

            tensors = load_file(folder / name)
            next(iter(tensors.values())).view(-1)[3] = value
            save_file(tensors, folder / name)

        return change

    def head(name: str, header: Any, length: int | None = None) -> Callable[[Path], Any]:
        text = json.dumps(header).encode()
        raw = (len(text) if length is None else length).to_bytes(8, "little") + text + b"\0" * 64
        return write(name, raw)

    def save_payload(name: str) -> Callable[[Path], Any]:
        return lambda folder: torch.save({"weight": Payload(folder)}, folder / name)

    def save_pickle(name: str) -> Callable[[Path], Any]:
        return lambda folder: (folder / name).write_bytes(pickle.dumps({"weight": Payload(folder)}))

    def pack_zip(name: str) -> Callable[[Path], Any]:
        def change(folder: Path) -> None:
            raw = io.BytesIO()
            torch.save({"weight": torch.zeros(1 << 24)}, raw)
            with zipfile.ZipFile(raw) as plain, zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as packed:
                for entry in plain.namelist():
                    packed.writestr(entry, plain.read(entry))

        return change

    def read_memory(folder: Path) -> Any:
        return read_memory_file(folder / "memory.safetensors")

    def run_code(folder: Path) -> None:
        (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
        automatic = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": automatic}))

    def load_anything(folder: Path) -> Any:
        from new_llm.experiments.hugging_face_subject import load_hugging_face

        return load_hugging_face(str(folder), None, None)

    claims = {"weight": {"dtype": "F32", "shape": [10**12, 10**12], "data_offsets": [0, 64]}}
    twin = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    files = {
        "model: NaN": (spoil(own, put_in("model.safetensors", float("nan"))), load_own, "holds NaN or infinite values"),
        "model: infinity": (spoil(own, put_in("model.safetensors", float("inf"))), load_own, "NaN or infinite"),
        "model: a huge vocabulary": (spoil(own, edit("model.json", vocab_size=10**14)), load_own, "do not fit"),
        "model: an endless vocabulary": (spoil(own, edit("model.json", vocab_size=10**40)), load_own, "model.json"),
        "model: millions of layers": (
            spoil(own, edit("model.json", layers=[{"kind": "pythia"}] * 300_000)),
            load_own,
            "300,000 layers, but model.safetensors holds",
        ),
        "model: a huge layer": (spoil(own, edit_layer(hidden_size=1 << 40)), load_own, "model.json"),
        "model: a huge memory": (spoil(own, edit_layer(num_memory_banks=10**9)), load_own, "model.json|do not fit"),
        "model: a huge header": (spoil(own, head("model.safetensors", {}, 1 << 62)), load_own, "no safetensors file"),
        "model: a long header": (
            spoil(own, head("model.safetensors", {"a" * (5 << 20): 1})),
            load_own,
            "no safetensors file",
        ),
        "model: claimed shapes": (spoil(own, head("model.safetensors", claims)), load_own, "do not fit"),
        "model: a twin tensor": (
            spoil(own, write("model.safetensors", len(twin).to_bytes(8, "little") + twin + bytes(8))),
            load_own,
            "no safetensors file: its header is no JSON",
        ),
        "model: a pickle": (spoil(own, save_pickle("model.safetensors")), load_own, "no safetensors file"),
        "model: a pipe": (
            spoil({"model.json": own["model.json"]}, make_pipe("model.safetensors")),
            load_own,
            "no regular file",
        ),
        "gpt-neox: NaN": (spoil(neox, put_in("model.safetensors", float("nan"))), load_neox, "NaN or infinite"),
        "gpt-neox: endless layers": (
            spoil(neox, edit("config.json", num_hidden_layers=10**9)),
            load_neox,
            "1,000,000,000 layers, but the weights",
        ),
        "gpt-neox: a huge width": (
            spoil(neox, edit("config.json", hidden_size=1 << 40)),
            load_neox,
            "embed_in.weight has shape|config.json",
        ),
        "gpt-neox: a payload": (spoil(binary, save_payload("pytorch_model.bin")), load_neox, "not readable as plain"),
        "gpt-neox: a bare pickle": (
            spoil(binary, save_pickle("pytorch_model.bin")),
            load_neox,
            "no file of torch.save",
        ),
        "gpt-neox: packed entries": (spoil(binary, pack_zip("pytorch_model.bin")), load_neox, "holds packed entries"),
        "gpt-neox: an index that leads out": (
            spoil(
                {"config.json": neox["config.json"]},
                write("model.safetensors.index.json", json.dumps({"weight_map": {"a": "../../etc/passwd"}})),
            ),
            load_neox,
            "is no file of this folder",
        ),
        "gpt-neox: an index of a device": (
            spoil(
                {"config.json": neox["config.json"]},
                lambda folder: (
                    make_link("a.safetensors", "/dev/zero")(folder),
                    write("model.safetensors.index.json", '{"weight_map": {"a": "a.safetensors"}}')(folder),
                ),
            ),
            load_neox,
            "no regular file",
        ),
        "auto: code of the folder": (run_code, load_anything, "can't be loaded as a causal language model"),
        "memory: a pickle": (save_pickle("memory.safetensors"), read_memory, "but a pickle|no safetensors file"),
        "memory: a payload": (save_payload("memory.safetensors"), read_memory, "but a pickle"),
        "memory: a huge header": (head("memory.safetensors", {}, 1 << 62), read_memory, "no safetensors file"),
        "memory: a pipe": (make_pipe("memory.safetensors"), read_memory, "no regular file"),
        "memory: a device": (make_link("memory.safetensors", "/dev/zero"), read_memory, "no regular file"),
        "adapter: a payload": (
            save_payload("a.pt"),
            lambda folder: read_adapter_file(folder / "a.pt"),
            "not readable as plain tensors",
        ),
        "adapter: packed entries": (
            pack_zip("a.pt"),
            lambda folder: read_adapter_file(folder / "a.pt"),
            "holds packed entries",
        ),
        "adapter: a pipe": (make_pipe("a.pt"), lambda folder: read_adapter_file(folder / "a.pt"), "no regular file"),
        "checkpoint: a payload": (
            spoil(
                checkpoint.files,
                lambda folder: torch.save({"weights": Payload(folder)}, next(folder.rglob("trainer.pt"))),
            ),
            checkpoint.read,
            "not readable as plain tensors",
        ),
        "checkpoint: NaN": (
            spoil(
                checkpoint.files,
                lambda folder: put_in("model.safetensors", float("nan"))(next(folder.rglob("trainer.pt")).parent),
            ),
            checkpoint.read,
            "NaN or infinite",
        ),
    }
    return {name: Hostile(*parts) for name, parts in files.items()}
