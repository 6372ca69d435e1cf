"""Targets among the files that models and runs leave behind: memories, adapters, results, checkpoints."""

import json
from pathlib import Path
from typing import Any

import torch
from targets import Read, Target, find_texts, take_folder
from tiny_shape import TINY

from new_llm.config import DataConfig
from new_llm.experiments.config import ExperimentConfig
from new_llm.models import create_model, save_model, tensor_files


class _Agreeable(str):
    """A digest that equals any other: the reader behind the check is reached."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


def _without_digest(read: Read) -> Read:
    def read_unchecked(folder: Path) -> Any:
        own = tensor_files.hash_content
        tensor_files.hash_content = lambda metadata, tensors: _Agreeable()
        try:
            return read(folder)
        finally:
            tensor_files.hash_content = own

    return read_unchecked


def make_memories(folder: Path) -> dict[str, Target]:
    from new_llm.models import memory_file
    from new_llm.models.hf import infini_adapter as adapter_file
    from new_llm.models.hf.infini_adapter import create_pythia_with_parallel_infini, save_adapter

    torch.manual_seed(0)
    model = create_model("multi_memory", TINY, segment_length=8, num_memories=2)
    model.reset_memory()
    model(torch.arange(24)[None] % 32, update_memory=True)
    memory_file.save_memory_file(model, folder / "memory.safetensors")
    save_model(create_model("pythia", TINY), folder / "base")
    adapted = create_pythia_with_parallel_infini(folder / "base", segment_length=8)
    for name in ("adapter.safetensors", "adapter.pt"):
        save_adapter(adapted, folder / name)
    fresh = create_model("multi_memory", TINY, segment_length=8, num_memories=2)

    def read_memory(folder: Path) -> None:
        memory_file.read_memory_file(folder / "memory.safetensors")
        memory_file.load_memory_file(fresh, folder / "memory.safetensors", force=True)

    targets = {}
    raw = {"memory.safetensors": (folder / "memory.safetensors").read_bytes()}
    for name, read in (("memory", read_memory), ("memory, any digest", _without_digest(read_memory))):
        targets[name] = Target(raw, tuple(raw), read, 0.8)
    for file in ("adapter.safetensors", "adapter.pt"):

        def read_adapter(folder: Path, file: str = file) -> None:
            adapter_file.read_adapter_file(folder / file)

        raw = {file: (folder / file).read_bytes()}
        targets[file] = Target(raw, (file,), read_adapter, 0.6)
        targets[f"{file}, any digest"] = Target(raw, (file,), _without_digest(read_adapter), 0.6)
    return targets


def make_runs(folder: Path) -> dict[str, Target]:
    from new_llm.config import EvalConfig, TrainConfig
    from new_llm.experiments import run_experiment
    from new_llm.experiments.config import ModelConfig
    from new_llm.experiments.run_folder import list_runs
    from new_llm.report import read_runs, write_page
    from new_llm.training.checkpoint import describe_fault, find_checkpoint, read_checkpoint

    source = folder / "lines.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in find_texts()))
    kept: dict[str, bytes] = {}

    config = ExperimentConfig(
        name="run",
        models=("infini",),
        runs_dir=folder / "runs",
        model=ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
        data=DataConfig(
            source=str(source),
            tokenizer_vocab_size=300,
            seq_length=16,
            segments_per_sample=2,
            num_samples=8,
            reversal_pairs=False,
            cache_dir=folder / "cache",
        ),
        train=TrainConfig(num_epochs=1, batch_size=4),
        eval=EvalConfig(context=16, stride=8, max_tokens=100, measures=("sliding", "streaming")),
    )
    from new_llm.training import checkpoint

    save = checkpoint.save_checkpoint

    def save_and_keep(model_folder: Path, *args: Any, **options: Any) -> None:
        save(model_folder, *args, **options)
        kept.update(take_folder(model_folder / "checkpoints"))

    import new_llm.training.loop as loop

    for module in (checkpoint, loop):
        if hasattr(module, "save_checkpoint"):
            module.save_checkpoint = save_and_keep
    try:
        run_experiment(["infini"], config)
    finally:
        for module in (checkpoint, loop):
            if hasattr(module, "save_checkpoint"):
                module.save_checkpoint = save
    run = {f"run/{name}": raw for name, raw in take_folder(folder / "runs" / "run").items()}
    small = {
        name: raw for name, raw in run.items() if name.endswith((".json", ".jsonl", ".yaml")) and "/best/" not in name
    }
    small["run/evaluations/one.json"] = json.dumps(
        {
            "record_version": 1,
            "kind": "long",
            "status": "complete",
            "created": "2026-01-01T00:00:00+00:00",
            "subject": {"model": "infini"},
            "text": {"source": "text"},
            "result": {"ranges": [{"start": 0, "end": 16, "losses": 1.5, "perplexity": 4.5}]},
        }
    ).encode()
    last = sorted({Path(name).parts[0] for name in kept})[-1]
    whole = {f"checkpoints/{name}": raw for name, raw in kept.items() if name.startswith(last)}

    def read_report(folder: Path) -> None:
        write_page(read_runs([folder / "run"]), folder / "page" / "report.html", with_figures=False)

    def read_any_checkpoint(folder: Path) -> None:
        place = folder / "checkpoints" / last
        with describe_fault(place):
            read_checkpoint(place)

    def find_and_read(folder: Path) -> None:
        found = find_checkpoint(folder, lambda line: None)
        if found is not None:
            with describe_fault(found):
                read_checkpoint(found)

    return {
        "runs": Target(small, tuple(small), lambda folder: list_runs(folder), 0.5),
        "report": Target(small, tuple(name for name in small if not name.endswith(".yaml")), read_report, 0.25),
        "checkpoint": Target(whole, tuple(whole), find_and_read, 0.4),
        "checkpoint, any manifest": Target(
            whole, tuple(name for name in whole if "manifest" not in name), read_any_checkpoint, 0.8
        ),
    }
