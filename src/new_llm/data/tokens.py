"""Tokenised documents: how they are made, held and counted."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

CHUNK_CHARACTERS = 1 << 22  # of text tokenised at once: bounds memory, whatever the source's size

SpecialTokens = Literal["text", "control"]
"""What a special token that a document spells is encoded as: like any other text, or as the token itself."""


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """The documents of one split, memory-mapped where they come from the cache."""

    tokens: NDArray[np.unsignedinteger]
    """All documents in order, 1-D, uint16 or uint32."""
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

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[num_documents]: tokens of each document."""
        return np.diff(self.offsets)

    def document(self, index: int) -> NDArray[np.unsignedinteger]:
        """The tokens of one document."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class TokenizedDocument(NamedTuple):
    """One document's tokens, and the size of its raw text."""

    ids: NDArray[np.uint32]
    num_bytes: int
    num_words: int


def encode_documents(
    texts: Iterable[str], tokenizer: Tokenizer, special_tokens: SpecialTokens = "text"
) -> Iterator[TokenizedDocument]:
    """Tokenise documents a bounded chunk at a time, whole, without adding special tokens."""
    chunk, size = list[str](), 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield from _encode_chunk(chunk, tokenizer, special_tokens)
            chunk, size = [], 0
    yield from _encode_chunk(chunk, tokenizer, special_tokens)


def _encode_chunk(chunk: list[str], tokenizer: Tokenizer, special_tokens: SpecialTokens) -> Iterator[TokenizedDocument]:
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = special_tokens == "text"
    try:
        # The fast form leaves out character offsets, which nothing here reads.
        encodings = tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
    finally:
        tokenizer.encode_special_tokens = before
    for text, encoding in zip(chunk, encodings, strict=True):
        ids = np.array(encoding.ids, dtype=np.uint32)
        yield TokenizedDocument(ids, len(text.encode("utf-8")), count_words(text))


def tokenize_documents(texts: Iterable[str], tokenizer: Tokenizer) -> TokenSplit:
    """Tokenise texts in memory, for evaluation on other text than the experiment's; nothing is cached."""
    documents = list(encode_documents(texts, tokenizer))
    ids = [document.ids for document in documents]
    return TokenSplit(
        tokens=np.concatenate(ids) if ids else np.zeros(0, np.uint32),
        offsets=np.cumsum([0, *(len(document.ids) for document in documents)], dtype=np.int64),
        num_bytes=np.array([document.num_bytes for document in documents], dtype=np.int64),
        num_words=np.array([document.num_words for document in documents], dtype=np.int64),
    )


def count_samples(lengths: NDArray[np.int64], seq_length: int) -> NDArray[np.int64]:
    """Samples in documents of these lengths: whole ones, and the tail where it has at least 2 tokens.

    A tail of one token is no sample, but it is still predicted: it is the target after the sample before it.
    """
    return lengths // seq_length + (lengths % seq_length >= 2)


def count_words(text: str) -> int:
    """Words as lm-evaluation-harness counts them: pieces between white space, empty ones at the ends too."""
    return len(re.split(r"\s+", text))


def count_special_tokens(texts: Iterable[str], tokenizer: Tokenizer) -> list[int]:
    """How often each text spells a special token of the tokenizer, e.g. <|endoftext|>."""
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    pattern = re.compile("|".join(map(re.escape, special)) or r"(?!)")  # without any, what matches nowhere
    return [len(pattern.findall(text)) for text in texts]


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest little-endian type that holds every id below vocab_size."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
