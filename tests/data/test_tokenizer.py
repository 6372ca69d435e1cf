import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from new_llm.config import UserError
from new_llm.data import get_tokenizer
from new_llm.data.tokenizer import (
    END_OF_TEXT,
    count_words,
    fingerprint_tokenizer,
    padded_vocab_size,
    tokenize_documents,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer(speeches):
    return train_tokenizer(speeches, 400)


def test_training_is_deterministic_and_keeps_to_the_size(tokenizer, speeches):
    assert fingerprint_tokenizer(train_tokenizer(iter(speeches), 400)) == fingerprint_tokenizer(tokenizer)
    assert fingerprint_tokenizer(train_tokenizer(speeches[1:], 400)) != fingerprint_tokenizer(tokenizer)
    assert tokenizer.get_vocab_size() == 400
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert padded_vocab_size(tokenizer) == 512


@given(text=st.text())
@settings(deadline=None)
def test_a_trained_tokenizer_loses_nothing(tokenizer, text):
    split = tokenize_documents([text, END_OF_TEXT], tokenizer)
    assert [tokenizer.decode(split.document(i).tolist()) for i in range(2)] == [text, END_OF_TEXT]


def test_documents_are_counted_as_raw_text(tokenizer):
    texts = [" Two words", "É", "a\n\nb  c"]
    split = tokenize_documents(texts, tokenizer)
    assert split.num_documents == 3
    assert split.num_bytes.tolist() == [10, 2, 7]
    assert split.num_words.tolist() == [3, 1, 3] == [count_words(text) for text in texts]
    assert split.num_tokens == len(split.tokens)
    assert [tokenizer.decode(split.document(i).tolist()) for i in range(3)] == texts
    with pytest.raises(IndexError):
        split.document(3)
    assert tokenize_documents([], tokenizer).num_tokens == 0


def test_a_tokenizer_file_cuts_and_pads_nothing(tokenizer, tmp_path, speeches):
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        assert get_tokenizer(place).encode(speeches[0]).ids == tokenizer.encode(speeches[0]).ids
        assert fingerprint_tokenizer(get_tokenizer(place)) == fingerprint_tokenizer(tokenizer)


def test_a_tokenizer_that_is_nowhere_gets_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match="'nobody/nothing' is not a file, is not cached here, and the hub"):
        get_tokenizer("nobody/nothing")


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": {"type": "BPE"', b"\xff\xfe"])
def test_a_corrupt_tokenizer_file_gets_one_line(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"not a valid tokenizer file|not UTF-8") as caught:
        get_tokenizer(str(file), 1.0)
    assert "\n" not in str(caught.value)
