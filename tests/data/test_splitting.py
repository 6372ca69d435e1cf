import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from new_llm.data.builder import cut_text, pack_sentences, shuffle_sentences, split_documents
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
