"""Each fault planted in the training data is caught by its check."""

import dataclasses

import pytest
from doctor_subjects import CONFIG, PAIRS, check_fault, examine, list_levels, make_data, make_trained, read_texts

from new_llm.data.batches import plan_batches
from new_llm.data.curriculum import BatchShape
from new_llm.evaluation import doctor_data


def test_labels_that_the_data_shifts(monkeypatch):
    class Shifted:
        def __init__(self, plan):
            self.plan = plan

        def __getattr__(self, name):
            return getattr(self.plan, name)

        def __len__(self):
            return len(self.plan)

        def __getitem__(self, index):
            batch = self.plan[index]
            return dataclasses.replace(batch, labels=batch.labels.roll(-1, 1))

    monkeypatch.setattr(doctor_data, "plan_batches", lambda *a, **k: Shifted(plan_batches(*a, **k)))
    check_fault(examine(make_trained()), "batches", "labels are shifted")


@pytest.mark.parametrize("order", ["stream", "shuffled"])
def test_memory_that_is_carried_into_another_document(order, monkeypatch):
    def plan(*arguments, **options):
        found = plan_batches(*arguments, **options)
        return dataclasses.replace(found, resets=found.resets & False)

    monkeypatch.setattr(doctor_data, "plan_batches", plan)
    check_fault(examine(make_trained(), make_data(order=order)), "batches", "without a reset")


def test_every_stage_of_a_curriculum_is_looked_at(monkeypatch):
    def plan(*arguments, **options):
        found = plan_batches(*arguments, **options)
        return dataclasses.replace(found, resets=found.resets & (options["seq_length"] > 8))

    monkeypatch.setattr(doctor_data, "plan_batches", plan)
    shapes = (BatchShape(32, 4, None), BatchShape(8, 16, None))
    assert not examine(make_trained(), make_data(order="shuffled", shapes=shapes[:1])).has_fault
    check_fault(examine(make_trained(), make_data(order="shuffled", shapes=shapes)), "batches", "without a reset")


def test_a_validation_document_in_training():
    texts = read_texts()
    check_fault(examine(make_trained(), make_data(train=[*texts[:-2], texts[-1]])), "documents", "1 validation")


def test_part_of_a_validation_document_in_training():
    texts = read_texts()
    data = make_data(train=[*texts[:-3], texts[-3] + " " + texts[-1][700:1700]])
    report = examine(make_trained(), data)
    check_fault(report, "spans", "spans of 50 tokens are in training")
    finding = next(finding for finding in report.findings if finding.check == "spans")
    assert finding.figures["example"]["text"] in texts[-1]
    assert 0.05 < finding.figures["share"] < 0.5


def test_a_copy_among_much_other_text_is_a_fault_and_a_phrase_a_warning():
    texts = read_texts()
    config = dataclasses.replace(CONFIG, overlap_share=1.0, checks=("spans",))
    copied = make_data(train=[*texts[:-2], texts[-1][:-5]])
    assert examine(make_trained(), copied, config=config).has_fault
    phrase = make_data(train=[*texts[:-2], texts[-1][700:1200]])
    report = examine(make_trained(), phrase, config=config)
    assert (list_levels(report, "warning"), report.has_fault) == ({"spans"}, False)


@pytest.mark.parametrize("before", ["", "It is known that "])
def test_a_backward_sentence_in_training(before):
    texts = read_texts()
    data = make_data(train=[*texts[:-2], f"{before}{PAIRS[3].backward}\nAnd so on."])
    check_fault(examine(make_trained(), data), "reversal", PAIRS[3].backward)


def test_a_forward_sentence_in_validation():
    texts = read_texts()
    data = make_data(validation=[texts[-2] + f'\n"{PAIRS[5].forward}" they said.', texts[-1]])
    check_fault(examine(make_trained(), data), "reversal", PAIRS[5].forward)


def test_data_that_is_not_the_run_s_is_a_warning():
    report = examine(make_trained(), make_data(differences=("the source fingerprint was 1, and is 2",)))
    assert (list_levels(report, "warning"), report.has_fault) == ({"record"}, False)
