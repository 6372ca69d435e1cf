"""Model, memory, adapter and checkpoint files made to do harm."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hostile import Hostile, Payload, make_link, make_pipe, write
from safetensors.torch import save_file
from targets import Target

from new_llm.models import load_model
from new_llm.models.hf import load_pythia
from new_llm.models.hf.infini_adapter import read_adapter_file
from new_llm.models.memory_file import read_memory_file


def make_tensors(targets: dict[str, Target]) -> dict[str, Hostile]:
    own, neox, binary = (targets[name].files for name in ("model folder", "gpt-neox folder", "gpt-neox pickle"))
    memory = targets["memory"]
    checkpoint = targets.get("checkpoint, any manifest", Target({}, (), lambda folder: None))

    def load_own(folder: Path) -> Any:
        return load_model(folder)

    def load_neox(folder: Path) -> Any:
        return load_pythia(folder)

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

    def save_view(name: str, wrap: Callable[[torch.Tensor], Any]) -> Callable[[Path], Any]:
        """A tensor of a few bytes that is 120 GB wherever it is copied."""
        return lambda folder: torch.save(wrap(torch.zeros(1).expand(30_000_000, 1000)), folder / name)

    def add_zeros(folder: Path) -> None:
        """Three gigabytes at a file's end, which take no place on the disk."""
        os.truncate(folder / "memory.safetensors", 3 << 30)

    def read_memory(folder: Path) -> Any:
        return read_memory_file(folder / "memory.safetensors")

    def run_code(folder: Path) -> None:
        (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
        automatic = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": automatic}))

    def load_anything(folder: Path) -> Any:
        from new_llm.experiments.subject import load_hugging_face

        return load_hugging_face(str(folder), None, None)

    claims = {"weight": {"dtype": "F32", "shape": [10**12, 10**12], "data_offsets": [0, 64]}}
    files = {
        "model: NaN": (spoil(own, put_in("model.safetensors", float("nan"))), load_own, "holds NaN or infinite values"),
        "model: infinity": (spoil(own, put_in("model.safetensors", float("inf"))), load_own, "NaN or infinite"),
        "model: a huge vocabulary": (spoil(own, edit("model.json", vocab_size=10**14)), load_own, "vocab_size"),
        "model: an endless vocabulary": (spoil(own, edit("model.json", vocab_size=10**40)), load_own, "model.json"),
        "model: millions of layers": (
            spoil(own, edit("model.json", layers=[{"kind": "pythia"}] * 300_000)),
            load_own,
            "at most 1024 items",
        ),
        "model: a huge layer": (spoil(own, edit_layer(hidden_size=1 << 40)), load_own, "model.json"),
        "model: a huge memory": (spoil(own, edit_layer(num_memory_banks=10**9)), load_own, "model.json|do not fit"),
        "model: a huge header": (
            spoil(own, head("model.safetensors", {}, 1 << 62)),
            load_own,
            "not a safetensors file",
        ),
        "model: a long header": (
            spoil(own, head("model.safetensors", {"a" * (5 << 20): 1})),
            load_own,
            "not a safetensors file",
        ),
        "model: claimed shapes": (spoil(own, head("model.safetensors", claims)), load_own, "not a safetensors file"),
        "model: a pickle": (spoil(own, save_pickle("model.safetensors")), load_own, "not a safetensors file"),
        "model: a pipe": (
            spoil({"model.json": own["model.json"]}, make_pipe("model.safetensors")),
            load_own,
            "not a regular file",
        ),
        "gpt-neox: NaN": (spoil(neox, put_in("model.safetensors", float("nan"))), load_neox, "NaN or infinite"),
        "gpt-neox: endless layers": (
            spoil(neox, edit("config.json", num_hidden_layers=10**9)),
            load_neox,
            "num_hidden_layers",
        ),
        "gpt-neox: a huge width": (
            spoil(neox, edit("config.json", hidden_size=1 << 40)),
            load_neox,
            "config.json: PythiaConfig: hidden_size",
        ),
        "gpt-neox: a payload": (spoil(binary, save_payload("pytorch_model.bin")), load_neox, "not readable as plain"),
        "gpt-neox: a bare pickle": (
            spoil(binary, save_pickle("pytorch_model.bin")),
            load_neox,
            "not a file of torch.save",
        ),
        "gpt-neox: a view of 120 GB": (
            spoil(binary, save_view("pytorch_model.bin", lambda view: {"embed_out.weight": view})),
            load_neox,
            "its tensors are larger than the file",
        ),
        "gpt-neox: a sparse tensor": (
            spoil(binary, lambda folder: torch.save({"a": torch.eye(3).to_sparse()}, folder / "pytorch_model.bin")),
            load_neox,
            "not a dense one",
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
            "not a regular file",
        ),
        "auto: code of the folder": (run_code, load_anything, "can't be loaded as a causal language model"),
        "memory: zeros at its end": (spoil(memory.files, add_zeros), read_memory, "truncated, or not"),
        "memory: overlapping tensors": (
            head("memory.safetensors", {n: {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]} for n in "ab"}),
            read_memory,
            "not a safetensors file",
        ),
        "memory: a pickle": (save_pickle("memory.safetensors"), read_memory, "but a pickle|not a safetensors file"),
        "memory: a payload": (save_payload("memory.safetensors"), read_memory, "but a pickle"),
        "memory: a huge header": (head("memory.safetensors", {}, 1 << 62), read_memory, "not a safetensors file"),
        "memory: a pipe": (make_pipe("memory.safetensors"), read_memory, "not a regular file"),
        "memory: a device": (make_link("memory.safetensors", "/dev/zero"), read_memory, "not a regular file"),
        "adapter: a payload": (
            save_payload("a.pt"),
            lambda folder: read_adapter_file(folder / "a.pt"),
            "not readable as plain tensors",
        ),
        "adapter: a view of 120 GB": (
            save_view("a.pt", lambda view: {"metadata": {}, "tensors": [({"a": view},)]}),
            lambda folder: read_adapter_file(folder / "a.pt"),
            "its tensors are larger than the file",
        ),
        "adapter: packed entries": (
            pack_zip("a.pt"),
            lambda folder: read_adapter_file(folder / "a.pt"),
            "holds packed entries",
        ),
        "adapter: a pipe": (make_pipe("a.pt"), lambda folder: read_adapter_file(folder / "a.pt"), "not a regular file"),
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
