"""Text that two splits share: documents and spans by hash, and given sequences; exact, in bounded memory."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from new_llm.data.tokens import TokenSplit

BLOCK_TOKENS = 1 << 20
"""Windows hashed at once."""
FILTER_BITS = 24  # a table of the hashes' first bits spares most windows the search
FILTER_SHIFT = np.uint64(64 - FILTER_BITS)
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64
INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))


class SharedSpans(NamedTuple):
    """What two splits share.

    Attributes:
        num_windows: windows of the second split, one at each token that has enough after it in its document.
        num_shared: those that stand in the first split, too.
        per_document: for each document of the second split that holds such a window, what share of its windows they
            are.
        example: (document and place in the first, document and place in the second, tokens) of the longest run of
            shared windows; None: there is none.
    """

    num_windows: int
    num_shared: int
    per_document: dict[int, float]
    example: tuple[tuple[int, int], tuple[int, int], NDArray[np.int64]] | None


def count_shared_documents(train: TokenSplit, validation: TokenSplit) -> list[tuple[int, int]]:
    """(training document, validation document) with the same tokens."""
    digests: dict[bytes, list[int]] = {}
    for index in range(validation.num_documents):
        if len(validation.document(index)):
            digests.setdefault(_digest(validation, index), []).append(index)
    return [(index, other) for index in range(train.num_documents) for other in digests.get(_digest(train, index), ())]


def _digest(split: TokenSplit, index: int) -> bytes:
    return hashlib.sha256(split.document(index).astype("<u4").tobytes()).digest()


def find_shared_spans(
    train: TokenSplit, validation: TokenSplit, length: int, *, block: int = BLOCK_TOKENS, max_windows: int = 1 << 22
) -> SharedSpans:
    """Windows of `length` tokens of validation documents that stand in a training document.

    Every window of both splits is hashed, and equal hashes are compared token by token. Windows never cross a
    document's end. Memory is bounded: at most `max_windows` hashes of validation windows are held, and training is read
    once for each so many.

    Args:
        train: the first split.
        validation: the second.
        length: tokens of a span.
        block: windows hashed at once.
        max_windows: hashes held at once.
    """
    num_windows = num_shared = 0
    documents: Counter[int] = Counter()
    best_run = (0, 0, 0)  # windows, place in validation, place in training
    for places, hashes in _merge(iter_windows(validation, length, block), max_windows):
        num_windows += len(places)
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        keys, first = np.unique(ordered, return_index=True)
        found = np.full(len(keys), -1, np.int64)  # a training place for each hash
        begins = np.zeros(1 << FILTER_BITS, bool)
        begins[keys >> FILTER_SHIFT] = True
        for train_places, train_hashes in iter_windows(train, length, block):
            likely = begins[train_hashes >> FILTER_SHIFT]
            train_places, train_hashes = train_places[likely], train_hashes[likely]
            at = np.searchsorted(keys, train_hashes).clip(max=len(keys) - 1)
            hits = np.flatnonzero(keys[at] == train_hashes)
            hits = hits[found[at[hits]] < 0]
            for hit in hits[np.unique(at[hits], return_index=True)[1]]:
                key, place = at[hit], train_places[hit]
                if _is_same(train, int(place), validation, int(places[order[first[key]]]), length):
                    found[key] = place
        train_place = found[np.searchsorted(keys, hashes)]
        shared = np.flatnonzero(train_place >= 0)
        num_shared += len(shared)
        documents.update(find_documents(validation, places[shared]).tolist())
        for begin, end in _find_runs(places[shared]):
            if end - begin > best_run[0]:
                best_run = (end - begin, int(places[shared[begin]]), int(train_place[shared[begin]]))
    if not num_shared:
        return SharedSpans(num_windows, 0, {}, None)
    _, place, train_place_of_best = best_run
    document = int(find_documents(validation, np.array([place]))[0])
    other = int(find_documents(train, np.array([train_place_of_best]))[0])
    sizes = np.diff(validation.offsets) - length + 1
    shares = {index: count / int(sizes[index]) for index, count in sorted(documents.items())}
    example = (
        (other, train_place_of_best - int(train.offsets[other])),
        (document, place - int(validation.offsets[document])),
        np.asarray(validation.tokens[place : place + length]).astype(np.int64),
    )
    return SharedSpans(num_windows, num_shared, shares, example)


def find_sequences(split: TokenSplit, sequences: Sequence[NDArray[np.int64]]) -> list[tuple[int, int]]:
    """(sequence, document) for each sequence that stands in a document, the first document of each.

    Args:
        split: where to look.
        sequences: of tokens; those without any stand nowhere.
    """
    by_length: dict[int, list[int]] = {}
    for index, sequence in enumerate(sequences):
        if len(sequence):
            by_length.setdefault(len(sequence), []).append(index)
    if not by_length:
        return []
    # One pass looks for the beginnings, as long as the shortest sequence; the rest is compared token by token.
    shortest = min(by_length)
    beginnings: dict[int, list[int]] = {}
    for indices in by_length.values():
        for index in indices:
            beginnings.setdefault(hash_window(np.asarray(sequences[index][:shortest])), []).append(index)
    keys = np.array(sorted(beginnings), dtype=np.uint64)
    found: dict[int, int] = {}
    for places, hashes in iter_windows(split, shortest, BLOCK_TOKENS):
        at = np.searchsorted(keys, hashes).clip(max=len(keys) - 1)
        for hit in np.flatnonzero(keys[at] == hashes):
            place = int(places[hit])
            document = int(find_documents(split, places[hit : hit + 1])[0])
            for index in beginnings[int(hashes[hit])]:
                end = place + len(sequences[index])
                is_inside = index not in found and end <= split.offsets[document + 1]
                if is_inside and np.array_equal(split.tokens[place:end], sequences[index]):
                    found[index] = document
    return sorted(found.items())


def iter_windows(split: TokenSplit, length: int, block: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
    """(first tokens' places, hashes) of all windows inside documents, a block at a time.

    The hash of tokens t is Σ_j mix(t_j) b^j modulo 2^64. All windows of a block come from one running sum of
    mix(t_i) b^i: the window at i is (P_{i+length} − P_i) b^{−i}.
    """
    block = max(1, min(block, split.num_tokens))
    exponents = np.full(block + length, MULTIPLIER, np.uint64)
    exponents[0] = 1
    powers = np.multiply.accumulate(exponents)
    exponents[1:] = INVERSE
    inverses = np.multiply.accumulate(exponents)
    for begin in range(0, max(0, split.num_tokens - length + 1), block):
        tokens = np.asarray(split.tokens[begin : begin + block + length - 1])
        sums = np.zeros(len(tokens) + 1, np.uint64)
        np.cumsum(mix_tokens(tokens) * powers[: len(tokens)], out=sums[1:])
        count = len(tokens) - length + 1
        hashes = (sums[length:] - sums[:count]) * inverses[:count]
        places = np.arange(begin, begin + count, dtype=np.int64)
        is_inside = places + length <= split.offsets[find_documents(split, places) + 1]
        yield places[is_inside], hashes[is_inside]


def hash_window(tokens: NDArray[np.int64]) -> int:
    """The hash that `iter_windows` gives one window."""
    value = 0
    for token in reversed(mix_tokens(tokens).tolist()):
        value = (value * int(MULTIPLIER) + token) % (1 << 64)
    return value


def mix_tokens(tokens: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Spread ids over 64 bits (the finaliser of splitmix64), so that sums of them hardly ever collide."""
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def find_documents(split: TokenSplit, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The documents that tokens at these places belong to."""
    return np.searchsorted(split.offsets, places, side="right") - 1


def _merge(
    blocks: Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]], max_windows: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
    """Blocks joined to as many windows as may be held at once."""
    held: list[tuple[NDArray[np.int64], NDArray[np.uint64]]] = []
    for places, hashes in blocks:
        if held and sum(len(p) for p, _ in held) + len(places) > max_windows:
            yield np.concatenate([p for p, _ in held]), np.concatenate([h for _, h in held])
            held = []
        if len(places):
            held.append((places, hashes))
    if held:
        yield np.concatenate([p for p, _ in held]), np.concatenate([h for _, h in held])


def _is_same(a: TokenSplit, at_a: int, b: TokenSplit, at_b: int, length: int) -> bool:
    return np.array_equal(a.tokens[at_a : at_a + length], b.tokens[at_b : at_b + length])


def _find_runs(places: NDArray[np.int64]) -> list[tuple[int, int]]:
    """[begin, end) of stretches of consecutive places."""
    if not len(places):
        return []
    cuts = np.flatnonzero(np.diff(places) != 1) + 1
    edges = [0, *cuts.tolist(), len(places)]
    return list(pairwise(edges))
