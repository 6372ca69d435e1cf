"""Tokenised documents: how they are held, counted and made."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

CHUNK_CHARACTERS = 1 << 22  # of text tokenised at once: bounds memory, whatever the source's size
INDEX_BLOCK = 1 << 20  # documents whose index is read at once


Text = str | NDArray[np.integer]
"""A document: its text, or its tokens where the source holds tokens."""


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """The documents of one split, memory-mapped where they come from the cache, their index included."""

    tokens: NDArray[np.unsignedinteger]
    """All documents in order, 1-D, uint16 or uint32; of several shards a `ShardedTokens`, read like an array."""
    offsets: NDArray[np.int64]
    """[num_documents + 1]: document i is tokens[offsets[i] : offsets[i + 1]]."""
    num_bytes: NDArray[np.int64]
    """[num_documents]: UTF-8 bytes of the raw text."""
    num_words: NDArray[np.int64]
    """[num_documents]: words of the raw text, as `count_words` counts them."""
    num_pinned_documents: int = 0
    """The first documents that every subset for training holds: those of the reversal sentences."""

    @property
    def num_documents(self) -> int:
        """Documents in the split."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in the split."""
        return int(self.offsets[-1])

    def document(self, index: int) -> NDArray[np.unsignedinteger]:
        """The tokens of one document."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def count_all_samples(split: TokenSplit, seq_length: int, num_documents: int | None = None) -> int:
    """Samples in a split's first documents (None: in all), counted a block of documents at a time."""
    stop = split.num_documents if num_documents is None else num_documents
    total = 0
    for start in range(0, stop, INDEX_BLOCK):
        lengths = np.diff(split.offsets[start : min(start + INDEX_BLOCK, stop) + 1])
        total += int(count_samples(lengths, seq_length).sum())
    return total


def longest_document(split: TokenSplit) -> int:
    """Tokens of a split's longest document; 0 without any."""
    starts = range(0, split.num_documents, INDEX_BLOCK)
    return max((int(np.diff(split.offsets[start : start + INDEX_BLOCK + 1]).max()) for start in starts), default=0)


class TokenizedDocument(NamedTuple):
    """One document's tokens, and the size of its raw text."""

    ids: NDArray[np.uint32]
    num_bytes: int
    num_words: int


def count_samples(lengths: NDArray[np.int64], seq_length: int) -> NDArray[np.int64]:
    """Samples in documents of these lengths: whole ones, and the tail where it has at least 2 tokens.

    A tail of one token is no sample, but it is still predicted: it is the target after the sample before it.
    """
    return lengths // seq_length + (lengths % seq_length >= 2)


def count_words(text: str) -> int:
    """Words as lm-evaluation-harness counts them: pieces between white space, empty ones at the ends too."""
    return len(re.split(r"\s+", text))


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest type that holds every id below vocab_size."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def encode_documents(texts: Iterable[Text], tokenizer: Tokenizer) -> Iterator[TokenizedDocument]:
    """Tokenise documents a bounded chunk at a time, whole and without special tokens; tokens stay as they are."""
    for chunk in cut_chunks(texts):
        yield from encode_chunk(chunk, tokenizer)


def cut_chunks(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """The documents in lists of about CHUNK_CHARACTERS, tokens counting like characters."""
    chunk, size = list[Text](), 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encode_chunk(chunk: list[Text], tokenizer: Tokenizer) -> Iterator[TokenizedDocument]:
    """Tokenise some documents at once; of documents that are tokens, the text is decoded to be counted."""
    texts = [text for text in chunk if isinstance(text, str)]
    # The fast form leaves out character offsets, which nothing here reads.
    encodings = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False) if texts else ())
    for text in chunk:
        if isinstance(text, str):
            ids, raw = np.array(next(encodings).ids, dtype=np.uint32), text
        else:
            ids, raw = text.astype(np.uint32), tokenizer.decode(text.tolist(), skip_special_tokens=False)
        yield TokenizedDocument(ids, len(raw.encode("utf-8")), count_words(raw))


def tokenize_documents(texts: Iterable[str], tokenizer: Tokenizer) -> TokenSplit:
    """Tokenise texts in memory, for evaluation on other text than the experiment's; nothing is cached."""
    documents = list(encode_documents(texts, tokenizer))
    lengths = np.array([len(document.ids) for document in documents], dtype=np.int64)
    ids = [document.ids for document in documents]
    return TokenSplit(
        tokens=np.concatenate(ids) if ids else np.zeros(0, np.uint32),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        num_bytes=np.array([document.num_bytes for document in documents], dtype=np.int64),
        num_words=np.array([document.num_words for document in documents], dtype=np.int64),
    )
