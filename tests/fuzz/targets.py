"""Every reader of files from elsewhere: a valid folder for it, and the call that reads it."""

import gzip
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load, save

from new_llm.config import DataConfig, PythiaConfig
from new_llm.config.evaluation import FillConfig
from new_llm.data import dataset
from new_llm.data.local_files import read_file
from new_llm.data.tokenizer import read_tokenizer_file, train_tokenizer
from new_llm.experiments import ExperimentConfig, run_experiment
from new_llm.experiments.memory_filling import read_documents
from new_llm.experiments.run_folder import list_runs
from new_llm.experiments.subject import load_hugging_face
from new_llm.models import create_model, load_memory_file, load_model, save_memory_file, save_model, tensor_files
from new_llm.models.hf import NewLLMForCausalLM, export_pythia, load_pythia
from new_llm.models.hf.infini_adapter import create_pythia_with_parallel_infini, read_adapter_file, save_adapter
from new_llm.models.memory_file import read_memory_file
from new_llm.report import read_runs, refuse_other_forms, write_page
from new_llm.training.checkpoint import describe_fault, find_checkpoint, read_checkpoint
from tiny import SPEECHES, make_settings, write_lines

Read = Callable[[Path], Any]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TINY = PythiaConfig(vocab_size=384, max_position_embeddings=32, **SHAPE)
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Target:
    """A reader, and the files of a folder that it reads without complaint; of those named, or all, one is damaged."""

    files: dict[str, bytes]
    read: Read
    changed: tuple[str, ...] = ()


def build_targets(folder: Path, *, with_runs: bool = True) -> dict[str, Target]:
    """All targets by name, those of runs and checkpoints only if asked for: they need a training."""
    targets: dict[str, Target] = {}
    makers = (_make_texts, _make_tokens, _make_models, _make_memories, _make_runs)
    for make in makers if with_runs else makers[:-1]:
        inside = folder / make.__name__
        inside.mkdir(parents=True)
        targets |= make(inside)
    return targets


def take_folder(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TEXTS = [speech[start : start + 400] for speech in SPEECHES for start in (0, 400)]


def _make_texts(folder: Path) -> dict[str, Target]:
    lines = write_lines(folder / "lines.jsonl", TEXTS).read_bytes()
    pq.write_table(pa.table({"text": TEXTS, "n": list(range(len(TEXTS)))}), folder / "a.parquet", row_group_size=3)
    files = {
        "text.txt": "\n\n".join(TEXTS).encode(),
        "wiki.tokens": "".join(f" \n = Title {i} = \n \n {text} \n" for i, text in enumerate(TEXTS)).encode(),
        "lines.jsonl": lines,
        "packed.jsonl.zst": pa.Codec("zstd").compress(lines, asbytes=True),
        "packed.jsonl.gz": gzip.compress(lines),
        "packed.txt.xz": lzma.compress(lines),
        "table.parquet": (folder / "a.parquet").read_bytes(),
    }

    def read_all(folder: Path) -> None:
        for path in folder.iterdir():
            list(read_file(path, "text", max_bytes=MAX_BYTES))

    def read_blocks(folder: Path) -> None:
        for document in read_documents(folder / "text.txt", FillConfig(block_bytes=100), lambda _: None):
            list(document)

    targets = {name: Target({name: raw}, read_all) for name, raw in files.items()}
    targets["text in blocks"] = Target({"text.txt": files["text.txt"]}, read_blocks)
    return targets


def _make_tokens(folder: Path) -> dict[str, Target]:
    train_tokenizer(TEXTS, 300).save(str(folder / "tokenizer.json"))
    write_lines(folder / "lines.jsonl", TEXTS)
    settings = make_settings(folder / "lines.jsonl", folder)["data"]
    dataset.prepare_data(DataConfig(**settings, tokenizer=str(folder / "tokenizer.json"), cache_dir=folder / "cache"))
    (key,) = (path.name for path in (folder / "cache").iterdir() if path.is_dir())
    raw = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}

    def read_tokenizer(folder: Path) -> None:
        read_tokenizer_file(folder / "tokenizer.json").encode("The state of the Union.")

    return {
        "tokenizer.json": Target(raw, read_tokenizer),
        "token cache": Target(take_folder(folder / "cache" / key), dataset._load),  # None where anything has changed
    }


def _make_models(folder: Path) -> dict[str, Target]:
    torch.manual_seed(0)
    save_model(create_model("infini", TINY, segment_length=8), folder / "own")
    own = take_folder(folder / "own")
    own["model.safetensors"] = save(load(own["model.safetensors"]), metadata={"format": "pt"})  # without its digest
    export_pythia(create_model("pythia", TINY), folder / "neox", train_tokenizer(TEXTS, 300))
    neox = {name: raw for name, raw in take_folder(folder / "neox").items() if name != "generation_config.json"}
    config, weights = neox["config.json"], neox["model.safetensors"]
    NewLLMForCausalLM.from_model(create_model("infini", TINY)).save_pretrained(folder / "auto")
    auto = take_folder(folder / "auto") | {name: raw for name, raw in neox.items() if "token" in name}
    torch.save(load(weights), folder / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load(weights), "part-1.safetensors")}
    pickled = {"config.json": config, "pytorch_model.bin": (folder / "pytorch_model.bin").read_bytes()}
    sharded = {
        "config.json": config,
        "part-1.safetensors": weights,
        "model.safetensors.index.json": json.dumps(index).encode(),
    }

    def load_any(folder: Path) -> None:
        load_hugging_face(str(folder), None, None)

    return {
        "model folder": Target(own, load_model),
        "gpt-neox folder": Target(neox, load_any),
        "gpt-neox pickle": Target(pickled, load_pythia, ("pytorch_model.bin",)),
        "gpt-neox index": Target(sharded, load_pythia, ("model.safetensors.index.json",)),
        "auto folder": Target(auto, load_any),
    }


def _make_memories(folder: Path) -> dict[str, Target]:
    torch.manual_seed(0)
    model = create_model("multi_memory", TINY, segment_length=8, num_memories=2)
    model.reset_memory()
    model(torch.arange(24)[None] % 32, update_memory=True)
    save_memory_file(model, folder / "memory.safetensors")
    save_model(create_model("pythia", TINY), folder / "base")
    adapted = create_pythia_with_parallel_infini(folder / "base", segment_length=8)
    fresh = create_model("multi_memory", TINY, segment_length=8, num_memories=2)

    def read_memory(folder: Path) -> None:
        read_memory_file(folder / "memory.safetensors")
        load_memory_file(fresh, folder / "memory.safetensors", force=True)

    def read_adapter(folder: Path) -> None:
        for path in folder.iterdir():
            read_adapter_file(path)

    targets = {}
    for name, file, read in (
        ("memory", "memory.safetensors", read_memory),
        ("adapter", "adapter.safetensors", read_adapter),
        ("adapter, as .pt", "adapter.pt", read_adapter),
    ):
        if read is read_adapter:
            save_adapter(adapted, folder / file)
        raw = {file: (folder / file).read_bytes()}
        targets[name] = Target(raw, read)
        unchecked = mock.patch.object(tensor_files, "hash_content", mock.Mock(return_value=mock.ANY))(read)
        targets[f"{name}, any digest"] = Target(raw, unchecked)
    return targets


def _make_runs(folder: Path) -> dict[str, Target]:
    write_lines(folder / "lines.jsonl", TEXTS)
    settings = make_settings(folder / "lines.jsonl", folder / "runs") | {"model": SHAPE}
    settings["train"] |= {"num_epochs": 1, "keep_checkpoints": 1}
    run_experiment(exp_config=ExperimentConfig(name="run", models=("infini",), **settings))
    whole = take_folder(folder / "runs")
    checkpoint = {name.removeprefix("run/infini/"): raw for name, raw in whole.items() if "/checkpoints/" in name}
    last = str(Path(next(iter(checkpoint))).parent)
    small = {
        name: raw
        for name, raw in whole.items()
        if name.endswith((".json", ".jsonl", ".yaml")) and "/best/" not in name and "/checkpoints/" not in name
    }
    record = {"record_version": 1, "kind": "long", "status": "complete", "created": "2026-01-01T00:00:00+00:00"}
    record |= {"subject": {"model": "infini"}, "text": {"source": "text"}}
    record["result"] = {"ranges": [{"start": 0, "end": 16, "losses": 1.5, "perplexity": 4.5}]}
    small["run/evaluations/one.json"] = json.dumps(record).encode()

    def read_report(folder: Path) -> None:
        with refuse_other_forms([folder / "run"]):
            write_page(read_runs([folder / "run"]), folder / "page" / "report.html", with_figures=False)

    def read_newest(folder: Path) -> None:
        if (found := find_checkpoint(folder, lambda line: None)) is not None:
            read_named(folder, found)

    def read_named(folder: Path, place: Path | None = None) -> None:
        with describe_fault(place := place or folder / last):
            read_checkpoint(place)

    return {
        "runs": Target(small, list_runs),
        "checkpoint": Target(checkpoint, read_newest),
        "checkpoint, any manifest": Target(
            checkpoint, read_named, tuple(name for name in checkpoint if "manifest" not in name)
        ),
        "report": Target(small, read_report),  # last: see worker.limit_memory
    }
