import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from new_llm.config import DataConfig, UserError
from new_llm.config.measurement import TextConfig
from new_llm.data.dataset import prepare_data
from new_llm.data.evaluation_text import read_evaluation_text
from new_llm.data.tokenizer import train_tokenizer
from new_llm.data.tokens import TokenSplit

CODES = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "f4": 6, "u2": 8}


def write_megatron(
    prefix: Path,
    documents: list[list[list[int]]],
    dtype: str = "u2",
    *,
    closes_documents: bool = True,
    num_pieces: int | None = None,
) -> None:
    """Write documents of sequences of tokens as Megatron-LM's builder does."""
    sequences = [sequence for document in documents for sequence in document]
    raw = [np.array(sequence, dtype=f"<{dtype}").tobytes() for sequence in sequences]
    places = np.cumsum([0, *map(len, raw)])[:-1] if raw else np.zeros(0)
    entries = np.cumsum([0, *map(len, documents)]) if closes_documents else np.zeros(1)
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, CODES[dtype], len(sequences), len(entries))
    index += np.array([len(sequence) for sequence in sequences], dtype="<i4").tobytes()
    index += places.astype("<i8").tobytes() + entries.astype("<i8").tobytes()
    prefix.with_name(f"{prefix.name}.idx").write_bytes(index)
    tokens = b"".join(raw)
    if num_pieces is None:
        prefix.with_name(f"{prefix.name}.bin").write_bytes(tokens)
        return
    size = -(-len(tokens) // num_pieces) | 1  # odd: tokens lie across the pieces, too
    for piece in range(num_pieces):
        name = f"{prefix.name}-{piece:05d}-of-{num_pieces:05d}.bin"
        prefix.with_name(name).write_bytes(tokens[piece * size : (piece + 1) * size])


@pytest.fixture
def tokenizer_file(tmp_path, speeches) -> Path:
    file = tmp_path / "tokenizer.json"
    train_tokenizer(speeches, 400).save(str(file))
    return file


@pytest.fixture
def documents(tokenizer_file, speeches) -> list[list[list[int]]]:
    """Twelve documents of two or three sequences each."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    texts = [tokenizer.encode(text, add_special_tokens=False).ids for text in speeches]
    return [[ids[:100], ids[100:350], ids[350:]] if i % 2 else [ids[:7], ids[7:]] for i, ids in enumerate(texts)]


@pytest.fixture
def config(tmp_path, tokenizer_file) -> DataConfig:
    return DataConfig(
        source=str(tmp_path / "tokens"),
        tokenizer=str(tokenizer_file),
        seq_length=32,
        num_samples=None,
        reversal_pairs=False,
        cache_dir=tmp_path / "cache",
    )


def list_documents(*splits: TokenSplit) -> list[list[int]]:
    return sorted(split.document(i).tolist() for split in splits for i in range(split.num_documents))


def join(documents: list[list[list[int]]]) -> list[list[int]]:
    return sorted([token for sequence in document for token in sequence] for document in documents)


@pytest.mark.parametrize("dtype", ["u2", "i4", "i8"])
@pytest.mark.parametrize("ending", ["", ".idx", ".bin"])
def test_tokens_stay_as_they_are(config, documents, tmp_path, speeches, dtype, ending):
    write_megatron(tmp_path / "tokens", documents, dtype)
    data = prepare_data(replace(config, source=f"{config.source}{ending}"), 0)
    assert list_documents(data.train, data.validation) == join(documents)
    assert data.validation.num_documents == 1
    sizes = data.train.num_bytes.sum() + data.validation.num_bytes.sum()
    assert sizes == sum(len(text.encode()) for text in speeches), "the text is decoded to be counted"
    assert data.train.tokens.dtype == np.uint16


def test_pieces_are_read_as_one_file(config, documents, tmp_path):
    write_megatron(tmp_path / "tokens", documents, num_pieces=5)
    data = prepare_data(config, 0)
    assert list_documents(data.train, data.validation) == join(documents)
    (tmp_path / "tokens-00003-of-00005.bin").unlink()
    with pytest.raises(UserError, match="one of 00005 pieces, of which 4 are here"):
        prepare_data(config, 0)


def test_without_document_ends_every_sequence_is_a_document(config, documents, tmp_path):
    write_megatron(tmp_path / "tokens", documents, closes_documents=False)
    data = prepare_data(config, 0)
    different = {tuple(sequence) for document in documents for sequence in document}
    assert list_documents(data.train, data.validation) == sorted(map(list, different)), "repeated ones are left out"


def test_a_large_one_is_sharded_like_text(config, documents, tmp_path):
    many = [[[*sequence, i] for sequence in document] for i in range(20) for document in documents]
    write_megatron(tmp_path / "tokens", many)
    large = replace(config, max_spool_characters=20_000, shard_characters=20_000, reversal_pairs=True)
    data = prepare_data(large, 0)
    pinned = data.train.num_pinned_documents
    assert pinned > 0
    found = [data.train.document(i).tolist() for i in range(pinned, data.train.num_documents)]
    assert sorted(found + list_documents(data.validation)) == join(many)
    few = prepare_data(replace(config, num_samples=1000), 0)
    assert 1000 <= few.info["train"]["num_samples"] < 1200, "only what is needed is read"


def test_a_tokenizer_must_be_named_and_know_the_tokens(config, documents, tmp_path, monkeypatch):
    write_megatron(tmp_path / "tokens", documents)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"tokens: holds tokens: data.tokenizer must name the tokenizer"):
        prepare_data(replace(config, tokenizer="auto"), 0)
    write_megatron(tmp_path / "tokens", [*documents, [[1, 2, 60_000]]])
    with pytest.raises(UserError, match="holds the token 60000, which the tokenizer of 512 entries does not know"):
        prepare_data(config, 0)
    with pytest.raises(UserError, match="holds tokens, not text"):
        read_evaluation_text(TextConfig(source=config.source), prepare_tokenizer(config))


def prepare_tokenizer(config: DataConfig):
    from new_llm.data.tokenizer import load_tokenizer

    return load_tokenizer(config.tokenizer, 1.0)


def change(place: int, kind: str, value: int):
    def damage(raw: bytearray) -> bytearray:
        struct.pack_into(f"<{kind}", raw, place, value)
        return raw

    return damage


HEADER_BYTES = 9 + 8 + 1 + 8 + 8
LYING_INDICES = {
    "magic": (lambda raw: b"NO" + raw[2:], "does not begin with MMIDIDX"),
    "empty": (lambda raw: b"", "does not begin with MMIDIDX"),
    "version": (change(9, "Q", 2), "version 2 of Megatron's index; only 1 is known"),
    "type": (change(17, "B", 6), "unknown type 6"),
    "many sequences": (change(18, "Q", 1 << 60), "sequences and .* document entries need"),
    "one sequence more": (change(18, "Q", 31), "need"),
    "cut": (lambda raw: raw[:-9], "document entries need"),
    "long sequence": (change(HEADER_BYTES, "i", 1 << 30), "sequence 0 of 1,073,741,824 tokens .* lies outside"),
    "negative sequence": (change(HEADER_BYTES + 4, "i", -5), "sequence 1 of -5 tokens"),
    "far place": (change(HEADER_BYTES + 4 * 30, "q", 1 << 50), "lies outside the binary file"),
    "negative place": (change(HEADER_BYTES + 4 * 30, "q", -8), "lies outside the binary file"),
    "falling documents": (change(HEADER_BYTES + 12 * 30 + 8 * 5, "q", 3), "document index does not rise"),
    "first document": (change(HEADER_BYTES + 12 * 30, "q", 1), "document index does not rise from 0 to 30"),
    "last document": (change(HEADER_BYTES + 12 * 30 + 8 * 12, "q", 99), "document index does not rise from 0 to 30"),
}


@pytest.mark.parametrize("name", LYING_INDICES)
def test_an_index_that_lies_gets_one_line(config, documents, tmp_path, name):
    write_megatron(tmp_path / "tokens", documents)
    damage, message = LYING_INDICES[name]
    index = tmp_path / "tokens.idx"
    index.write_bytes(damage(bytearray(index.read_bytes())))
    with pytest.raises(UserError, match=message) as caught:
        prepare_data(config, 0)
    assert "\n" not in str(caught.value)
    assert "tokens.idx" in str(caught.value)


def test_sequences_that_lie_on_one_another(config, documents, tmp_path):
    write_megatron(tmp_path / "tokens", documents)
    index = tmp_path / "tokens.idx"
    raw = bytearray(index.read_bytes())
    num_tokens = (tmp_path / "tokens.bin").stat().st_size // 2
    for sequence in range(30):  # each says that it is the whole file
        struct.pack_into("<i", raw, HEADER_BYTES + 4 * sequence, num_tokens)
        struct.pack_into("<q", raw, HEADER_BYTES + 4 * 30 + 8 * sequence, 0)
    index.write_bytes(raw)
    with pytest.raises(UserError, match="its sequences are longer than the binary file"):
        prepare_data(config, 0)


def test_missing_files_and_negative_tokens(config, documents, tmp_path):
    write_megatron(tmp_path / "tokens", [*documents, [[3, -4]]], "i4")
    with pytest.raises(UserError, match="document 12 holds the negative token -4"):
        prepare_data(config, 0)
    (tmp_path / "tokens.bin").unlink()
    with pytest.raises(UserError, match=r"tokens\.bin: no such file"):
        prepare_data(config, 0)
    (tmp_path / "tokens.idx").unlink()
    with pytest.raises(UserError, match=r"tokens\.idx: no such file"):
        prepare_data(replace(config, source=f"{config.source}.bin"), 0)
