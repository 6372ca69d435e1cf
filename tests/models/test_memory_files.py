"""Memory files carry a memory to another machine bit for bit, refuse what they are not, and are filled from text."""

import functools
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import tiny
from disk_faults import alter, edit_tensors
from model_cases import assert_states_equal, assert_states_near, text_ids
from new_llm import TransformerLM
from new_llm.config import UserError
from new_llm.config.evaluation import FillConfig
from new_llm.experiments import memory_filling
from new_llm.models import SelectiveOutputLM, load_memory_file, save_memory_file
from new_llm.models.layers import HierarchicalLayer, InfiniLayer, MultiMemoryLayer, PythiaLayer
from new_llm.models.memory_file import compare_memories, list_tensors, merge_memory_files, read_memory_file
from tiny import SPEECHES, refused

make_model = functools.partial(tiny.make_model, segment_length=8)


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


def test_what_does_not_add_is_not_merged_and_a_model_without_memory_has_nothing_to_save(tmp_path):
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
    assert merge_memory_files([paths["a"], paths["other"]], out, force=True).tokens_seen == 40
    with pytest.raises(UserError, match="no memory layer"):
        save_memory_file(make_model("pythia"), out)


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
    with pytest.raises(ValueError, match=r"layers, rows or shapes differ: layer 0, row 0: .* and nothing"):
        compare_memories(contents[0], contents[2])


NAMES = ("memories", "memory_norms", "token_counts", "segment_counter", "segments_seen", "current_bank")
BROKEN = {
    "truncated payload": (alter(lambda raw: raw[:-1]), "truncated"),
    "flipped": (alter(lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])), "corrupted"),
    "text": (alter(lambda raw: b"To be, or not to be, that is the question"), "not a safetensors file"),
    "other format": (edit_tensors(format="pt"), "not a memory file"),
    "format version": (edit_tensors(format_version="1"), "format version 1; this program reads 2"),
    "other digest": (edit_tensors(sha256="0" * 64), "corrupted"),
    "no date": (edit_tensors(created=None), "created"),
    "no version": (edit_tensors(program_version=None), "program_version"),
    "no fingerprint": (edit_tensors(weights_fingerprint=None), "weights_fingerprint"),
    "unknown key": (edit_tensors(colour="red"), "unknown key 'colour'"),
    "long text": (edit_tensors(created="x" * 100_000), "created"),
    "rows": (edit_tensors(rows="2"), r"has shape \[\], not 2 rows|not 2 rows"),
    "layers nested": (edit_tensors(layers="[" * 100_000), "JSON"),
    "state version": (edit_tensors({"version": 2}), "layer 0: state version 2; this program reads 3"),
    "layer elsewhere": (edit_tensors({"layer": 1}), "unknown tensor layers.0."),
    "endless layers": (edit_tensors({"layer": 2**80}), "layer"),
    "an infinite setting": (edit_tensors({"alibi_scale": 1e999}), "alibi_scale"),
    "a setting that is a tensor": (edit_tensors({"memories": 1}), "unknown tensor layers.0.memories"),
    "NaN": (edit_tensors(tensors={"0.memories": float("nan")}), "NaN or infinite"),
    "negative count": (edit_tensors(tensors={"0.segment_counter": -1}), "impossible"),
    "no tensors": (edit_tensors(tensors={f"0.{name}": None for name in NAMES}), "no tensors for layers.0"),
    "tensor's dtype": (
        edit_tensors(tensors={"0.memories": torch.zeros(1).to(torch.float8_e5m2)}),
        "of F8_E5M2, which is impossible",
    ),
    "endless empty tensor": (
        edit_tensors(tensors={"0.memory_norms": torch.zeros(2**40, 0)}),
        "has shape .* impossible in a memory",
    ),
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
def valid(filled, tmp_path):
    save_memory_file(filled, tmp_path / "valid.safetensors")
    return tmp_path / "valid.safetensors"


def test_force_takes_the_memory_of_other_weights(filled, valid):
    other = make_model(seed=1)
    with pytest.raises(UserError, match="other weights"):
        load_memory_file(other, valid)
    load_memory_file(other, valid, force=True)
    assert_states_equal(filled.get_memory_state(), other.get_memory_state())


@pytest.mark.parametrize("name", [*BROKEN, *UNFIT])
def test_broken_files(name, filled, valid):
    change, message = (BROKEN | UNFIT)[name]
    change(valid)
    before = filled.get_memory_state()
    with refused(message) as caught:
        load_memory_file(filled, valid, force=True)
    assert len(str(caught.value)) < 400 + len(str(valid))
    assert_states_equal(before, filled.get_memory_state())
    if name not in UNFIT:
        with pytest.raises(UserError, match=message):
            read_memory_file(valid)


# Filling a memory from text files: in blocks, by documents, in order or row by row


SMALL = FillConfig(tokens_per_call=24, block_bytes=100)
KINDS = [
    ("infini", {"num_memory_banks": 2, "use_alibi": True}),
    ("infini", {"use_delta_rule": False, "use_alibi": True}),
    ("infini", {"use_delta_rule": False}),
    ("multi_memory", {}),
    ("token_memory", {}),
]
ODD = "don't I'll (a)[b]{c};\n    return x\n\t\tif y:\n  two  spaces   naïve café — “quoted” 日本語。　全角　"
ODD += "🙂👍🏽 e\u0301a\u0308 \r\n\u00a0no-break\u2003em\u2028line <|endoftext|>" + "x" * 50


@pytest.fixture
def text(tmp_path):
    (path := tmp_path / "0.txt").write_text(SPEECHES[0][:900], encoding="utf-8")
    return path


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    texts=st.lists(st.text(st.sampled_from(ODD), max_size=300).map("begin".__add__), min_size=1, max_size=3),
    as_lines=st.booleans(),
    block_bytes=st.integers(1, 60),
    tokens_per_call=st.sampled_from((1, 24, 4096)),
)
def test_a_filled_memory_is_that_of_one_call_per_document(
    kind, texts, as_lines, block_bytes, tokens_per_call, tmp_path, tokenizer
):
    """In the order of files or lines; a byte order mark is no text, and ends of lines are those of Unix."""
    model = make_model(kind[0], **kind[1])
    if as_lines:
        paths = [tmp_path / "documents.jsonl"]
        paths[0].write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    else:
        texts = texts[: 1 if memory_filling.memory_adds(model) else None]  # memories of several files would be merged
        paths = [tmp_path / f"{number}.txt" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        texts = [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts]
    ids = [torch.tensor([tokenizer.encode(text).ids]) for text in texts]
    with torch.no_grad():
        for one in ids:
            model(one, update_memory=True)
    expected, told = model.get_memory_state(), list[int]()
    config = FillConfig(text_field="body", block_bytes=block_bytes, tokens_per_call=tokens_per_call)
    result = memory_filling.fill_memory(model, tokenizer, paths, config=config, on_bytes=told.append)
    assert_states_near(model.get_memory_state(), expected, 1e-5)
    assert result.num_tokens == sum(one.shape[1] for one in ids)
    assert result.num_segments == sum(-(-one.shape[1] // 8) for one in ids)
    assert as_lines or sum(told) == sum(path.stat().st_size for path in paths)


PYTHIA, INFINI, MULTI = (lambda kind=kind: kind(32, 2, 64) for kind in (PythiaLayer, InfiniLayer, MultiMemoryLayer))


@pytest.mark.parametrize(
    ("kind", "layers", "num_run"),
    [
        (TransformerLM, (PYTHIA, INFINI, PYTHIA, MULTI, PYTHIA), 4),
        # the second pass of a memory layer reads what the layers above it made of the first
        (functools.partial(SelectiveOutputLM, skip_interval=1), (INFINI, PYTHIA), 2),
    ],
)
def test_layers_above_the_last_memory_run_only_in_several_passes(kind, layers, num_run, text, tokenizer):
    torch.manual_seed(0)
    model = kind([make() for make in layers], 384, 8, initializer_range=0.2)
    assert list(memory_filling.take_memory_part(model).layers) == list(model.layers)[:num_run]
    assert len(model.layers) == len(layers)
    with torch.no_grad():
        model(torch.tensor([tokenizer.encode(text.read_text(encoding="utf-8")).ids]), update_memory=True)
    expected = model.get_memory_state()
    memory_filling.fill_memory(model, tokenizer, [text], config=SMALL)
    assert_states_near(model.get_memory_state(), expected, 1e-5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", b"", "empty.txt: the file is empty"),
        ("binary.txt", b"good text " * 50 + b"\0", "binary"),
        ("cut.txt", b"x " * 60 + "\xe9".encode()[:1], "0xc3"),
        ("broken.jsonl", b"{", "line 1: not a JSON object"),
    ],
)
def test_bad_files_are_refused_and_the_memory_stays(name, content, message, tmp_path, text, tokenizer):
    model = make_model()
    memory_filling.fill_memory(model, tokenizer, [text])
    before = model.get_memory_state()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with refused(message):
        memory_filling.fill_memory(model, tokenizer, [text, tmp_path / name], config=SMALL)
    assert_states_equal(before, model.get_memory_state())


def test_cutting_changes_no_tokens_of_gpt_neox(shared_data):
    neox = Tokenizer.from_file(str(shared_data / "tokenizer" / "20B_tokenizer.json"))
    book = (shared_data / "books" / "middlemarch_145.txt").read_text(encoding="utf-8")
    small = [(ODD * 3, block) for block in (1, 7, 100)]
    for text, block in (*small, (SPEECHES[0][:8000], 7), (book[:400_000], 5000)):
        blocks = [text[i : i + block] for i in range(0, len(text), block)]
        pieces = list(memory_filling.cut_at_white_space(blocks, 10_000))
        assert "".join(pieces) == text
        ids = [i for piece in pieces for i in neox.encode(piece, add_special_tokens=False).ids]
        assert ids == neox.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("ab", 0),
        (" ab", 0),
        ("ab cd ef", 5),
        ("ab cd ", 2),  # more white space may follow
        ("ab cd  ef", 2),  # a single space is preferred
        ("ab  cd", 2),  # before white space, never inside it
        ("ab\n\ncd", 2),
        ("ab \n cd", 2),
        ("ab\t\tcd", 2),
    ],
)
def test_a_cut_is_before_white_space_and_after_a_visible_character(text, cut):
    assert memory_filling.find_cut(text) == cut


def test_a_run_without_white_space_is_bounded():
    pieces = list(memory_filling.cut_at_white_space(["x" * 10] * 10, 25))
    assert "".join(pieces) == "x" * 100
    assert max(map(len, pieces)) == 30
