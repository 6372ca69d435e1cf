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
from new_llm.evaluation.doctor.data_checks import find_sequences, find_shared_spans

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


@pytest.mark.parametrize("order", ["stream", "shuffled"])
def test_healthy_data(order):
    report = examine_data(make_data(order=order, shapes=(BatchShape(32, 4, None), BatchShape(8, 16, 100))))
    assert len(list_levels(report, "ok")) == 5


@pytest.mark.parametrize(
    ("change", "order", "words"),
    [
        (lambda batch: {"labels": batch.labels.roll(-1, 1)}, "stream", "shifts labels"),
        (lambda batch: {"labels": batch.labels.clamp_min(0)}, "shuffled", "not the token at their place"),
        (lambda batch: {"resets": batch.resets & False}, "stream", "without a reset"),
        (lambda batch: {"resets": batch.resets & (batch.input_ids.shape[1] > 8)}, "shuffled", "without a reset"),
    ],
)
def test_faults_of_batches(change, order, words, monkeypatch):
    monkeypatch.setattr(data_checks, "plan_batches", lambda *a, **k: ChangedPlan(plan_batches(*a, **k), change))
    data = make_data(order=order, shapes=(BatchShape(32, 4, None), BatchShape(8, 16, None)))
    check_only(examine_data(data), "fault", "batches", words)


TEXTS, (FORWARD, BACKWARD) = read_texts(), (PAIRS[5].forward, PAIRS[3].backward)


@pytest.mark.parametrize(
    ("changes", "level", "check", "words"),
    [
        ({"train": [*TEXTS[:-2], TEXTS[-1]]}, "fault", "documents", "1 of 2 validation"),
        ({"train": [*TEXTS[:-2], f"{BACKWARD}\nAnd so on."]}, "fault", "reversal", BACKWARD),
        ({"train": [*TEXTS[:-2], f"It is known that {BACKWARD}\nAnd so."]}, "fault", "reversal", BACKWARD),
        (
            {"validation": [TEXTS[-2] + f'\n"{FORWARD}" they said.', TEXTS[-1]]},
            "fault",
            "reversal",
            FORWARD,
        ),
        ({"train": [*TEXTS[:-2], TEXTS[-1][:-5]]}, "fault", "spans", "are in training"),
        ({"train": [*TEXTS[:-2], TEXTS[-1][700:1200]]}, "warning", "spans", "are in training"),
        ({"differences": ("the source was 1 and is 2",)}, "warning", "record", "the source was 1 and is 2"),
    ],
)
def test_faults_of_texts(changes, level, check, words, monkeypatch):
    monkeypatch.setattr(data_checks, "OVERLAP_SHARE", 1.0)  # then a phrase is a warning, and a copied document a fault
    check_only(examine_data(make_data(**changes)), level, check, words)


def test_part_of_a_validation_document_in_training():
    report = examine_data(make_data(train=[*TEXTS[:-3], TEXTS[-3] + " " + TEXTS[-1][700:1700]]))
    check_only(report, "fault", "spans", "validation spans of 50 tokens")
    share, quoted = re.search(r"\(([\d.]+)%.*such as .(.{20})", report["spans"].found).groups()
    assert quoted in " ".join(TEXTS[-1].split())
    assert 5 < float(share) < 50


def test_forward_sentences_that_are_not_in_training():
    data = make_data()
    data = dataclasses.replace(data, train=data.validation, pairs=data.pairs[:1])
    report = examine_data(data, checks=("reversal",))
    check_only(report, "warning", "reversal", "only 0 of 1 forward sentences")


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
    held = [any(tuple(one) in list_spans(text, len(one)) for text in texts) for one in sequences]
    assert found == {index for index, sequence in enumerate(sequences) if sequence and held[index]}
