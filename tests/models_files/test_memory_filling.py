"""Filling a memory from text files: in blocks, by documents, in order or row by row."""

import functools
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import tiny
from model_cases import assert_states_equal, assert_states_near
from new_llm import TransformerLM
from new_llm.config import UserError
from new_llm.config.evaluation import FillConfig
from new_llm.experiments.memory_filling import (
    cut_at_white_space,
    fill_memory,
    memory_adds,
    read_documents,
    take_memory_part,
)
from new_llm.models import SelectiveOutputLM
from new_llm.models.layers import InfiniLayer, MultiMemoryLayer, PythiaLayer
from tiny import SPEECHES

make_model = functools.partial(tiny.make_model, segment_length=8)
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
    """Three files of different lengths."""
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
        result = fill_memory(model, tokenizer, [texts[1]], config=config)
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
    part = take_memory_part(model)
    assert list(part.layers) == list(model.layers)[:num_run]
    assert len(model.layers) == len(layers)
    with torch.no_grad():
        model(encode(tokenizer, texts[0]), update_memory=True)
    expected = model.get_memory_state()
    fill_memory(model, tokenizer, texts[:1], config=SMALL)
    assert_states_near(model.get_memory_state(), expected, 1e-5)


def test_files_that_do_not_add_are_read_in_order(texts, tokenizer):
    model = make_model("infini")
    assert memory_adds(make_model("hierarchical", use_delta_rule=False))
    assert not memory_adds(model)
    assert not memory_adds(make_model(use_delta_rule=False, use_alibi=True))
    with torch.no_grad():
        for path in texts:
            model(encode(tokenizer, path), update_memory=True)
    expected = model.get_memory_state()
    fill_memory(model, tokenizer, texts, config=SMALL)
    assert_states_near(model.get_memory_state(), expected, 1e-5)
    fill_memory(model, tokenizer, texts[::-1], config=SMALL)
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
        fill_memory(model, tokenizer, [path], config=FillConfig(text_field="body", block_bytes=50))
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
    fill_memory(model, tokenizer, texts[:1])
    before = model.get_memory_state()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        fill_memory(model, tokenizer, [texts[0], tmp_path / name], config=SMALL)
    assert "\n" not in str(refused.value)
    assert_states_equal(before, model.get_memory_state())


# Text read in blocks is the same text, and its pieces give the same tokens


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
    pieces = list(cut_at_white_space(blocks, limit))
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
    pieces = list(cut_at_white_space(["x" * 10] * 10, 25))
    assert "".join(pieces) == "x" * 100
    assert max(map(len, pieces)) == 30


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.sampled_from(SNIPPETS), min_size=1, max_size=30), block=st.integers(1, 40))
def test_files_are_read_as_they_are(parts, block, tmp_path):
    text = "begin" + "".join(parts)
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode("utf-8"))
    told: list[int] = []
    (document,) = read_documents(path, FillConfig(block_bytes=block), told.append)
    assert "".join(document) == text.replace("\r\n", "\n")
    assert sum(told) == path.stat().st_size
