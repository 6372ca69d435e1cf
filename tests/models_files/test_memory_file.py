"""A memory file carries a memory to another process and another machine, bit for bit."""

import hashlib
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open

from new_llm import TransformerLM, __version__
from new_llm.config import UserError
from new_llm.config.files import write_atomically
from new_llm.models import load_memory_file, save_memory_file, save_model, tensor_files
from new_llm.models.layers import HierarchicalLayer, InfiniLayer, MultiMemoryLayer, PythiaLayer
from new_llm.models.memory_file import merge_memory_files, pair_memories, read_memory_file
from new_llm.models.tensor_files import fingerprint_weights

KINDS = [
    ("infini", {}),
    ("infini", {"num_memory_banks": 3, "segments_per_bank": 2, "num_memory_heads": 4, "use_alibi": True}),
    ("multi_memory", {"num_memories": 2}),
    ("hierarchical", {"num_memories": 3, "use_delta_rule": False}),
    ("token_memory", {"num_memory_heads": 2}),
]

LOADER = """
import hashlib, sys, torch
from new_llm.models import load_memory_file, load_model

torch.set_num_threads(1)
model = load_model(sys.argv[1])
load_memory_file(model, sys.argv[2])
ids = torch.tensor([[int(i) for i in sys.argv[3].split()]])
print(hashlib.sha256(model(ids).detach().numpy().tobytes()).hexdigest())
"""


def make_mixed_model(vocab_size: int, hidden_size: int = 32) -> TransformerLM:
    torch.manual_seed(0)
    layers = [
        PythiaLayer(hidden_size, 4, 64),
        HierarchicalLayer(hidden_size, 4, 64, num_memories=2),
        InfiniLayer(hidden_size, 4, 64, num_memory_banks=2, use_alibi=True),
        MultiMemoryLayer(hidden_size, 4, 64, use_delta_rule=False),
        PythiaLayer(hidden_size, 4, 64),
    ]
    return TransformerLM(layers, vocab_size, 8, initializer_range=0.2)


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("per_row", [False, True])
def test_round_trip_is_bit_identical(kind, options, per_row, tmp_path, make_model, read_rows, same_state):
    model = make_model(kind, **options)
    model.reset_memory(3 if per_row else None)
    model(read_rows(3, 45), update_memory=True)
    save_memory_file(model, tmp_path / "m.safetensors")
    other = make_model(kind, **options)
    load_memory_file(other, tmp_path / "m.safetensors")
    same_state(model.get_memory_state(), other.get_memory_state())
    ids = read_rows(3, 70)[:, 45:]
    assert torch.equal(model(ids), other(ids))
    assert other.memory_rows == (3 if per_row else None)


def test_another_process_gives_identical_logits(tmp_path, make_model, read_rows, tokenizer):
    model = make_mixed_model(make_model().vocab_size)
    model(read_rows(2, 100), update_memory=True)
    save_model(model, tmp_path / "model")
    save_memory_file(model, tmp_path / "m.safetensors")
    ids = read_rows(1, 130)[:, 100:]
    arguments = [tmp_path / "model", tmp_path / "m.safetensors", " ".join(map(str, ids[0].tolist()))]
    done = subprocess.run(
        [sys.executable, "-c", LOADER, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == hashlib.sha256(model(ids).detach().numpy().tobytes()).hexdigest()


def test_a_model_without_memory_has_nothing_to_save(tmp_path, make_model):
    with pytest.raises(UserError, match="no memory layer"):
        save_memory_file(make_model("pythia"), tmp_path / "m.safetensors")
    for kind in ("rmt", "transformer_xl"):
        with pytest.raises(UserError, match=f"and not what {kind} carries"):
            save_memory_file(make_model(kind), tmp_path / "m.safetensors")


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


def test_metadata_are_strings_that_describe_the_file(tmp_path, make_model, read_rows):
    model = make_model(use_alibi=True)
    model(read_rows(2, 20), update_memory=True)
    save_memory_file(model, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == {
            "layers.0.memories",
            "layers.0.memory_norms",
            "layers.0.segment_counter",
            "layers.0.segments_seen",
            "layers.0.token_counts",
        }
    assert metadata["format"] == "new-llm-memory"
    assert metadata["format_version"] == "1"
    assert metadata["tokens_seen"] == "40"
    assert metadata["segments_seen"] == "6"
    assert metadata["rows"] == "shared"
    assert metadata["program_version"] == __version__
    assert metadata["weights_fingerprint"] == fingerprint_weights(model)
    assert metadata["created"].endswith("+00:00")
    layer = read_memory_file(tmp_path / "m.safetensors").record.layers[0]
    assert layer.kind == "infini"
    assert layer.use_delta_rule
    assert layer.decay == pytest.approx([0.996], abs=1e-3)


def test_force_takes_the_memory_of_other_weights(tmp_path, make_model, read_rows, same_state):
    model = make_model()
    model(read_rows(1, 20), update_memory=True)
    save_memory_file(model, tmp_path / "m.safetensors")
    other = make_model(seed=1)
    with pytest.raises(UserError, match="other weights"):
        load_memory_file(other, tmp_path / "m.safetensors")
    load_memory_file(other, tmp_path / "m.safetensors", force=True)
    same_state(model.get_memory_state(), other.get_memory_state())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file(error, tmp_path, make_model, read_rows, monkeypatch):
    path = tmp_path / "m.safetensors"
    model = make_model()
    save_memory_file(model, path)
    before = path.read_bytes()
    model(read_rows(1, 20), update_memory=True)

    @contextmanager
    def interrupt(path):
        with write_atomically(path) as temporary:
            yield temporary
            raise error

    monkeypatch.setattr(tensor_files, "write_atomically", interrupt)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError):
        save_memory_file(model, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# Merging


def save_part(model, ids, path):
    model.reset_memory()
    model(ids, update_memory=True)
    save_memory_file(model, path)


@pytest.mark.parametrize(
    ("kind", "options"), [("infini", {"num_memory_banks": 2, "segments_per_bank": 1}), ("hierarchical", {})]
)
def test_merge_is_one_call_that_reads_all(kind, options, tmp_path, make_model, read_rows, difference):
    model = make_model(kind, use_delta_rule=False, **options)
    ids = read_rows(3, 43)
    paths = [tmp_path / f"{row}.safetensors" for row in range(3)]
    for row, path in enumerate(paths):
        save_part(model, ids[row : row + 1], path)
    merged = merge_memory_files(paths, paths[0])
    model.reset_memory()
    model(ids, update_memory=True)
    expected = model.get_memory_state()
    assert difference(expected, merged.state) < 1e-6
    load_memory_file(model, paths[0])
    assert difference(expected, model.get_memory_state()) < 1e-6
    assert (merged.record.tokens_seen, merged.record.segments_seen) == (3 * 43, 3 * 6)


def test_merge_refuses_what_does_not_add(tmp_path, make_model, read_rows):
    ids = read_rows(1, 20)
    options = {
        "a": {"use_delta_rule": False},
        "delta": {},
        "decay": {"use_delta_rule": False, "use_alibi": True},
        "other": {"use_delta_rule": False, "seed": 1},
        "long": {"use_delta_rule": False, "segment_length": 16},
        "wide": {"use_delta_rule": False, "num_memory_heads": 4},
    }
    paths = {name: tmp_path / f"{name}.safetensors" for name in options}
    for name, path in paths.items():
        save_part(make_model(**options[name]), ids, path)
    out = tmp_path / "out.safetensors"
    for name, message in (
        ("delta", "delta.safetensors: layer 0 was written with the delta rule or with decay"),
        ("decay", "can.t be added"),
        ("other", "other.safetensors: filled by other weights than .*a.safetensors"),
        ("long", "segments of another length"),
    ):
        with pytest.raises(UserError, match=message):
            merge_memory_files([paths["a"], paths[name]], out)
        assert not out.exists()
    with pytest.raises(UserError, match="at least two"):
        merge_memory_files([paths["a"]], out)
    message = r"wide.safetensors: memories has shape \(1, 4, 8, 8\), .*a.safetensors \(1, 1, 32, 32\)"
    with pytest.raises(UserError, match=message):
        merge_memory_files([paths["a"], paths["wide"]], out, force=True)
    assert merge_memory_files([paths["a"], paths["other"]], out, force=True).record.tokens_seen == 40


# Comparing


def test_memories_are_compared_one_by_one(tmp_path, make_model, read_rows):
    model = make_model("multi_memory", num_memories=2)
    contents = []
    for length in (20, 30):
        model.reset_memory(2)
        model(read_rows(2, length), update_memory=True)
        save_memory_file(model, tmp_path / "m.safetensors")
        contents.append(read_memory_file(tmp_path / "m.safetensors"))
    pairs = pair_memories(*contents)
    assert [(one.layer, one.row, one.memory) for one, _ in pairs] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert [(one.num_tokens, other.num_tokens) for one, other in pairs] == [(12, 16), (8, 14)] * 2
    model.reset_memory()
    model(read_rows(2, 20), update_memory=True)
    save_memory_file(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="other layers, rows or shapes"):
        pair_memories(contents[0], read_memory_file(tmp_path / "m.safetensors"))
