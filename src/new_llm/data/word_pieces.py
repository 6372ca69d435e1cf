"""Words made up of a tokenizer's own pieces."""

import re

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from new_llm.data.planting import decode_entries

MAX_CONTINUATIONS = 6  # pieces after a word's first one, at most

_BEGINS_WORD = re.compile(r" [A-Za-z][a-z]*")
_CONTINUES_WORD = re.compile(r"[a-z]+")


class WordPieces:
    """Draws words that no list holds, so that what a model learns to repeat is any word.

    Args:
        tokenizer: a byte-level one.

    Raises:
        ValueError: no entry of it begins a word.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        texts = decode_entries(tokenizer)
        self._first = np.array([i for i, text in enumerate(texts) if _BEGINS_WORD.fullmatch(text)], dtype=np.int64)
        self._next = np.array([i for i, text in enumerate(texts) if _CONTINUES_WORD.fullmatch(text)], dtype=np.int64)
        self.full_stop = np.array(tokenizer.encode(".", add_special_tokens=False).ids, dtype=np.int64)
        if not len(self._first) or not len(self._next):
            raise ValueError("the tokenizer has no entry that begins a word, or none that continues one")

    def make_word(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """The tokens of a made-up word: one that begins a word, and up to MAX_CONTINUATIONS more."""
        rest = generator.choice(self._next, generator.integers(MAX_CONTINUATIONS + 1))
        return np.append(generator.choice(self._first), rest)
