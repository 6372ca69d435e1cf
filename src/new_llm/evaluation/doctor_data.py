"""What a model was trained on: the splits apart, labels aligned, memory reset where documents change."""

import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from new_llm.data.batches import IGNORED_LABEL, BatchPlan, plan_batches
from new_llm.data.tokens import TokenSplit
from new_llm.evaluation.doctor_overlap import count_shared_documents, find_sequences, find_shared_spans
from new_llm.evaluation.doctor_probe import Measured, Patient

UNKNOWN = "the training text is not known: the model belongs to no run"
MAX_BATCHES = 64
EXAMPLE_CHARACTERS = 160


def check_record(patient: Patient) -> Measured:
    """The fingerprints of the run's text, tokenizer and splits against those found now."""
    if patient.data is None:
        return Measured.skip(UNKNOWN)
    differences = patient.data.differences
    figures = patient.data.facts | {"differences": list(differences)}
    if not differences:
        return Measured.ok(f"{len(patient.data.facts)} fingerprints agree", **figures)
    return Measured(
        "warning",
        "; ".join(differences),
        "this is not the text of the run: what is said of its splits holds for other ones",
        "put the source back as it was, with the versions of the run, and ask again",
        figures,
    )


def check_batches(patient: Patient) -> Measured:
    """The batches of an epoch: each label the token itself, and a reset wherever a row takes up another document.

    Of a curriculum in segments an epoch of each stage; of samples with planted facts the text before it was planted.
    """
    data = patient.data
    if data is None:
        return Measured.skip(UNKNOWN)
    counts = BatchFaults()
    for shape in data.shapes:
        plan = plan_batches(data.train, **shape._asdict(), order=data.order, seed=data.seed, epoch=0)
        counts += _check_plan(data.train, plan, max(1, MAX_BATCHES // (2 * len(data.shapes))))
    figures = {
        "num_batches": counts.batches,
        "num_labels": counts.labels,
        "misaligned_labels": counts.misaligned,
        "missing_resets": counts.unreset,
    }
    measured = f"{counts.labels:,} labels in {counts.batches} of {counts.planned:,} batches"
    if counts.misaligned:
        return Measured(
            "fault",
            f"{measured}: {counts.misaligned:,} are not the token at their place",
            "labels are shifted before the loss shifts them",
            "hand over the tokens themselves as labels",
            figures,
        )
    if counts.unreset:
        return Measured(
            "fault",
            f"{measured}; {counts.unreset} rows take up another document without a reset",
            "memory is carried from one text into an unrelated one",
            "empty a row's memory wherever its document changes",
            figures,
        )
    planted = "; looked at before facts are planted" if data.planted_facts else ""
    return Measured.ok(f"{measured} aligned; every change of document is a reset{planted}", **figures)


@dataclass(frozen=True)
class BatchFaults:
    """What was looked at in some batches, and what was wrong.

    Attributes:
        planned: batches of the epochs.
        batches: those that were looked at.
        labels: labels in them.
        misaligned: labels that are not the token at their place.
        unreset: rows that take up another document without a reset.
    """

    planned: int = 0
    batches: int = 0
    labels: int = 0
    misaligned: int = 0
    unreset: int = 0

    def __add__(self, other: "BatchFaults") -> "BatchFaults":
        return BatchFaults(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))


def _check_plan(split: TokenSplit, plan: BatchPlan, num_each: int) -> BatchFaults:
    """Look at the first batches of a plan and at as many spread over all of it."""
    chosen = sorted({*range(min(len(plan), num_each)), *np.linspace(0, len(plan) - 1, num_each, dtype=int).tolist()})
    found = BatchFaults(planned=len(plan), batches=len(chosen))
    for index in chosen:
        batch = plan[index]
        rows = plan.rows[index] if plan.keep_empty_rows else plan.rows[index][plan.rows[index] >= 0]
        for place, sample in enumerate(rows.tolist()):
            if sample < 0:
                continue
            expected = _expect_labels(split, plan, sample)
            labels = batch.labels[place].numpy()
            wrong = int((labels[: len(expected)] != expected).sum())
            wrong += int((labels[len(expected) :] != IGNORED_LABEL).sum())
            goes_on = index > 0 and _goes_on(split, plan, int(plan.rows[index - 1][place]), sample)
            unreset = int(not goes_on and not bool(batch.resets[place]))
            found += BatchFaults(labels=len(expected), misaligned=wrong, unreset=unreset)
    return found


def _expect_labels(split: TokenSplit, plan: BatchPlan, sample: int) -> NDArray[np.int64]:
    """A sample's tokens and the next one of its document, by the split's offsets alone."""
    start = int(plan.starts[sample])
    document = int(np.searchsorted(split.offsets, start, side="right")) - 1
    end = min(start + plan.seq_length + 1, int(split.offsets[document + 1]))
    return np.asarray(split.tokens[start:end]).astype(np.int64)


def _goes_on(split: TokenSplit, plan: BatchPlan, before: int, sample: int) -> bool:
    """Whether a sample continues the document where the one before it in its row ended."""
    if before < 0 or plan.starts[before] + plan.lengths[before] != plan.starts[sample]:
        return False
    return int(plan.starts[sample]) not in split.offsets


def check_documents(patient: Patient) -> Measured:
    """Documents whose tokens hash alike."""
    if patient.data is None:
        return Measured.skip(UNKNOWN)
    train, validation = patient.data.train, patient.data.validation
    shared = count_shared_documents(train, validation)
    counted = f"{validation.num_documents:,} validation and {train.num_documents:,} training documents"
    held = len({other for _, other in shared})
    figures = {"num_shared": held, "examples": shared[:4]}
    if not shared:
        return Measured.ok(f"{counted}, none in both", **figures)
    index, other = shared[0]
    return Measured(
        "fault",
        f"{counted}: {held:,} validation documents are in training, such as {other} (training document {index}): "
        f"{show_tokens(patient, validation.document(other))}",
        "validation measures what was learned by heart",
        "leave repeated documents out before the text is split",
        figures,
    )


def check_spans(patient: Patient) -> Measured:
    """Spans of many tokens that stand in both splits."""
    if patient.data is None:
        return Measured.skip(UNKNOWN)
    config = patient.config
    length = config.span_tokens
    spans = find_shared_spans(patient.data.train, patient.data.validation, length)
    share = spans.num_shared / max(1, spans.num_windows)
    figures: dict[str, Any] = {
        "span_tokens": length,
        "num_spans": spans.num_windows,
        "num_shared": spans.num_shared,
        "share": share,
        "num_documents": len(spans.per_document),
        "copied_documents": [index for index, held in spans.per_document.items() if held >= config.copied_share][:8],
        "example": None,
    }
    if not spans.num_windows:
        return Measured.skip(f"no validation document has {length} tokens")
    measured = f"{spans.num_shared:,} of {spans.num_windows:,} validation spans of {length} tokens are in training"
    if spans.example is None:
        return Measured.ok(measured, **figures)
    (document, at), (other, other_at), tokens = spans.example
    figures["example"] = {
        "training": [document, at],
        "validation": [other, other_at],
        "text": patient.tokenizer.decode(tokens.tolist()),
    }
    return Measured(
        "fault" if share >= config.overlap_share or figures["copied_documents"] else "warning",
        f"{measured} ({100 * share:.2g}%), in {len(spans.per_document):,} documents, such as "
        f"{show_tokens(patient, tokens)}",
        "this part of the validation text was trained on, and its perplexity is too low",
        "look for copies, quotations and boilerplate; keep texts that share them in one split",
        figures,
    )


def check_reversal(patient: Patient) -> Measured:
    """Reversed sentences in training, and forward ones in validation, wherever in a document they stand."""
    if patient.data is None:
        return Measured.skip(UNKNOWN)
    pairs = patient.data.pairs
    if not pairs:
        return Measured.skip("training held no reversal pairs")
    backward = find_sentences(patient, patient.data.train, [pair.backward for pair in pairs])
    forward = find_sentences(patient, patient.data.validation, [pair.forward for pair in pairs])
    held = find_sentences(patient, patient.data.train, [pair.forward for pair in pairs])
    figures = {
        "num_pairs": len(pairs),
        "forward_in_training": len(held),
        "backward_in_training": [pairs[index].backward for index in backward[:8]],
        "forward_in_validation": [pairs[index].forward for index in forward[:8]],
        "num_backward_in_training": len(backward),
        "num_forward_in_validation": len(forward),
    }
    measured = f"of {len(pairs)} pairs {len(held)} stand forward in training, {len(backward)} backward"
    if backward:
        return Measured(
            "fault",
            f"{measured}, such as {pairs[backward[0]].backward!r}",
            "the reversal curse is measured on sentences that were trained on",
            "leave these texts out of training, or measure with pairs that it does not state (--pairs)",
            figures,
        )
    if forward:
        return Measured(
            "fault",
            f"{measured}; {len(forward)} stand forward in validation, such as {pairs[forward[0]].forward!r}",
            "validation holds sentences that were trained on",
            "keep the forward sentences out of validation",
            figures,
        )
    if len(held) < len(pairs):
        return Measured(
            "warning",
            measured,
            "some facts were never trained on forward, so that their backward figures say nothing of reversal",
            "check data.reversal_pairs and the source",
            figures,
        )
    return Measured.ok(f"{measured}; none forward in validation", **figures)


def find_sentences(patient: Patient, split: TokenSplit, sentences: Sequence[str]) -> list[int]:
    """The sentences that stand in a split, whether a document begins with them or other words stand before.

    The full stop at a sentence's end is left out: with what follows it may make another token.
    """
    bare = [sentence.rstrip(".") for sentence in sentences]
    texts = list(itertools.chain(bare, (f" {sentence}" for sentence in bare)))
    encoded = [np.array(patient.tokenizer.encode(text, add_special_tokens=False).ids, np.int64) for text in texts]
    return sorted({index % len(bare) for index, _ in find_sequences(split, encoded)})


def show_tokens(patient: Patient, tokens: NDArray[np.integer]) -> str:
    """The beginning of some tokens' text, quoted."""
    text = " ".join(patient.tokenizer.decode(tokens[:EXAMPLE_CHARACTERS].tolist()).split())
    return repr(text if len(text) <= EXAMPLE_CHARACTERS else text[: EXAMPLE_CHARACTERS - 1] + "…")
