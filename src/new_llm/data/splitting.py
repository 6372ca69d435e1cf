"""Splits by document, parts of a source that has few documents, and the documents of reversal sentences."""

import re
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

SPLIT_STREAM, SENTENCE_STREAM = 1, 2  # keep the random numbers of different choices apart
# Where a document may be cut, best first: after blank lines, after a line, after white space.
CUTS = (re.compile(r"\n(?:[^\S\n]*\n)+"), re.compile(r"\n(?:[^\S\n]*\n)*"), re.compile(r"\s+"))


def split_documents(
    num_documents: int, validation_fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide documents into training and validation by a seeded permutation; each gets at least one.

    Returns:
        The indices of the training and of the validation documents, both rising.

    Raises:
        ValueError: fewer than two documents.
    """
    if num_documents < 2:
        raise ValueError(f"{num_documents} document can't be split; at least 2 are needed")
    num_validation = min(max(1, round(num_documents * validation_fraction)), num_documents - 1)
    order = np.random.default_rng([seed, SPLIT_STREAM]).permutation(num_documents)
    return np.sort(order[num_validation:]), np.sort(order[:num_validation])


def cut_text(text: str, num_parts: int) -> list[str]:
    """Cut a text into contiguous parts of about equal length, which joined give the text again.

    Cuts fall at blank lines where there are enough of them, else at line ends, else at white space, else before any
    visible character, as in languages written without spaces. Every part has a visible character; a text with too few
    of them gives fewer parts.
    """
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    wanted = np.arange(1, num_parts) * len(text) / num_parts
    places = np.zeros(0, np.int64)
    for pattern in CUTS:
        ends = (match.end() for match in pattern.finditer(text))
        places = np.array([end for end in ends if first < end < last], dtype=np.int64)
        if len(places) >= num_parts - 1:
            break
    else:
        visible = (next((at for at in range(int(place), last) if not text[at].isspace()), last) for place in wanted)
        places = np.array([at for at in visible if first < at < last], dtype=np.int64)
    if num_parts < 2 or not len(places):
        return [text]
    after = np.searchsorted(places, wanted).clip(0, len(places) - 1)
    before = (after - 1).clip(0)
    nearest = np.where(wanted - places[before] < places[after] - wanted, places[before], places[after])
    edges = [0, *np.unique(nearest).tolist(), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


def shuffle_sentences(sentences: list[str], seed: int) -> list[str]:
    """The sentences in a seeded order, so that the relations mix."""
    order = np.random.default_rng([seed, SENTENCE_STREAM]).permutation(len(sentences))
    return [sentences[i] for i in order]


def pack_sentences(sentences: list[str], tokenizer: Tokenizer, seq_length: int) -> Iterator[str]:
    """Join sentences, a line each, into documents of at most seq_length tokens, unless one alone has more."""
    packed, size = list[str](), 0
    encodings = tokenizer.encode_batch_fast([sentence + "\n" for sentence in sentences], add_special_tokens=False)
    for sentence, encoding in zip(sentences, encodings, strict=True):
        if packed and size + len(encoding.ids) > seq_length:
            yield "\n".join(packed)
            packed, size = [], 0
        packed.append(sentence)
        size += len(encoding.ids)
    if packed:
        yield "\n".join(packed)
