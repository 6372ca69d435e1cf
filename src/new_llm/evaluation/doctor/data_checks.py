"""Checks of the training data: aligned labels, memory reset between documents, and disjoint splits."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from new_llm.data.batches import IGNORED_LABEL, Batch, plan_batches
from new_llm.data.tokenizer import TokenSplit, encode_text
from new_llm.evaluation.doctor.registry import Examination, Finding, fault, ok, register_check, skip, warn
from new_llm.formats import format_plural

MAX_BATCHES = 64
SPAN_TOKENS = 50  # training and validation should share no passage of this length
OVERLAP_SHARE = 0.01  # from this share of all validation spans on, overlap is a fault instead of a warning
COPIED_SHARE = 0.5  # from this share of its spans on, a validation document counts as copied, which is a fault
EXAMPLE_CHARACTERS = 160
BLOCK_TOKENS = 1 << 20
"""How many windows to hash at once."""
HASH_BASE = np.uint64(0x9E3779B97F4A7C15)


@register_check("record", needs_data=True)
def check_record(exam: Examination) -> Finding:
    """Text, splits or a tokenizer that differ from the run's."""
    if not exam.data.differences:
        return ok("all fingerprints match the run's")
    return warn(
        f"{'; '.join(exam.data.differences)}: the other checks examine data that differ from the run's",
        "restore the source and the package versions of the run, then run the doctor again",
    )


@register_check("batches", needs_data=True)
def check_batches(exam: Examination) -> Finding:
    """Labels shifted by the data, or memory carried from one document into another."""
    data = exam.data
    num_batches = num_labels = misaligned = unreset = 0
    for shape in data.shapes:
        plan = plan_batches(data.train, **shape._asdict(), order=data.order, seed=data.seed, epoch=0)
        each = max(1, MAX_BATCHES // (2 * len(data.shapes)))
        spread = np.linspace(0, len(plan) - 1, each, dtype=int).tolist()
        for index in sorted({*range(min(len(plan), each)), *spread}):
            batch = plan[index]
            num_batches += 1
            num_labels += int((batch.labels != IGNORED_LABEL).sum())
            misaligned += _count_misaligned(batch)
            unreset += _count_missing_resets(plan[index - 1] if index else None, batch)
    batches = format_plural(num_batches, "batch")
    found = f"{num_labels:,} labels in {batches}"
    if misaligned:
        return fault(
            f"{misaligned:,} of {found} differ from the token at their position: the data shifts the labels, and so "
            "does the loss",
            "pass the tokens themselves as labels",
        )
    if unreset:
        return fault(
            f"a new document starts without a reset in {format_plural(unreset, 'row')} of {batches}: memory is carried "
            "into unrelated text",
            "reset a row's memory wherever its document changes",
        )
    return ok(f"{found} are aligned, and every new document starts from an empty memory")


def _count_misaligned(batch: Batch) -> int:
    """Count labels that differ from the token at their position, or have no token there."""
    ids, labels = batch.input_ids, batch.labels
    mask = torch.ones_like(ids, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask
    behind = torch.nn.functional.pad(~mask, (0, 1), value=False)  # the first position after the tokens may have a label
    behind[:, 1:] &= torch.nn.functional.pad(~mask, (0, 1), value=True)[:, :-1]
    wrong = (labels[:, :-1] != ids) & mask
    return int(wrong.sum()) + int(((labels != IGNORED_LABEL) & behind).sum())


def _count_missing_resets(before: Batch | None, batch: Batch) -> int:
    """Count rows that continue without a reset, but not with the token after the row's last sample."""
    lengths = torch.full((len(batch.input_ids),), batch.input_ids.shape[1])
    if batch.attention_mask is not None:
        lengths = batch.attention_mask.sum(1)
    missing = 0
    for row in ((lengths > 0) & ~batch.resets).nonzero().flatten().tolist():
        expected = before.labels[row, -1] if before is not None and row < len(before.labels) else IGNORED_LABEL
        missing += int(expected != batch.input_ids[row, 0])
    return missing


@register_check("documents", needs_data=True)
def check_documents(exam: Examination) -> Finding:
    """Validation documents that are also in training."""
    train, validation = exam.data.train, exam.data.validation
    shared = find_shared_documents(train, validation)
    counted = f"{validation.num_documents:,} validation and {train.num_documents:,} training documents"
    if not shared:
        return ok(f"{counted}, none of them in both")
    index, other = shared[0]
    return fault(
        f"{len({twin for _, twin in shared}):,} of {counted} are in both, e.g. validation document {other} "
        f"(training document {index}): "
        f"{_quote(exam, validation.document(other))}; validation measures memorised text",
        "remove duplicate documents before splitting the text",
    )


@register_check("spans", after=("documents",), needs_data=True)
def check_spans(exam: Examination) -> Finding:
    """Long passages of validation text that are also in training."""
    validation = exam.data.validation
    places, shared = find_shared_spans(exam.data.train, validation, SPAN_TOKENS)
    if not len(places):
        return skip(f"no validation document has {SPAN_TOKENS} tokens")
    windows = np.bincount(find_documents(validation, places), minlength=validation.num_documents)
    held = np.bincount(find_documents(validation, places[shared]), minlength=validation.num_documents)
    has_copy = bool(((held > 0) & (held >= COPIED_SHARE * windows)).any())
    share = float(shared.mean())
    found = f"{int(shared.sum()):,} of {len(places):,} validation spans of {SPAN_TOKENS} tokens"
    if not share:
        return ok(f"{found} are in training")
    indices = np.flatnonzero(shared)
    longest = max(np.split(indices, np.flatnonzero(np.diff(places[indices]) != 1) + 1), key=len)
    tokens = validation.tokens[places[longest[0]] : places[longest[0]] + SPAN_TOKENS]
    judge = fault if share >= OVERLAP_SHARE or has_copy else warn
    return judge(
        f"{found} ({100 * share:.2g}%, in {format_plural(int((held > 0).sum()), 'document')}) are in training, e.g. "
        f"{_quote(exam, tokens)}: their perplexity is too low",
        "look for copies, quotations and boilerplate, and keep texts that share them in one split",
    )


@register_check("reversal", needs_data=True)
def check_reversal(exam: Examination) -> Finding:
    """Backward sentences of the reversal pairs in training, or forward ones in validation."""
    pairs = exam.data.pairs
    if not pairs:
        return skip("the training split contains no reversal pairs")
    held = _find_sentences(exam, exam.data.train, [pair.forward for pair in pairs])
    backward = _find_sentences(exam, exam.data.train, [pair.backward for pair in pairs])
    forward = _find_sentences(exam, exam.data.validation, [pair.forward for pair in pairs])
    if backward:
        return fault(
            f"{len(backward)} of {len(pairs)} backward sentences are in training, e.g. "
            f"{pairs[backward[0]].backward!r}: the reversal curse is measured on trained text",
            "remove these texts from training, or measure other pairs (--pairs)",
        )
    if forward:
        return fault(
            f"{len(forward)} of {len(pairs)} forward sentences are in validation, e.g. "
            f"{pairs[forward[0]].forward!r}: validation includes text that was trained on",
            "keep the forward sentences out of validation",
        )
    if len(held) < len(pairs):
        return warn(
            f"only {len(held)} of {len(pairs)} forward sentences are in training: the backward figures of the others "
            "say nothing about reversal",
            "check data.reversal_pairs and the source",
        )
    return ok(f"all {len(pairs)} forward sentences are in training, no backward ones, and none are in validation")


def _find_sentences(exam: Examination, split: TokenSplit, sentences: Sequence[str]) -> list[int]:
    """Return the indices of the sentences that occur in a split, at a document's start or after other words.

    The full stop is omitted, because it may share a token with the text after it.
    """
    bare = [sentence.rstrip(".") for sentence in sentences]
    texts = [*bare, *(f" {sentence}" for sentence in bare)]
    encoded = [encode_text(exam.subject.tokenizer, text) for text in texts]
    return sorted({index % len(bare) for index in find_sequences(split, encoded)})


def _quote(exam: Examination, tokens: NDArray[np.integer]) -> str:
    text = " ".join(exam.subject.tokenizer.decode(tokens[:EXAMPLE_CHARACTERS].tolist()).split())
    return repr(text if len(text) <= EXAMPLE_CHARACTERS else f"{text[: EXAMPLE_CHARACTERS - 1]}…")


# Text that two splits share: all windows are hashed to 64 bits, in one pass over each split


def find_shared_documents(train: TokenSplit, validation: TokenSplit) -> list[tuple[int, int]]:
    """Find pairs (training document, validation document) with the same tokens."""
    known: defaultdict[bytes, list[int]] = defaultdict(list)
    for index in np.flatnonzero(validation.lengths).tolist():
        known[validation.document(index).astype("<u4").tobytes()].append(index)
    keys = (train.document(index).astype("<u4").tobytes() for index in range(train.num_documents))
    return [(index, other) for index, key in enumerate(keys) for other in known.get(key, ())]


def find_shared_spans(
    train: TokenSplit, validation: TokenSplit, length: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the places of all windows of `length` tokens in validation, and whether each also occurs in training."""
    empty = (np.zeros(0, np.int64), np.zeros(0, np.uint64))
    places, hashes = (np.concatenate(parts) for parts in zip(empty, *hash_windows(validation, length), strict=True))
    keys, inverse = np.unique(hashes, return_inverse=True)
    is_known = np.zeros(len(keys), bool)
    for _, known in match_windows(train, length, keys):
        is_known[np.searchsorted(keys, known)] = True
    return places, is_known[inverse]


def find_sequences(split: TokenSplit, sequences: Sequence[NDArray[np.int64]]) -> set[int]:
    """Return the indices of the token sequences that occur within a document.

    Windows of the shortest sequence's length are hashed; matches are then compared token by token.
    """
    shortest = min((len(sequence) for sequence in sequences if len(sequence)), default=0)
    beginnings: defaultdict[int, list[int]] = defaultdict(list)
    for index, sequence in enumerate(sequences):
        if len(sequence):
            beginnings[int(hash_tokens(sequence[:shortest], shortest)[0])].append(index)
    found = set[int]()
    for places, hashes in match_windows(split, shortest, np.array(sorted(beginnings), np.uint64)):
        for place, document, value in zip(places, find_documents(split, places), hashes, strict=True):
            rest = split.tokens[place : split.offsets[document + 1]]
            found |= {i for i in beginnings[int(value)] if np.array_equal(rest[: len(sequences[i])], sequences[i])}
    return found


Windows = Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]
"""Blocks of (indices of the windows' first tokens, hashes)."""


def match_windows(split: TokenSplit, length: int, keys: NDArray[np.uint64]) -> Windows:
    """Yield the windows of a split whose hash is among the sorted keys."""
    for places, hashes in hash_windows(split, length) if len(keys) else ():
        known = keys[np.searchsorted(keys, hashes).clip(max=len(keys) - 1)] == hashes
        yield places[known], hashes[known]


def hash_windows(split: TokenSplit, length: int) -> Windows:
    """Yield all windows of `length` tokens within documents, block by block."""
    for begin in range(0, max(0, split.num_tokens - length + 1), BLOCK_TOKENS):
        hashes = hash_tokens(np.asarray(split.tokens[begin : begin + BLOCK_TOKENS + length - 1]), length)
        places = np.arange(begin, begin + len(hashes), dtype=np.int64)
        is_inside = places + length <= split.offsets[find_documents(split, places) + 1]
        yield places[is_inside], hashes[is_inside]


def hash_tokens(tokens: NDArray[np.integer], length: int) -> NDArray[np.uint64]:
    """Hash each window of `length` tokens to 64 bits: Σ_j mix(t_j) b^(length − 1 − j) mod 2^64."""
    # mix (splitmix64's finaliser) first spreads the ids over 64 bits, so that their sums hardly ever collide.
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    count = max(0, len(tokens) - length + 1)
    hashes = np.zeros(count, np.uint64)
    for j in range(length):
        hashes *= HASH_BASE
        hashes += mixed[j : j + count]
    return hashes


def find_documents(split: TokenSplit, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the documents that contain the tokens at these places."""
    return np.searchsorted(split.offsets, places, side="right") - 1
