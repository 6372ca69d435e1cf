"""The long documents that an adapter is trained and measured on."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from new_llm.config import UserError
from new_llm.data.dataset import PreparedData, count_text
from new_llm.data.tokens import TokenSplit

CHOICE_STREAM = 3  # keeps the choice of documents apart from other random numbers of the same seed


def choose_long_documents(
    data: PreparedData, *, num_docs: int, min_tokens: int, max_tokens: int | None, seed: int
) -> PreparedData:
    """Some long training documents in a seeded choice, and all long validation documents.

    Args:
        data: both splits.
        num_docs: training documents at most.
        min_tokens: tokens that a document must have to be long.
        max_tokens: tokens of a document at most, from its beginning; None: all.
        seed: of the choice.

    Returns:
        The same data with fewer documents; where no validation document is long, all of them, and a note.

    Raises:
        UserError: no training document is long.
    """
    notes = list(data.info.get("notes", []))
    lengths = np.diff(data.train.offsets)
    long = np.flatnonzero(lengths >= min_tokens)
    if not len(long):
        raise UserError(
            f"{data.info['source']}: no training document has {min_tokens:,} tokens (the longest has "
            f"{int(lengths.max()):,}): give longer documents, a smaller --min-doc-tokens or a smaller --seq-length"
        )
    if len(long) < num_docs:
        notes.append(f"{num_docs:,} long documents were asked for; {len(long):,} have {min_tokens:,} tokens or more")
    chosen = np.sort(np.random.default_rng([seed, CHOICE_STREAM]).permutation(long)[:num_docs])
    held_out = np.flatnonzero(np.diff(data.validation.offsets) >= min_tokens)
    if not len(held_out):
        notes.append(f"no held-out document has {min_tokens:,} tokens: all are measured on")
        held_out = np.arange(data.validation.num_documents)
    train, validation = (
        select_documents(data.train, chosen, max_tokens),
        select_documents(data.validation, held_out, max_tokens),
    )
    info = data.info | {
        "notes": notes,
        "min_doc_tokens": min_tokens,
        "train": count_text(train),
        "validation": count_text(validation),
    }
    return dataclasses.replace(data, train=train, validation=validation, info=info)


def select_documents(split: TokenSplit, chosen: NDArray[np.int64], max_tokens: int | None = None) -> TokenSplit:
    """Some documents of a split, in the order given, cut to `max_tokens`; bytes and words stay the whole text's."""
    documents = [split.document(int(index))[:max_tokens] for index in chosen]
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    return TokenSplit(
        tokens=np.concatenate(documents),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        num_bytes=split.num_bytes[chosen],
        num_words=split.num_words[chosen],
    )
