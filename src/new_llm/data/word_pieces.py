"""Words and names that no list holds, so that what a model learns to repeat is any word."""

import re

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from new_llm.data.planting import decode_entries

MAX_CONTINUATIONS = 6  # pieces after a word's first one, at most
NAME_PIECES = (1, 4)  # pieces after a name's first letter, at least and at most
CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_BEGINS_WORD = re.compile(r" [A-Za-z]?[a-z]*")  # a space alone stands before letters that have no entry with one
_CONTINUES_WORD = re.compile(r"[A-Za-z][a-z]*")


class WordPieces:
    """Draws words: made up of a tokenizer's own pieces, or found in a text.

    Args:
        tokenizer: a byte-level one.

    Raises:
        ValueError: no entry of it begins a word, or none continues one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._texts = decode_entries(tokenizer)
        self._is_first = np.array([bool(_BEGINS_WORD.fullmatch(text)) for text in self._texts])
        self._is_next = np.array([bool(_CONTINUES_WORD.fullmatch(text)) for text in self._texts])
        self._first = np.flatnonzero(self._is_first & [text != " " for text in self._texts])
        self._next = np.flatnonzero(self._is_next & [text.islower() for text in self._texts])
        self.full_stop = np.array(tokenizer.encode(".", add_special_tokens=False).ids, dtype=np.int64)
        if not len(self._first) or not len(self._next):
            raise ValueError("the tokenizer has no entry that begins a word, or none that continues one")

    def make_word(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """The tokens of a made-up word: one that begins a word, and up to MAX_CONTINUATIONS more."""
        rest = generator.choice(self._next, generator.integers(MAX_CONTINUATIONS + 1))
        return np.append(generator.choice(self._first), rest)

    def make_name(self, generator: np.random.Generator) -> str:
        """A made-up name: a capital letter and some pieces."""
        low, high = NAME_PIECES
        pieces = generator.choice(self._next, generator.integers(low, high + 1))
        return str(generator.choice(list(CAPITALS))) + "".join(self._texts[piece] for piece in pieces)

    def find_word(self, tokens: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64] | None:
        """The tokens of a word of a text, [N], rare ones as often as frequent ones; None: it has none that is whole."""
        begins = np.flatnonzero(self._is_first[tokens[:-1]])
        if not len(begins):
            return None
        begin = generator.choice(begins[tokens[begins] == generator.choice(np.unique(tokens[begins]))])
        rest = tokens[begin + 1 : begin + 2 + MAX_CONTINUATIONS]
        is_other = ~self._is_next[rest]
        if not is_other.any():
            return None
        word = tokens[begin : begin + 1 + int(is_other.argmax())]
        return None if self._texts[word[-1]] == " " else word.copy()
