import numpy as np
import pytest
from evaluation_stand_ins import make_split
from hypothesis import given, settings
from hypothesis import strategies as st

from new_llm.evaluation.doctor_overlap import (
    count_shared_documents,
    find_sequences,
    find_shared_spans,
    hash_window,
    iter_windows,
)

# Few different tokens, so that much is shared; documents may be empty or shorter than a span.
documents = st.lists(st.lists(st.integers(0, 2), max_size=20), min_size=1, max_size=6)


def list_spans(document, length):
    return [tuple(document[i : i + length]) for i in range(len(document) - length + 1)]


@settings(deadline=None, max_examples=150)
@given(documents, documents, st.integers(2, 6), st.integers(1, 9), st.sampled_from([1, 5, 1 << 20]))
def test_shared_spans_equal_a_naive_search(train, validation, length, block, max_windows):
    known = {span for document in train for span in list_spans(document, length)}
    shared = [[span in known for span in list_spans(document, length)] for document in validation]
    found = find_shared_spans(make_split(train), make_split(validation), length, block=block, max_windows=max_windows)
    assert found.num_windows == sum(map(len, shared))
    assert found.num_shared == sum(map(sum, shared))
    expected = {index: sum(row) / len(row) for index, row in enumerate(shared) if any(row)}
    assert found.per_document == pytest.approx(expected)
    assert (found.example is None) == (found.num_shared == 0)
    if found.example is not None:
        (document, at), (other, other_at), tokens = found.example
        assert train[document][at : at + length] == tokens.tolist() == validation[other][other_at : other_at + length]


@settings(deadline=None, max_examples=100)
@given(documents, st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=6))
def test_sequences_are_found_where_they_stand_inside_one_document(texts, sequences):
    found = dict(find_sequences(make_split(texts), [np.array(sequence, np.int64) for sequence in sequences]))
    for index, sequence in enumerate(sequences):
        holders = [i for i, text in enumerate(texts) if sequence and tuple(sequence) in list_spans(text, len(sequence))]
        assert found.get(index) == (holders[0] if holders else None)


def test_a_rolling_hash_is_that_of_its_window():
    document = np.random.default_rng(0).integers(50_000, size=300)
    split = make_split([document.tolist()])
    places, hashes = (np.concatenate(parts) for parts in zip(*iter_windows(split, 50, 64), strict=True))
    assert places.tolist() == list(range(251))
    assert [hash_window(document[place : place + 50]) for place in places] == hashes.tolist()


def test_shared_documents():
    train, validation = make_split([[1, 2, 3], [4], [], [5, 6]]), make_split([[5, 6], [], [1, 2], [5, 6]])
    assert count_shared_documents(train, validation) == [(3, 0), (3, 3)]
