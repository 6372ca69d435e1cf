"""The doctor finds each fault planted in the training data, and its search for shared text equals a naive one."""

import dataclasses
import re

import numpy as np
import pytest
from doctor_subjects import (
    CONFIG,
    PAIRS,
    check_only,
    examine,
    list_levels,
    make_data,
    make_untrained,
    read_texts,
)
from evaluation_stand_ins import make_split
from hypothesis import given, settings
from hypothesis import strategies as st

from new_llm.data.batches import BatchShape, plan_batches
from new_llm.evaluation.doctor import data_checks
from new_llm.evaluation.doctor.data_checks import (
    find_sequences,
    find_shared_spans,
)

DATA_CHECKS = dataclasses.replace(CONFIG, checks=("record", "batches", "documents", "spans", "reversal"))


def examine_data(data, **changes):
    return examine(make_untrained("pythia"), data, config=dataclasses.replace(DATA_CHECKS, **changes))


class ChangedPlan:
    """A plan of batches, each changed."""

    def __init__(self, plan, change):
        self.plan, self.change = plan, change

    def __len__(self):
        return len(self.plan)

    def __getitem__(self, index):
        batch = self.plan[index]
        return dataclasses.replace(batch, **self.change(batch))


def spoil_batches(monkeypatch, change):
    monkeypatch.setattr(data_checks, "plan_batches", lambda *a, **k: ChangedPlan(plan_batches(*a, **k), change))


@pytest.mark.parametrize("order", ["stream", "shuffled"])
def test_healthy_data(order):
    report = examine_data(make_data(order=order, shapes=(BatchShape(32, 4, None), BatchShape(8, 16, 100))))
    assert len(list_levels(report, "ok")) == 5


def test_labels_that_the_data_shifts(monkeypatch):
    spoil_batches(monkeypatch, lambda batch: {"labels": batch.labels.roll(-1, 1)})
    check_only(examine_data(make_data()), "fault", "batches", "shifts labels")


def test_labels_on_padding(monkeypatch):
    spoil_batches(monkeypatch, lambda batch: {"labels": batch.labels.clamp_min(0)})
    check_only(examine_data(make_data(order="shuffled")), "fault", "batches", "not the token at their place")


@pytest.mark.parametrize("order", ["stream", "shuffled"])
def test_memory_carried_into_another_document(order, monkeypatch):
    spoil_batches(monkeypatch, lambda batch: {"resets": batch.resets & False})
    check_only(examine_data(make_data(order=order)), "fault", "batches", "without a reset")


def test_every_stage_of_a_curriculum_is_checked(monkeypatch):
    spoil_batches(monkeypatch, lambda batch: {"resets": batch.resets & (batch.input_ids.shape[1] > 8)})
    shapes = (BatchShape(32, 4, None), BatchShape(8, 16, None))
    assert not list_levels(examine_data(make_data(order="shuffled", shapes=shapes[:1])), "fault")
    check_only(examine_data(make_data(order="shuffled", shapes=shapes)), "fault", "batches", "without a reset")


def test_a_validation_document_in_training():
    texts = read_texts()
    data = make_data(train=[*texts[:-2], texts[-1]])
    check_only(examine_data(data), "fault", "documents", "1 of 2 validation")


def test_part_of_a_validation_document_in_training():
    texts = read_texts()
    report = examine_data(make_data(train=[*texts[:-3], texts[-3] + " " + texts[-1][700:1700]]))
    check_only(report, "fault", "spans", "validation spans of 50 tokens")
    share, quoted = re.search(r"\(([\d.]+)%.*such as .(.{20})", report["spans"].found).groups()
    assert quoted in " ".join(texts[-1].split())
    assert 5 < float(share) < 50


def test_a_copied_document_is_a_fault_and_a_phrase_a_warning(monkeypatch):
    monkeypatch.setattr("new_llm.evaluation.doctor.data_checks.OVERLAP_SHARE", 1.0)
    texts = read_texts()
    copied = make_data(train=[*texts[:-2], texts[-1][:-5]])
    check_only(examine_data(copied), "fault", "spans", "are in training")
    phrase = make_data(train=[*texts[:-2], texts[-1][700:1200]])
    check_only(examine_data(phrase), "warning", "spans", "are in training")


@pytest.mark.parametrize("before", ["", "It is known that "])
def test_a_backward_sentence_in_training(before):
    data = make_data(train=[*read_texts()[:-2], f"{before}{PAIRS[3].backward}\nAnd so on."])
    check_only(examine_data(data), "fault", "reversal", PAIRS[3].backward)


def test_a_forward_sentence_in_validation():
    texts = read_texts()
    data = make_data(validation=[texts[-2] + f'\n"{PAIRS[5].forward}" they said.', texts[-1]])
    check_only(examine_data(data), "fault", "reversal", PAIRS[5].forward)


def test_pairs_that_were_never_trained_on():
    data = make_data()
    data = dataclasses.replace(data, train=data.validation, validation=data.train, pairs=data.pairs[:1])
    report = examine_data(dataclasses.replace(data, validation=data.train), checks=("reversal",))
    check_only(report, "warning", "reversal", "only 0 of 1 forward sentences")


def test_data_that_is_not_the_runs():
    data = make_data(differences=("the source fingerprint was 1 and is 2",))
    check_only(examine_data(data), "warning", "record", "the source fingerprint was 1 and is 2")


# The search for shared text: few different tokens, so that much is shared; documents may be empty or very short

documents = st.lists(st.lists(st.integers(0, 2), max_size=20), min_size=1, max_size=6)


def list_spans(document, length):
    return [tuple(document[i : i + length]) for i in range(len(document) - length + 1)]


@settings(deadline=None, max_examples=100)
@given(documents, documents, st.integers(2, 6))
def test_shared_spans_equal_a_naive_search(train, validation, length):
    known = {span for document in train for span in list_spans(document, length)}
    shared = [[span in known for span in list_spans(document, length)] for document in validation]
    places, is_shared = find_shared_spans(make_split(train), make_split(validation), length)
    offsets = make_split(validation).offsets
    expected = [offsets[number] + i for number, row in enumerate(shared) for i in range(len(row))]
    assert places.tolist() == expected
    assert is_shared.tolist() == [value for row in shared for value in row]


@settings(deadline=None, max_examples=60)
@given(documents, st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=6))
def test_sequences_are_found_inside_one_document(texts, sequences):
    found = find_sequences(make_split(texts), [np.array(sequence, np.int64) for sequence in sequences])
    for index, sequence in enumerate(sequences):
        holders = [i for i, text in enumerate(texts) if sequence and tuple(sequence) in list_spans(text, len(sequence))]
        assert found.get(index) == (holders[0] if holders else None)
