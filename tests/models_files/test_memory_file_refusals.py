"""A file that is not what it should be is refused in one line: nothing is executed, nothing is changed."""

import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

import tiny
from model_cases import assert_states_equal, text_ids
from new_llm import TransformerLM
from new_llm.config import UserError
from new_llm.models import load_memory_file, save_memory_file
from new_llm.models.memory_file import read_memory_file
from new_llm.models.tensor_files import hash_content

make_model = functools.partial(tiny.make_model, segment_length=8)


def split(raw: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(header: dict | bytes, payload: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def change_metadata(**changes):
    """Other metadata, with a digest that fits them; None: left out."""

    def change(raw: bytes) -> bytes:
        header, payload = split(raw)
        metadata = {**header["__metadata__"], **changes}
        metadata = {key: value for key, value in metadata.items() if value is not None}
        if "sha256" not in changes:
            del metadata["sha256"]
            metadata["sha256"] = hash_content(metadata, load(raw))
        return join({**header, "__metadata__": metadata}, payload)

    return change


def change_layer(**changes):
    """Another record of the layer, with a digest that fits it; what the record does not have are settings."""

    def change(raw: bytes) -> bytes:
        (layer,) = json.loads(split(raw)[0]["__metadata__"]["layers"])
        for key, value in changes.items():
            (layer if key in layer else layer["settings"])[key] = value
        return change_metadata(layers=json.dumps([layer]))(raw)

    return change


def change_tensors(**changes: Callable[[Any], Tensor] | None):
    """Other tensors, each made of the old one, with a digest that fits them; None: left out."""

    def change(raw: bytes) -> bytes:
        header, _ = split(raw)
        tensors = load(raw)
        for key, make in changes.items():
            name = f"layers.0.{key}"
            old = tensors.pop(name, None)
            if make is not None:
                tensors[name] = make(old)
        metadata = header["__metadata__"]
        del metadata["sha256"]
        metadata["sha256"] = hash_content(metadata, tensors)
        return save(tensors, metadata=metadata)

    return change


def with_value(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


def flip_last_byte(raw: bytes) -> bytes:
    return raw[:-1] + bytes([raw[-1] ^ 1])


def nest_header(raw: bytes) -> bytes:
    return join(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"")


BROKEN = {
    "truncated payload": (lambda raw: raw[:-1], "truncated"),
    "longer": (lambda raw: raw + b"\0", "truncated, or not a safetensors file"),
    "flipped": (flip_last_byte, "corrupted"),
    "text": (lambda raw: b"To be, or not to be, that is the question", "not a safetensors file"),
    "header nested": (nest_header, "not a safetensors file"),
    "no metadata": (lambda raw: join({}, b""), "not a memory file"),
    "other format": (change_metadata(format="pt"), "not a memory file"),
    "format version": (change_metadata(format_version="1"), "format version 1, this program reads 2"),
    "other digest": (change_metadata(sha256="0" * 64), "corrupted"),
    "missing key": (change_metadata(created=None), "created"),
    "unknown key": (change_metadata(colour="red"), "unknown key 'colour'"),
    "long text": (change_metadata(created="x" * 100_000), "created"),
    "rows": (change_metadata(rows="2"), r"has shape \[\], not 2 rows|not 2 rows"),
    "layers no JSON": (change_metadata(layers="[{"), "JSON"),
    "layers nested": (change_metadata(layers="[" * 100_000), "JSON"),
    "state version": (change_layer(version=2), "layer 0: state version 2, this program reads 3"),
    "layer elsewhere": (change_layer(layer=1), "unknown tensor layers.0."),
    "endless layers": (change_layer(layer=2**80), "layer"),
    "an infinite setting": (change_layer(alibi_scale=1e999), "alibi_scale"),
    "a setting that is a tensor": (change_layer(memories=1), "unknown tensor layers.0.memories"),
    "NaN": (change_tensors(memories=with_value(float("nan"))), "NaN or infinite"),
    "negative count": (change_tensors(segment_counter=with_value(-1)), "impossible"),
    "overflowing count": (change_tensors(token_counts=with_value(2**62)), "impossible"),
    "no tensors": (
        change_tensors(
            **dict.fromkeys(
                ("memories", "memory_norms", "token_counts", "segment_counter", "segments_seen", "current_bank")
            )
        ),
        "no tensors of layers.0",
    ),
    "tensor's dtype": (change_tensors(memories=lambda t: t.to(torch.float8_e5m2)), "has shape .* of F8_E5M2, which"),
    "endless empty tensor": (change_tensors(memory_norms=lambda _: torch.zeros(2**40, 0)), "has shape .* no memory"),
}
UNFIT = {  # by the check of `set_memory_state`, whose refusals test_memory_state.py goes through
    "tensor missing": (change_tensors(memory_norms=None), r"keys \['memory_norms'\] do not match this model"),
    "no truth": (change_layer(use_delta_rule=1), "use_delta_rule 1, this model has True"),
    "additive": (change_layer(additive=True), "additive True"),
    "too large": (change_tensors(memories=lambda t: t.double() * 1e300), "NaN or infinite"),
}
"""Files that are whole, but no memory of the model."""


@pytest.fixture
def filled() -> TransformerLM:
    model = make_model()
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
    text = str(refused.value)
    assert "\n" not in text
    assert len(text) < 400 + len(str(path))
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
        ("infini", {"num_memory_banks": 2}, "num_memories 1, this model has 2"),
        ("infini", {"segments_per_bank": 2}, "segments_per_memory 4, this model has 2"),
        ("infini", {"use_delta_rule": False}, "use_delta_rule True, this model has False"),
        ("infini", {"use_alibi": True}, "alibi_scale 0.0, this model has 1.0"),
        ("transformer_xl", {}, r"layers \['0'\]: this model has memory in \[0, 1\]"),
        ("pythia", {}, r"layers \['0'\]: this model has memory in \[\]"),
    ],
)
def test_other_models(kind, options, message, valid):
    assert_refused(make_model(kind, **options), valid, message)
