"""A file that is not what it should be is refused in one line: nothing is executed, nothing is changed."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

import tiny
from model_cases import assert_states_equal, text_ids
from new_llm import TransformerLM
from new_llm.config import UserError
from new_llm.models import load_memory_file, save_memory_file
from new_llm.models.memory_file import read_memory_file
from new_llm.models.tensor_files import hash_content


def edit(layer: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None, **metadata: Any) -> Any:
    """Another record of the layer, other tensors (or their first number), other metadata; None: left out.

    The digest fits, unless another is given.
    """

    def change(raw: bytes) -> bytes:
        (length,) = struct.unpack("<Q", raw[:8])
        facts, content = json.loads(raw[8 : 8 + length])["__metadata__"], load(raw)
        if layer is not None:
            (record,) = json.loads(facts["layers"])
            for key, value in layer.items():  # what the record does not have are settings
                (record if key in record else record["settings"])[key] = value
            facts["layers"] = json.dumps([record])
        for key, value in (tensors or {}).items():
            if isinstance(value, int | float):
                content[f"layers.0.{key}"].view(-1)[0] = value
            else:
                content[f"layers.0.{key}"] = value
        content = {name: t for name, t in content.items() if t is not None}
        facts = {key: value for key, value in (facts | metadata).items() if value is not None}
        if "sha256" not in metadata:
            facts["sha256"] = hash_content(facts, content)
        return save(content, metadata=facts)

    return change


NAMES = ("memories", "memory_norms", "token_counts", "segment_counter", "segments_seen", "current_bank")
BROKEN: dict[str, tuple[Any, str]] = {
    "truncated payload": (lambda raw: raw[:-1], "truncated"),
    "flipped": (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "corrupted"),
    "text": (lambda raw: b"To be, or not to be, that is the question", "not a safetensors file"),
    "other format": (edit(format="pt"), "not a memory file"),
    "format version": (edit(format_version="1"), "format version 1, this program reads 2"),
    "other digest": (edit(sha256="0" * 64), "corrupted"),
    "missing key": (edit(created=None), "created"),
    "unknown key": (edit(colour="red"), "unknown key 'colour'"),
    "long text": (edit(created="x" * 100_000), "created"),
    "rows": (edit(rows="2"), r"has shape \[\], not 2 rows|not 2 rows"),
    "layers nested": (edit(layers="[" * 100_000), "JSON"),
    "state version": (edit({"version": 2}), "layer 0: state version 2, this program reads 3"),
    "layer elsewhere": (edit({"layer": 1}), "unknown tensor layers.0."),
    "endless layers": (edit({"layer": 2**80}), "layer"),
    "an infinite setting": (edit({"alibi_scale": 1e999}), "alibi_scale"),
    "a setting that is a tensor": (edit({"memories": 1}), "unknown tensor layers.0.memories"),
    "NaN": (edit(tensors={"memories": float("nan")}), "NaN or infinite"),
    "negative count": (edit(tensors={"segment_counter": -1}), "impossible"),
    "no tensors": (edit(tensors=dict.fromkeys(NAMES)), "no tensors of layers.0"),
    "tensor's dtype": (edit(tensors={"memories": torch.zeros(1).to(torch.float8_e5m2)}), "of F8_E5M2, which no memory"),
    "endless empty tensor": (edit(tensors={"memory_norms": torch.zeros(2**40, 0)}), "has shape .* no memory"),
}
UNFIT: dict[str, tuple[Any, str]] = {  # by the check of `set_memory_state`, whose refusals test_memory_state.py has
    "tensor missing": (edit(tensors={"memory_norms": None}), r"keys \['memory_norms'\] do not match this model"),
    "additive": (edit({"additive": True}), "additive True"),
    "too large": (
        edit(tensors={"memories": torch.full((1, 1, 32, 32), 1e300, dtype=torch.float64)}),
        "NaN or infinite",
    ),
}
"""Files that are whole, but no memory of the model."""


@pytest.fixture
def filled() -> TransformerLM:
    model = tiny.make_model(segment_length=8)
    model(text_ids(1, 20), update_memory=True)
    return model


@pytest.fixture
def valid(filled, tmp_path) -> Path:
    save_memory_file(filled, tmp_path / "valid.safetensors")
    return tmp_path / "valid.safetensors"


def assert_refused(model, path, message):
    """Refused in one line of bounded length, and the model's memory is bit for bit as it was."""
    before = model.get_memory_state()
    with pytest.raises(UserError, match=message) as refused:
        load_memory_file(model, path, force=True)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400 + len(str(path))
    assert_states_equal(before, model.get_memory_state())


@pytest.mark.parametrize("name", [*BROKEN, *UNFIT])
def test_broken_files(name, filled, valid):
    change, message = (BROKEN | UNFIT)[name]
    path = valid.with_name("broken.safetensors")
    path.write_bytes(change(valid.read_bytes()))
    assert_refused(filled, path, message)
    if name not in UNFIT:
        with pytest.raises(UserError, match=message):
            read_memory_file(path)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("multi_memory", {}, "layer kind 'infini', this model has 'multi_memory'"),
        ("infini", {"num_memory_heads": 4}, r"memories has shape \(1, 1, 32, 32\), this model \(1, 4, 8, 8\)"),
        ("infini", {"segments_per_bank": 2}, "segments_per_memory 4, this model has 2"),
        ("infini", {"use_alibi": True}, "alibi_scale 0.0, this model has 1.0"),
        ("transformer_xl", {}, r"layers \['0'\]: this model has memory in \[0, 1\]"),
        ("pythia", {}, r"layers \['0'\]: this model has memory in \[\]"),
    ],
)
def test_other_models(kind, options, message, valid):
    assert_refused(tiny.make_model(kind, segment_length=8, **options), valid, message)
