"""A memory file carries a memory to another process and another machine, bit for bit."""

import functools

import pytest
from safetensors import safe_open

import tiny
from model_cases import assert_states_equal, text_ids
from new_llm import TransformerLM, __version__
from new_llm.config import UserError
from new_llm.models import load_memory_file, save_memory_file
from new_llm.models.layers import HierarchicalLayer, InfiniLayer, MultiMemoryLayer
from new_llm.models.memory_file import merge_memory_files, pair_tensors, read_memory_file
from new_llm.models.tensor_files import fingerprint_weights

make_model = functools.partial(tiny.make_model, segment_length=8)


def test_a_model_without_memory_has_nothing_to_save(tmp_path):
    with pytest.raises(UserError, match="no memory layer"):
        save_memory_file(make_model("pythia"), tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("layers", "num_bytes"),
    [
        ([InfiniLayer(512, 8, 64, num_memory_heads=8)], 133_120),
        ([InfiniLayer(512, 8, 64)], 1_050_624),
        ([MultiMemoryLayer(512, 8, 64)], 532_480),
        ([HierarchicalLayer(512, 8, 64) for _ in range(12)], 12 * 532_480),
    ],
)
def test_size_on_disk(layers, num_bytes, tmp_path):
    model = TransformerLM(layers, 16, 4)
    assert model.memory_info()["total_bytes"] == num_bytes
    save_memory_file(model, tmp_path / "m.safetensors")
    assert num_bytes < (tmp_path / "m.safetensors").stat().st_size <= num_bytes * 1.02 + 4096


def test_metadata_are_strings_that_describe_the_file(tmp_path):
    model = make_model(use_alibi=True)
    model(text_ids(2, 20), update_memory=True)
    save_memory_file(model, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata.pop("created").endswith("+00:00")
    assert {key: metadata[key] for key in ("format", "format_version", "rows", "program_version")} == {
        "format": "new-llm-memory",
        "format_version": "2",
        "rows": "shared",
        "program_version": __version__,
    }
    assert metadata["weights_fingerprint"] == fingerprint_weights(model)
    content = read_memory_file(tmp_path / "m.safetensors")
    (layer,) = content.record.layers
    assert (content.tokens_seen, layer.kind, layer.additive) == (40, "infini", False)
    assert (layer.settings["segments_per_memory"], layer.settings["alibi_scale"]) == (4, 1.0)


def test_force_takes_the_memory_of_other_weights(tmp_path):
    model = make_model()
    model(text_ids(1, 20), update_memory=True)
    save_memory_file(model, tmp_path / "m.safetensors")
    other = make_model(seed=1)
    with pytest.raises(UserError, match="other weights"):
        load_memory_file(other, tmp_path / "m.safetensors")
    load_memory_file(other, tmp_path / "m.safetensors", force=True)
    assert_states_equal(model.get_memory_state(), other.get_memory_state())


# Merging


def save_part(model, ids, path):
    model.reset_memory()
    model(ids, update_memory=True)
    save_memory_file(model, path)


def test_merge_refuses_what_does_not_add(tmp_path):
    ids = text_ids(1, 20)
    options = {
        "a": {"use_delta_rule": False},
        "delta": {},
        "other": {"use_delta_rule": False, "seed": 1},
        "long": {"use_delta_rule": False, "segment_length": 16},
    }
    paths = {name: tmp_path / f"{name}.safetensors" for name in options}
    for name, path in paths.items():
        save_part(make_model(**options[name]), ids, path)
    out = tmp_path / "out.safetensors"
    for name, message in (
        ("delta", r"layer 0 of .*delta.safetensors \(infini\): memories of different texts can.t be added"),
        ("other", "other.safetensors: filled by other weights than .*a.safetensors"),
        ("long", "segments of another length"),
    ):
        with pytest.raises(UserError, match=message):
            merge_memory_files([paths["a"], paths[name]], out)
        assert not out.exists()
    with pytest.raises(UserError, match="at least two"):
        merge_memory_files([paths["a"]], out)
    assert merge_memory_files([paths["a"], paths["other"]], out, force=True).tokens_seen == 40


# Comparing


def test_tensors_are_compared_one_by_one(tmp_path):
    model = make_model("multi_memory", num_memories=2)
    contents = []
    for rows, length in ((2, 20), (2, 30), (None, 20)):
        model.reset_memory(rows)
        model(text_ids(2, length), update_memory=True)
        save_memory_file(model, tmp_path / "m.safetensors")
        contents.append(read_memory_file(tmp_path / "m.safetensors"))
    pairs = pair_tensors(*contents[:2])
    places = [f"layer 0, row {row}: token_counts {memory}" for row in (0, 1) for memory in (0, 1)]
    assert [tuple(map(int, pairs[place])) for place in places] == [(12, 16), (8, 14)] * 2
    assert pairs["layer 0, row 1: memories 1"][0].shape == (2, 16, 16)
    with pytest.raises(ValueError, match=r"other layers, rows or shapes: layer 0, row 0: .* against nothing"):
        pair_tensors(contents[0], contents[2])
