"""An adapter's file: written and read alone, and nothing is believed of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from new_llm import TransformerLM, create_model
from new_llm.config import UserError
from new_llm.models import save_model
from new_llm.models.hf.infini_adapter import (
    add_parallel_infini,
    attach_adapter,
    load_adapted_model,
    read_adapter_file,
    read_base_name,
    save_adapter,
)
from new_llm.models.layers.parallel_infini import AdapterConfig
from new_llm.models.tensor_files import fingerprint_weights, hash_content
from tiny import make_shape

SHAPE = make_shape(vocab_size=128, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.2)
IDS = torch.tensor([list(b"we the people of the united states")])
FORMATS = ("adapter.pt", "adapter.safetensors")


def make_base(seed: int = 0) -> TransformerLM:
    torch.manual_seed(seed)
    return create_model("pythia", SHAPE, segment_length=8)


def make_adapted(base_name: str | None = None, **options: Any) -> TransformerLM:
    base = make_base()
    torch.manual_seed(1)
    config = AdapterConfig(**({"initial_alpha": 0.5, "layers": (0, 2)} | options))
    return add_parallel_infini(base, config, base_name=base_name)


@pytest.mark.parametrize("name", FORMATS)
def test_an_adapter_comes_back_on_its_base(tmp_path, name):
    model = make_adapted(num_memory_banks=2, use_alibi=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.segment_length = 4
    save_adapter(model, tmp_path / name)
    again = attach_adapter(make_base(), tmp_path / name)
    assert again.segment_length == 4
    assert torch.equal(again(IDS), model(IDS))
    assert again.get_alpha() == model.get_alpha()
    weights = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert (tmp_path / name).stat().st_size < weights + 20_000


@pytest.mark.parametrize("name", FORMATS)
def test_the_base_is_found_by_the_name_in_the_file(tmp_path, name):
    save_model(make_base(), tmp_path / "base")
    model = make_adapted(base_name=str(tmp_path / "base"))
    save_adapter(model, tmp_path / name)
    assert read_base_name(tmp_path / name) == str(tmp_path / "base")
    assert torch.equal(load_adapted_model(tmp_path / name)(IDS), model(IDS))
    (tmp_path / "base").rename(tmp_path / "moved")
    assert torch.equal(load_adapted_model(tmp_path / name, tmp_path / "moved")(IDS), model(IDS))
    save_adapter(make_adapted(), tmp_path / name)
    with pytest.raises(UserError, match="does not say which base"):
        load_adapted_model(tmp_path / name)


def test_an_adapter_of_other_weights_needs_force(tmp_path):
    save_adapter(make_adapted(base_name="runs/base"), tmp_path / "a.pt")
    stranger = make_base(seed=5)
    before = fingerprint_weights(stranger)
    with pytest.raises(UserError, match=r"trained on another base \(runs/base, fingerprint") as refused:
        attach_adapter(stranger, tmp_path / "a.pt")
    assert "\n" not in str(refused.value)
    assert fingerprint_weights(stranger) == before
    assert attach_adapter(stranger, tmp_path / "a.pt", force=True).get_alpha() == {0: 0.5, 2: 0.5}


def test_a_base_that_was_trained_goes_with_its_adapter(tmp_path):
    model = make_adapted(freeze_base_model=False)
    with torch.no_grad():
        model.embed_in.weight.add_(0.1)
        model.layers[0].base_layer.mlp.dense_h_to_4h.weight.mul_(1.1)
    save_adapter(model, tmp_path / "a.pt", with_base=True)
    assert torch.equal(attach_adapter(make_base(seed=3), tmp_path / "a.pt")(IDS), model(IDS))


Change = Callable[[dict[str, str], dict[str, Tensor]], None]


def rewrite(source: Path, target: Path, change: Change, *, digest: bool = True) -> None:
    """The file with other content, its digest made right again."""
    if source.suffix == ".pt":
        content = torch.load(source, weights_only=True)
        metadata, tensors = content["metadata"], content["tensors"]
    else:
        with safe_open(source, "pt") as file:
            metadata = dict(file.metadata())
        tensors = load_file(source)
    if digest:
        metadata.pop("sha256")
    change(metadata, tensors)
    if digest:
        metadata["sha256"] = hash_content(metadata, tensors)
    if target.suffix == ".pt":
        torch.save({"metadata": metadata, "tensors": tensors}, target)
    else:
        save_file(tensors, target, metadata=metadata)


def put_nan(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    tensors["layers.0.alpha"] = torch.tensor(float("nan"))


def cut_tensor(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    tensors["layers.0.attention.gate"] = torch.zeros(3)


def drop_tensor(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    del tensors["layers.2.alpha"]


def add_tensor(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    tensors["embed_in.weight"] = torch.zeros(128, 32)


def make_integers(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    tensors["layers.0.attention.gate"] = torch.zeros(1, dtype=torch.int64)


def change_quietly(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    tensors["layers.0.alpha"] += 0.25


def set_metadata(name: str, value: str) -> Change:
    def change(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
        metadata[name] = value

    return change


def set_option(name: str, value: Any, layer: str = "0") -> Change:
    def change(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
        layers = json.loads(metadata["layers"])
        layers.setdefault(layer, dict(layers["0"]))[name] = value
        metadata["layers"] = json.dumps(layers)

    return change


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put_nan, "NaN or infinite"),
        (cut_tensor, "has shape"),
        (drop_tensor, "missing or unknown tensors"),
        (add_tensor, "missing or unknown tensors"),
        (make_integers, "not a tensor of floats"),
        (set_metadata("format", "new-llm-memory"), "not an adapter file"),
        (set_metadata("format_version", "99"), "format version 99, this program reads 1"),
        (set_metadata("segment_length", "-4"), "segment_length"),
        (set_metadata("layers", "["), "broken metadata"),
        (set_metadata("layers", "[" * 100_000), "broken metadata"),
        (set_metadata("colour", "red"), "colour"),
        (set_option("num_memory_banks", 10**12), "num_memory_banks"),
        (set_option("num_memory_heads", 7), "does not fit this base"),
        (set_option("use_delta_rule", "yes"), "use_delta_rule"),
        (set_option("initial_alpha", 0.5, layer="7"), "has layers 0 to 2"),
        (set_option("initial_alpha", 0.5, layer="-1"), "layers"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path, name, change, said):
    save_adapter(make_adapted(), tmp_path / f"good-{name}")
    rewrite(tmp_path / f"good-{name}", tmp_path / name, change)
    model = make_base()
    before = fingerprint_weights(model)
    with pytest.raises(UserError, match=said) as refused:
        attach_adapter(model, tmp_path / name)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
    assert name in str(refused.value)
    assert fingerprint_weights(model) == before


@pytest.mark.parametrize("name", FORMATS)
def test_a_changed_file_is_corrupted(tmp_path, name):
    save_adapter(make_adapted(), tmp_path / f"good-{name}")
    rewrite(tmp_path / f"good-{name}", tmp_path / name, change_quietly, digest=False)
    with pytest.raises(UserError, match="corrupted"):
        read_adapter_file(tmp_path / name)


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_or_foreign_file_is_refused(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(UserError, match="no such file"):
        read_adapter_file(path)
    save_adapter(make_adapted(), path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:-200]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=name) as refused:
            read_adapter_file(path)
        assert "\n" not in str(refused.value)
