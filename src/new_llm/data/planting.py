"""Hiding a sentence in a text that is tokenised already, between two of its sentences."""

import re

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*$")


class SentenceBorders:
    """Where a sentence may be put into a sequence of tokens.

    A border stands between a token whose text ends with a full stop, an exclamation or a question mark (quotes and
    brackets may follow) and one whose text begins with white space. An abbreviation's full stop counts, too.

    Args:
        tokenizer: a byte-level one, whose tokens don't run across white space from a word's side.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        texts = decode_entries(tokenizer)
        self._ends_sentence = np.array([bool(_SENTENCE_END.search(text)) for text in texts])
        self._begins_word = np.array([text[:1].isspace() for text in texts])

    def find_sentences(self, tokens: NDArray[np.integer]) -> NDArray[np.int64]:
        """Indices before which a sentence may stand, rising, without 0 and the end."""
        begins = self._begins_word[tokens[1:]]
        return np.flatnonzero(self._ends_sentence[tokens[:-1]] & begins) + 1

    def find_words(self, tokens: NDArray[np.integer]) -> NDArray[np.int64]:
        """Indices at which a word begins, rising, without 0 and the end."""
        return np.flatnonzero(self._begins_word[tokens[1:]]) + 1


def decode_entries(tokenizer: Tokenizer) -> list[str]:
    """The text of every entry of a tokenizer, by its token."""
    size = max(tokenizer.get_vocab().values()) + 1
    return [tokenizer.decode([token], skip_special_tokens=False) for token in range(size)]


def encode_sentence(tokenizer: Tokenizer, sentence: str) -> NDArray[np.int64]:
    """The tokens of a sentence, with the space before it that divides it from the sentence before."""
    return np.array(tokenizer.encode(f" {sentence}", add_special_tokens=False).ids, dtype=np.int64)


def choose_place(
    tokens: NDArray[np.integer], length: int, depth: float, segment_length: int, borders: SentenceBorders
) -> int:
    """Where in a text to put a sentence, so that no segment's end cuts it in two.

    The place at the depth is depth · len(tokens). Taken is the nearest border of sentences, at most half a segment
    away, that keeps the sentence inside one segment (inside as few as its length allows); without one the nearest such
    border of words, without that the nearest such place.

    Args:
        tokens: the text, [N], without the sentence; its first token begins a segment and a sentence.
        length: tokens of the sentence.
        depth: 0 is the text's beginning, 1 its end.
        segment_length: tokens in a segment.
        borders: of the text's tokenizer.

    Returns:
        An index from 0 to N: the sentence stands before tokens[index].
    """
    wanted = depth * len(tokens)
    reach = segment_length / 2
    least = -(-length // segment_length)

    def choose(places: NDArray[np.int64], limit: float) -> int | None:
        away = np.abs(places - wanted)
        num_segments = (places + length - 1) // segment_length - places // segment_length + 1
        places, away = places[fits := (num_segments == least) & (away <= limit)], away[fits]
        return int(places[away.argmin()]) if len(places) else None

    for found in (borders.find_sentences(tokens), borders.find_words(tokens)):
        place = choose(np.concatenate([np.zeros(1, np.int64), found]), reach)
        if place is not None:
            return place
    place = choose(np.arange(len(tokens) + 1), np.inf)
    return round(wanted) if place is None else place


def plant_sentence(tokens: NDArray[np.integer], sentence: NDArray[np.integer], place: int) -> NDArray[np.int64]:
    """The text with the sentence before tokens[place]."""
    return np.concatenate([tokens[:place], sentence, tokens[place:]]).astype(np.int64)
