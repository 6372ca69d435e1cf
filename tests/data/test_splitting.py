import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from new_llm.config import DataConfig, UserError
from new_llm.data.builder import cut_text, pack_sentences, shuffle_sentences, split_documents
from new_llm.data.dataset import prepare_data
from new_llm.data.sources import open_source
from new_llm.data.tokenizer import train_tokenizer


@given(num_documents=st.integers(2, 300), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_every_document_is_in_exactly_one_split(num_documents, fraction, seed):
    train, validation = split_documents(num_documents, fraction, seed)
    assert sorted([*train, *validation]) == list(range(num_documents))
    assert len(train) >= 1
    assert len(validation) >= 1
    assert abs(len(validation) - num_documents * fraction) <= 1
    again = split_documents(num_documents, fraction, seed)
    assert np.array_equal(again[1], validation)


@given(
    text=st.text(st.sampled_from("ab \n\t"), max_size=80).filter(str.strip) | st.text(min_size=1).filter(str.strip),
    num_parts=st.integers(1, 9),
)
def test_parts_join_to_the_text_and_none_is_blank(text, num_parts):
    parts = cut_text(text, num_parts)
    assert "".join(parts) == text
    assert 1 <= len(parts) <= num_parts
    assert all(part.strip() for part in parts)


def test_cuts_fall_at_blank_lines_where_there_are_enough():
    paragraphs = ["one line\nand another.\n\n"] * 30
    parts = cut_text("".join(paragraphs), 4)
    assert len(parts) == 4
    assert all(part.startswith("one line") and part.endswith(".\n\n") for part in parts)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 2 * len(paragraphs[0])
    lines = cut_text("Title\n\n" + "a line of verse\n" * 40, 4)
    assert len(lines) == 4
    assert all(part.endswith("\n") for part in lines)
    assert len(cut_text("word " * 100, 4)) == 4
    assert cut_text("漢字" * 50, 4) == [
        "漢字" * 12 + "漢",
        *["字漢" * 12 + "字"],
        "漢字" * 12 + "漢",
        "字" + "漢字" * 12,
    ]
    assert cut_text("x", 4) == ["x"]


def test_sentences_are_packed_in_a_seeded_order_into_documents_of_a_sample(speeches):
    tokenizer = train_tokenizer(speeches, 400)
    sentences = [f"The capital of country number {i} is town {i * 7}." for i in range(60)]
    shuffled = shuffle_sentences(sentences, 3)
    assert shuffled == shuffle_sentences(sentences, 3)
    assert shuffled != shuffle_sentences(sentences, 4)
    assert sorted(shuffled) == sorted(sentences)
    documents = list(pack_sentences(shuffled, tokenizer, 128))
    assert [line for document in documents for line in document.split("\n")] == shuffled
    sizes = [len(tokenizer.encode(document).ids) for document in documents]
    assert all(size <= 128 for size in sizes)
    assert all(size > 64 for size in sizes[:-1])
    assert list(pack_sentences(shuffled, tokenizer, 2)) == shuffled, "a sentence is never cut"
    assert list(pack_sentences([], tokenizer, 128)) == []


def write_texts(folder, names):
    folder.mkdir()
    for name in names:
        (folder / f"{name}.txt").write_text(f"{name} {'word ' * (20 + 7 * len(name))}\n")
    return folder


def test_sources_are_mixed_by_their_weights_until_one_is_used_up(tmp_path):
    for name, count in (("short", 60), ("long", 60)):
        write_texts(tmp_path / name, [f"{name}{i}" for i in range(count)])
    mixed = open_source(DataConfig(source=f"{tmp_path / 'short'}*3 + {tmp_path / 'long'}*1"))
    names = [Path(name).stem for name, _ in mixed.read()]
    sizes = {
        kind: sum(len(text) for name, text in mixed.read() if kind in Path(name).stem) for kind in ("short", "long")
    }
    assert sizes["short"] / sum(sizes.values()) == pytest.approx(0.75, abs=0.01)
    assert {"short0", "short59", "long0"} <= set(names)
    assert "long30" not in names
    other = open_source(DataConfig(source=f"{tmp_path / 'short'}*2+{tmp_path / 'long'}*1"))
    assert other.fingerprint != mixed.fingerprint
    for bad in (f"{tmp_path / 'short'}*1+{tmp_path / 'short'}*2", "sotu*0+pile*1", f"{tmp_path / 'absent'}*1"):
        with pytest.raises(UserError):
            open_source(DataConfig(source=bad))


def test_validation_documents_of_their_own_are_not_trained_on(tmp_path):
    train = write_texts(tmp_path / "train", [f"text{i}" for i in range(12)])
    held = write_texts(tmp_path / "held", ["text3", "other"])
    config = DataConfig(
        source=str(train),
        validation_source=str(held),
        tokenizer_vocab_size=300,
        seq_length=8,
        segments_per_sample=1,
        reversal_pairs=False,
        cache_dir=tmp_path / "cache",
    )
    data = prepare_data(config)
    texts = {
        name: [data.tokenizer.decode(split.document(i)) for i in range(split.num_documents)]
        for name, split in (("train", data.train), ("validation", data.validation))
    }
    assert sorted(text.split()[0] for text in texts["validation"]) == ["other", "text3"]
    assert {text.split()[0] for text in texts["train"]} == {f"text{i}" for i in range(12)} - {"text3"}
    assert data.info["validation_source"] == str(held)
    assert any("left out 1 documents" in note for note in data.info["notes"])
    alone = prepare_data(dataclasses.replace(config, validation_source=None))
    assert alone.info["split_fingerprint"] != data.info["split_fingerprint"]
