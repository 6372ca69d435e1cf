import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from new_llm.config import DataConfig, UserError
from new_llm.data import tagged_encoding
from new_llm.data.batches import plan_batches
from new_llm.data.dataset import PreparedData, prepare_data
from new_llm.data.reversal_pairs import get_reversal_pairs
from new_llm.data.tokens import TokenSplit


def texts_of(data: PreparedData, split: TokenSplit) -> list[str]:
    return [data.tokenizer.decode(split.document(i).tolist()) for i in range(split.num_documents)]


@pytest.fixture
def config(tmp_path, speeches) -> DataConfig:
    """A source of twelve short speeches, and a cache of its own."""
    file = tmp_path / "speeches.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in speeches))
    return DataConfig(
        source=str(file),
        tokenizer_vocab_size=400,
        seq_length=32,
        num_samples=None,
        cache_dir=tmp_path / "cache",
    )


@pytest.fixture
def forbid_reading(monkeypatch):
    """Call it, and from then on nothing may be tokenised."""

    def forbid() -> None:
        def refuse(*args):
            raise AssertionError("the cache should have been used")

        monkeypatch.setattr(tagged_encoding, "encode_in_parallel", refuse)

    return forbid


def test_splits_are_whole_documents_and_disjoint(config, speeches):
    data = prepare_data(replace(config, reversal_pairs=False), 0)
    train, validation = texts_of(data, data.train), texts_of(data, data.validation)
    assert sorted(train + validation) == sorted(speeches)
    assert len(validation) == 1
    assert data.vocab_size == 512
    assert data.train.tokens.dtype == np.uint16
    assert data.train.num_bytes.sum() == sum(len(text.encode()) for text in train)
    other = prepare_data(replace(config, reversal_pairs=False), 1)
    assert texts_of(other, other.validation) != validation
    half = prepare_data(replace(config, validation_fraction=0.5), 0)
    assert half.validation.num_documents == 6


def test_forward_sentences_are_trained_on_and_backward_ones_never(config):
    data = prepare_data(config, 0)
    plain = prepare_data(replace(config, reversal_pairs=False), 0)
    train, validation = texts_of(data, data.train), texts_of(data, data.validation)
    pairs = get_reversal_pairs()
    pinned = train[: data.train.num_pinned_documents]
    assert sorted("\n".join(pinned).split("\n")) == sorted(pair.forward for pair in pairs)
    assert train[len(pinned) :] == texts_of(plain, plain.train)
    assert validation == texts_of(plain, plain.validation)
    everything = "\n".join(train + validation)
    assert not [pair for pair in pairs if pair.backward in everything]
    assert not [pair for pair in pairs if pair.forward in "\n".join(validation)]
    assert data.info["reversal_sentences"] == len(pairs)
    assert data.info["reversal_documents"] == len(pinned)
    assert plain.info["reversal_sentences"] == 0


def test_forward_sentences_are_among_any_number_of_samples(config):
    data = prepare_data(config, 0)
    first = data.train.offsets[data.train.num_pinned_documents]
    pinned = plan_batches(data.train, seq_length=32, batch_size=4, order="stream", seed=0, epoch=0).starts
    pinned = set(pinned[pinned < first].tolist())
    number = len(pinned) + 5
    plan = plan_batches(data.train, seq_length=32, batch_size=4, order="stream", seed=0, epoch=3, num_samples=number)
    assert len(plan.starts) == number
    assert pinned < set(plan.starts.tolist())


def test_info_is_plain_and_complete(config):
    data = prepare_data(config, 0)
    info = json.loads(json.dumps(data.info))
    assert info == data.info
    assert info["train"]["num_tokens"] == data.train.num_tokens
    assert info["train"]["num_documents"] == data.train.num_documents
    assert info["validation"]["num_bytes"] == data.validation.num_bytes.sum()
    assert info["tokenizer"]["num_entries"] == 400
    assert {len(info[name]) for name in ("source_fingerprint", "split_fingerprint")} == {64}
    assert info["notes"] == []
    few = prepare_data(replace(config, num_samples=3), 0)
    assert any("reversal sentences alone fill" in note for note in few.info["notes"])
    many = prepare_data(replace(config, num_samples=5000), 0)
    assert any("5,000 training samples were asked for" in note for note in many.info["notes"])


def test_a_second_call_reads_the_cache(config, forbid_reading):
    first = prepare_data(config, 0)
    forbid_reading()
    second = prepare_data(config, 0)
    assert isinstance(second.train.tokens, np.memmap)
    assert np.array_equal(first.train.tokens, second.train.tokens)
    assert np.array_equal(first.validation.offsets, second.validation.offsets)
    assert second.info == first.info
    assert second.tokenizer.to_str() == first.tokenizer.to_str()
    for change in ({"seq_length": 64}, {"tokenizer_vocab_size": 401}, {"validation_fraction": 0.3}):
        with pytest.raises(AssertionError):
            prepare_data(replace(config, **change), 0)
    with pytest.raises(AssertionError):
        prepare_data(config, 1)


def cut_file(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def damage_file(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(
    "name",
    [
        "00000.train.tokens",
        "00000.validation.index",
        "train.offsets.npy",
        "tokenizer.json",
        "00000.json",
        "plan.json",
        "meta.json",
    ],
)
@pytest.mark.parametrize("tear", [cut_file, damage_file, Path.unlink])
def test_a_torn_cache_is_rebuilt(config, name, tear):
    first = prepare_data(config, 0)
    expected, info = texts_of(first, first.train), first.info
    (folder,) = config.cache_dir.iterdir()
    tear(folder / name)
    again = prepare_data(config, 0)
    assert texts_of(again, again.train) == expected
    assert again.info == info
    assert [path.name for path in config.cache_dir.iterdir()] == [folder.name], "nothing else is left behind"


def test_an_interrupted_build_leaves_nothing(config, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tagged_encoding, "encode_in_parallel", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_data(config, 0)
    assert list(config.cache_dir.iterdir()) == []


def test_two_caches_of_the_same_data_are_equal(config, tmp_path):
    first = prepare_data(config, 0)
    second = prepare_data(replace(config, cache_dir=tmp_path / "other"), 0)
    assert first.info["split_fingerprint"] == second.info["split_fingerprint"]
    assert prepare_data(config, 1).info["split_fingerprint"] != first.info["split_fingerprint"]


def test_the_cache_folder(config, tmp_path, monkeypatch):
    monkeypatch.setenv("NEW_LLM_CACHE", str(tmp_path / "by-environment"))
    prepare_data(replace(config, cache_dir=None), 0)
    assert len(list((tmp_path / "by-environment").iterdir())) == 1
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="the token cache can't be written"):
        prepare_data(replace(config, cache_dir=tmp_path / "file"), 0)


def test_a_single_file_is_cut_into_parts_that_are_split(config, tmp_path, speeches):
    text = "\n\n".join(speeches)
    (tmp_path / "book.txt").write_text(text)
    data = prepare_data(replace(config, source=str(tmp_path / "book.txt"), reversal_pairs=False), 0)
    parts = texts_of(data, data.train) + texts_of(data, data.validation)
    assert len(parts) == 20
    assert sum(len(part) for part in parts) == len(text)
    assert all(part in text for part in parts)
    assert not set(texts_of(data, data.train)) & set(texts_of(data, data.validation))
    assert any("into 20 parts" in note for note in data.info["notes"])


def test_repeated_documents_are_read_once(config, tmp_path, speeches):
    file = tmp_path / "repeated.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in speeches * 3))
    data = prepare_data(replace(config, source=str(file), reversal_pairs=False), 0)
    assert data.train.num_documents + data.validation.num_documents == len(speeches)
    assert any("left out 24 documents" in note for note in data.info["notes"])


def test_a_long_source_is_not_read_to_its_end(config, tmp_path, speeches):
    file = tmp_path / "long.jsonl"
    long_lines = [json.dumps({"text": f"{i} {text}"}) for i in range(20) for text in speeches]
    file.write_text("\n".join([*long_lines, "no json"]))
    data = prepare_data(replace(config, source=str(file), num_samples=500, min_documents=2), 0)
    assert 20 < data.train.num_documents - data.train.num_pinned_documents < 120
    assert data.info["train"]["num_samples"] >= 500
    assert any(note.startswith("read the first") for note in data.info["notes"])
    assert prepare_data(replace(config, source=str(file), max_documents=15), 0).validation.num_documents == 2
    with pytest.raises(UserError, match="line 241 is no JSON object"):
        prepare_data(replace(config, source=str(file)), 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hello world.", "too short: it gives . tokens for training and . for validation; at least 32"),
        ("Hello", "too short: it holds 1 document of 5 characters that can't be cut"),
        ("a b", "too short"),
    ],
)
def test_a_source_that_is_too_short_gets_one_line(config, tmp_path, text, message):
    (tmp_path / "short.txt").write_text(text)
    for reversal_pairs in (True, False):
        options = replace(config, source=str(tmp_path / "short.txt"), reversal_pairs=reversal_pairs)
        with pytest.raises(UserError, match=message) as caught:
            prepare_data(options, 0)
        assert "\n" not in str(caught.value)


def test_a_given_tokenizer_and_the_real_pile(config, shared_data, forbid_reading):
    options = replace(
        config,
        source=str(shared_data / "pile" / "pile_10docs.jsonl"),
        tokenizer=str(shared_data / "tokenizer" / "20B_tokenizer.json"),
    )
    data = prepare_data(options, 0)
    assert data.vocab_size == 50_304
    assert data.train.num_documents - data.train.num_pinned_documents == 9
    forbid_reading()
    copied = config.cache_dir.parent / "tokenizer.json"
    shutil.copy(shared_data / "tokenizer" / "20B_tokenizer.json", copied)
    moved = prepare_data(replace(options, tokenizer=str(copied)), 0)
    assert np.array_equal(moved.train.tokens, data.train.tokens), "the tokenizer's content counts, not its path"
