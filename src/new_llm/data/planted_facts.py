"""Training documents with facts to recall: a sentence somewhere, and the same sentence again some way on.

What the second one ends with can be known from the first alone, so that predicting it trains the memory. Names, values
and keys are those of the part "train", which the measurement of recall does not ask for.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer

from new_llm.config import DataConfig
from new_llm.data.planting import SentenceBorders, encode_sentence
from new_llm.data.recall_facts import draw_needle
from new_llm.data.tokens import TokenizedDocument, count_words

TOKENS_PER_RATE = 1000  # planted_facts is a number for so many tokens


def plant_facts(
    documents: Iterable[TokenizedDocument], tokenizer: Tokenizer, config: DataConfig, seed: int
) -> Iterator[TokenizedDocument]:
    """Put `config.planted_facts` facts into every thousand tokens of each document, each stated twice.

    The first place is drawn evenly over the document; the way to the second, in tokens of the document, so that its
    logarithm is even between the two `config.planted_distance`. Both are moved to the nearest border of sentences. A
    fact whose second place lies beyond the document's end is left out.

    Args:
        documents: tokenised, in order; document i is planted in the same way whatever follows it.
        tokenizer: theirs, byte-level.
        config: how many facts, of which tasks, how far apart.
        seed: of all choices.
    """
    planter = FactPlanter(tokenizer, config, seed)
    for index, document in enumerate(documents):
        yield planter.plant(document, index)


class FactPlanter:
    """Plants facts into documents one by one; arguments as `plant_facts` has them."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, seed: int) -> None:
        self._borders = SentenceBorders(tokenizer)
        self._tokenizer, self._config, self._seed = tokenizer, config, seed

    def plant(self, document: TokenizedDocument, index: int) -> TokenizedDocument:
        """The document with its facts; `index` is its place among all, and decides them with the seed."""
        generator = np.random.default_rng([self._seed, index])
        return _plant(document, self._borders, self._tokenizer, self._config, generator)


def _plant(
    document: TokenizedDocument,
    borders: SentenceBorders,
    tokenizer: Tokenizer,
    config: DataConfig,
    generator: np.random.Generator,
) -> TokenizedDocument:
    length = len(document.ids)
    places = borders.find_sentences(document.ids) if length > 1 else np.zeros(0, np.int64)
    num_facts = generator.poisson(config.planted_facts * length / TOKENS_PER_RATE)
    low, high = (math.log(distance) for distance in config.planted_distance)
    inserted: list[tuple[int, str]] = []
    for _ in range(num_facts):
        task = config.planted_tasks[generator.integers(len(config.planted_tasks))]
        statement = draw_needle(task, "train", 1, generator).statement
        first = int(generator.integers(length))
        second = first + round(math.exp(generator.uniform(low, high)))
        if second >= length or not len(places):
            continue
        inserted += [(int(places[np.abs(places - wanted).argmin()]), statement) for wanted in (first, second)]
    if not inserted:
        return document
    pieces: list[np.ndarray] = []
    begin = 0
    for place, statement in sorted(inserted, key=lambda entry: entry[0]):
        pieces += [document.ids[begin:place], encode_sentence(tokenizer, statement)]
        begin = place
    ids = np.concatenate([*pieces, document.ids[begin:]]).astype(document.ids.dtype)
    return TokenizedDocument(
        ids,
        document.num_bytes + sum(1 + len(statement.encode()) for _, statement in inserted),
        document.num_words + sum(count_words(statement) for _, statement in inserted),
    )
