"""Memory files carry a memory to another machine bit for bit, refuse what they are not, and are filled from text."""

import functools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

import tiny
from disk_faults import alter, edit_tensors
from model_cases import assert_states_equal, assert_states_near, text_ids
from new_llm import TransformerLM, __version__
from new_llm.config import UserError
from new_llm.config.evaluation import FillConfig
from new_llm.experiments import memory_filling
from new_llm.models import SelectiveOutputLM, load_memory_file, save_memory_file
from new_llm.models.layers import HierarchicalLayer, InfiniLayer, MultiMemoryLayer, PythiaLayer
from new_llm.models.memory_file import compare_memories, list_tensors, merge_memory_files, read_memory_file
from new_llm.models.tensor_files import fingerprint_weights
from tiny import SPEECHES, refused

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


def test_merge_refuses_what_does_not_add(tmp_path):
    options = {
        "a": {"use_delta_rule": False},
        "delta": {},
        "other": {"use_delta_rule": False, "seed": 1},
        "long": {"use_delta_rule": False, "segment_length": 16},
    }
    paths = {name: tmp_path / f"{name}.safetensors" for name in options}
    for name, path in paths.items():
        model = make_model(**options[name])
        model(text_ids(1, 20), update_memory=True)
        save_memory_file(model, path)
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


def test_tensors_are_compared_one_by_one(tmp_path):
    model = make_model("multi_memory", num_memories=2)
    contents = []
    for rows, length in ((2, 20), (2, 30), (None, 20)):
        model.reset_memory(rows)
        model(text_ids(2, length), update_memory=True)
        save_memory_file(model, tmp_path / "m.safetensors")
        contents.append(read_memory_file(tmp_path / "m.safetensors"))
    figures, (first, second) = compare_memories(*contents[:2]), map(list_tensors, contents[:2])
    places = [f"layer 0, row {row}: token_counts {memory}" for row in (0, 1) for memory in (0, 1)]
    assert [figures[place][:2] for place in places] == [(12, 16), (8, 14)] * 2
    a, b = (listed["layer 0, row 1: memories 1"] for listed in (first, second))
    assert a.shape == (2, 16, 16)
    expected = (a.norm(), b.norm(), (a - b).norm() / a.norm(), torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    assert figures["layer 0, row 1: memories 1"] == pytest.approx(tuple(map(float, expected)))
    with pytest.raises(ValueError, match=r"other layers, rows or shapes: layer 0, row 0: .* against nothing"):
        compare_memories(contents[0], contents[2])


NAMES = ("memories", "memory_norms", "token_counts", "segment_counter", "segments_seen", "current_bank")
BROKEN = {
    "truncated payload": (alter(lambda raw: raw[:-1]), "truncated"),
    "flipped": (alter(lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])), "corrupted"),
    "text": (alter(lambda raw: b"To be, or not to be, that is the question"), "not a safetensors file"),
    "other format": (edit_tensors(format="pt"), "not a memory file"),
    "format version": (edit_tensors(format_version="1"), "format version 1, this program reads 2"),
    "other digest": (edit_tensors(sha256="0" * 64), "corrupted"),
    "missing key": (edit_tensors(created=None), "created"),
    "unknown key": (edit_tensors(colour="red"), "unknown key 'colour'"),
    "long text": (edit_tensors(created="x" * 100_000), "created"),
    "rows": (edit_tensors(rows="2"), r"has shape \[\], not 2 rows|not 2 rows"),
    "layers nested": (edit_tensors(layers="[" * 100_000), "JSON"),
    "state version": (edit_tensors({"version": 2}), "layer 0: state version 2, this program reads 3"),
    "layer elsewhere": (edit_tensors({"layer": 1}), "unknown tensor layers.0."),
    "endless layers": (edit_tensors({"layer": 2**80}), "layer"),
    "an infinite setting": (edit_tensors({"alibi_scale": 1e999}), "alibi_scale"),
    "a setting that is a tensor": (edit_tensors({"memories": 1}), "unknown tensor layers.0.memories"),
    "NaN": (edit_tensors(tensors={"0.memories": float("nan")}), "NaN or infinite"),
    "negative count": (edit_tensors(tensors={"0.segment_counter": -1}), "impossible"),
    "no tensors": (edit_tensors(tensors={f"0.{name}": None for name in NAMES}), "no tensors of layers.0"),
    "tensor's dtype": (
        edit_tensors(tensors={"0.memories": torch.zeros(1).to(torch.float8_e5m2)}),
        "of F8_E5M2, which no memory",
    ),
    "endless empty tensor": (edit_tensors(tensors={"0.memory_norms": torch.zeros(2**40, 0)}), "has shape .* no memory"),
}
UNFIT = {  # by the check of `set_memory_state`, whose refusals test_memory_state.py has
    "tensor missing": (
        edit_tensors(tensors={"0.memory_norms": None}),
        r"keys \['memory_norms'\] do not match this model",
    ),
    "additive": (edit_tensors({"additive": True}), "additive True"),
    "too large": (
        edit_tensors(tensors={"0.memories": torch.full((1, 1, 32, 32), 1e300, dtype=torch.float64)}),
        "NaN or infinite",
    ),
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


def test_force_takes_the_memory_of_other_weights(filled, valid):
    other = make_model(seed=1)
    with pytest.raises(UserError, match="other weights"):
        load_memory_file(other, valid)
    load_memory_file(other, valid, force=True)
    assert_states_equal(filled.get_memory_state(), other.get_memory_state())


def assert_refused(model, path, message):
    before = model.get_memory_state()
    with refused(message) as caught:
        load_memory_file(model, path, force=True)
    assert len(str(caught.value)) < 400 + len(str(path))
    assert_states_equal(before, model.get_memory_state())


@pytest.mark.parametrize("name", [*BROKEN, *UNFIT])
def test_broken_files(name, filled, valid):
    change, message = (BROKEN | UNFIT)[name]
    change(valid)
    assert_refused(filled, valid, message)
    if name not in UNFIT:
        with pytest.raises(UserError, match=message):
            read_memory_file(valid)


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
    assert_refused(make_model(kind, **options), valid, message)


# Filling a memory from text files: in blocks, by documents, in order or row by row


SMALL = FillConfig(tokens_per_call=24, block_bytes=100)
KINDS = [
    ("infini", {}),
    ("infini", {"num_memory_banks": 2, "use_alibi": True}),
    ("multi_memory", {}),
    ("hierarchical", {"use_delta_rule": False}),
    ("token_memory", {}),
]


@pytest.fixture
def texts(tmp_path):
    paths = []
    for number, (text, length) in enumerate(zip(SPEECHES, (900, 2500, 1300), strict=False)):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_text(text[:length], encoding="utf-8")
    return paths


def encode(tokenizer, path):
    return torch.tensor([tokenizer.encode(path.read_text(encoding="utf-8")).ids])


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_filling_in_pieces_is_one_call(kind, options, texts, tokenizer):
    model = make_model(kind, **options)
    ids = encode(tokenizer, texts[1])
    with torch.no_grad():
        model(ids, update_memory=True)
    expected = model.get_memory_state()
    for config in (None, SMALL, FillConfig(tokens_per_call=1, block_bytes=7)):
        result = memory_filling.fill_memory(model, tokenizer, [texts[1]], config=config)
        assert_states_near(model.get_memory_state(), expected, 1e-5)
        assert (result.num_tokens, result.num_segments) == (ids.shape[1], -(-ids.shape[1] // 8))


PYTHIA, INFINI, MULTI = (lambda kind=kind: kind(32, 2, 64) for kind in (PythiaLayer, InfiniLayer, MultiMemoryLayer))


@pytest.mark.parametrize(
    ("kind", "layers", "num_run"),
    [
        (TransformerLM, (PYTHIA, INFINI, PYTHIA, MULTI, PYTHIA), 4),
        # the second pass of a memory layer reads what the layers above it made of the first
        (functools.partial(SelectiveOutputLM, skip_interval=1), (INFINI, PYTHIA), 2),
    ],
)
def test_layers_above_the_last_memory_run_only_in_several_passes(kind, layers, num_run, texts, tokenizer):
    torch.manual_seed(0)
    model = kind([make() for make in layers], 384, 8, initializer_range=0.2)
    assert list(memory_filling.take_memory_part(model).layers) == list(model.layers)[:num_run]
    assert len(model.layers) == len(layers)
    with torch.no_grad():
        model(encode(tokenizer, texts[0]), update_memory=True)
    expected = model.get_memory_state()
    memory_filling.fill_memory(model, tokenizer, texts[:1], config=SMALL)
    assert_states_near(model.get_memory_state(), expected, 1e-5)


def test_files_that_do_not_add_are_read_in_order(texts, tokenizer):
    model = make_model("infini")
    assert memory_filling.memory_adds(make_model("hierarchical", use_delta_rule=False))
    assert not memory_filling.memory_adds(model)
    assert not memory_filling.memory_adds(make_model(use_delta_rule=False, use_alibi=True))
    with torch.no_grad():
        for path in texts:
            model(encode(tokenizer, path), update_memory=True)
    expected = model.get_memory_state()
    memory_filling.fill_memory(model, tokenizer, texts, config=SMALL)
    assert_states_near(model.get_memory_state(), expected, 1e-5)
    memory_filling.fill_memory(model, tokenizer, texts[::-1], config=SMALL)
    with pytest.raises(AssertionError):
        assert_states_near(model.get_memory_state(), expected, 1e-3)


def test_documents_of_json_lines_begin_new_segments(tmp_path, tokenizer):
    documents = [SPEECHES[0][:500], SPEECHES[1][:333]]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in documents))
    for model in (make_model(), make_model(use_delta_rule=False)):
        with torch.no_grad():
            for text in documents:
                model(torch.tensor([tokenizer.encode(text).ids]), update_memory=True)
        expected = model.get_memory_state()
        memory_filling.fill_memory(model, tokenizer, [path], config=FillConfig(text_field="body", block_bytes=50))
        assert_states_near(model.get_memory_state(), expected, 1e-5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", b"", "empty: there is no text in it"),
        ("binary.txt", b"good text " * 50 + b"\0", "binary"),
        ("cut.txt", b"x " * 60 + "\xe9".encode()[:1], "0xc3"),
        ("broken.jsonl", b"{", "line 1: not a JSON object"),
    ],
)
def test_bad_files_are_refused_and_the_memory_stays(name, content, message, tmp_path, texts, tokenizer):
    model = make_model()
    memory_filling.fill_memory(model, tokenizer, texts[:1])
    before = model.get_memory_state()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with refused(message):
        memory_filling.fill_memory(model, tokenizer, [texts[0], tmp_path / name], config=SMALL)
    assert_states_equal(before, model.get_memory_state())


SNIPPETS = (
    "The memory of the world, ",
    "don't they're I'll ",
    "\n    return x\n\t\tif y:\n",
    "  two  spaces   three   ",
    "naïve café — “quoted” ",
    "日本語の文章。",
    "　全角の空白　",
    "🙂👍🏽 ",
    "e\u0301a\u0308 ",
    "\r\n",
    "\u00a0no-break\u2003em\u2028line ",
    "<|endoftext|>",
    "x" * 50,
    "(a)[b]{c};",
)


def assert_same_tokens(tokenizer: Tokenizer, text: str, block: int, limit: int = 10_000) -> None:
    blocks = [text[i : i + block] for i in range(0, len(text), block)]
    pieces = list(memory_filling.cut_at_white_space(blocks, limit))
    assert "".join(pieces) == text
    ids = [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False).ids]
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.sampled_from(SNIPPETS), max_size=30), block=st.integers(1, 60))
def test_cutting_changes_no_tokens(parts, block, tokenizer):
    assert_same_tokens(tokenizer, "".join(parts), block)


def test_cutting_changes_no_tokens_of_gpt_neox(shared_data):
    neox = Tokenizer.from_file(str(shared_data / "tokenizer" / "20B_tokenizer.json"))
    for block in (1, 7, 100):
        assert_same_tokens(neox, "".join(SNIPPETS * 3), block)
        assert_same_tokens(neox, SPEECHES[0][:8000], block)
    book = (shared_data / "books" / "middlemarch_145.txt").read_text(encoding="utf-8")
    assert_same_tokens(neox, book[:400_000], 5000)


def test_a_run_without_white_space_is_bounded():
    pieces = list(memory_filling.cut_at_white_space(["x" * 10] * 10, 25))
    assert "".join(pieces) == "x" * 100
    assert max(map(len, pieces)) == 30


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.sampled_from(SNIPPETS), min_size=1, max_size=30), block=st.integers(1, 40))
def test_files_are_read_as_they_are(parts, block, tmp_path):
    text = "begin" + "".join(parts)
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode("utf-8"))
    told: list[int] = []
    (document,) = memory_filling.read_documents(path, FillConfig(block_bytes=block), told.append)
    assert "".join(document) == text.replace("\r\n", "\n")
    assert sum(told) == path.stat().st_size
