"""Training samples with facts to recall: a sentence somewhere, and the same sentence again some way on.

What the second one ends with can be known from the first alone, so that predicting it trains the memory. Names, values
and keys are those of the part "train", which the measurement of recall does not ask for, or are from no list.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from new_llm.config import DataConfig
from new_llm.data.planting import SentenceBorders, encode_sentence
from new_llm.data.recall_facts import draw_needle, list_words
from new_llm.data.word_pieces import WordPieces

TOKENS_PER_RATE = 1000  # planted_facts is a number for so many tokens
NAMES = 2  # a made-up person has a first name and a surname
TEXT_WORDS = 0.5  # share of the values from no list that are words of the sample's own text
PLANT_STREAM = 2**32 - 2  # keeps the choice of facts apart from a sample's place in the order


class PlantedSample(NamedTuple):
    """A sample with its facts.

    Attributes:
        tokens: as many as the sample had; what the facts displaced is missing at the end.
        is_answer: the tokens that can be known from an earlier statement: those after the second one's question.
    """

    tokens: NDArray[np.int64]
    is_answer: NDArray[np.bool_]


class _Statement(NamedTuple):
    place: int
    tokens: NDArray[np.int64]
    answer_begin: int


class SamplePlanter:
    """Puts `planted_facts` facts into every thousand tokens of a sample, each stated twice.

    The first place is drawn evenly over the sample; the way to the second, in tokens of the sample's text, so that its
    logarithm is even between the two `planted_distance`. Both are moved to the nearest border of sentences. A fact
    whose second place lies beyond the sample's end is left out, and so is one whose question has been asked before.
    The share `planted_made_up` of the persons has a name that is made up of the tokenizer's own pieces, and that share
    of the values in words is from no list: made up, too, or a word of the sample's own text.

    Args:
        tokenizer: the documents', byte-level.
        config: how many facts, of which tasks, how far apart.
        seed: of all choices.
    """

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, seed: int) -> None:
        self._tokenizer, self._config, self._seed = tokenizer, config, seed
        self._borders = SentenceBorders(tokenizer)
        self._pieces = WordPieces(tokenizer) if config.planted_made_up else None

    @classmethod
    def from_config(cls, tokenizer: Tokenizer, config: DataConfig, seed: int) -> "SamplePlanter | None":
        """One, or None where no facts are asked for."""
        return cls(tokenizer, config, seed) if config.planted_facts else None

    def plant(self, tokens: NDArray[np.int64], epoch: int, begin: int) -> PlantedSample:
        """One sample, [N], with its facts.

        Args:
            tokens: the sample.
            epoch: each pass over the samples plants other facts.
            begin: where in its split the sample begins, which with the epoch and the seed decides all choices.
        """
        config, length = self._config, len(tokens)
        generator = np.random.default_rng([self._seed, PLANT_STREAM, epoch, begin])
        is_answer = np.zeros(length, np.bool_)
        places = self._borders.find_sentences(tokens) if length > 1 else np.zeros(0, np.int64)
        if not len(places):
            return PlantedSample(tokens, is_answer)
        low, high = (math.log(distance) for distance in config.planted_distance)
        asked = set[str]()
        statements: list[_Statement] = []
        for _ in range(generator.poisson(config.planted_facts * length / TOKENS_PER_RATE)):
            question, sentence, answer_begin = self._draw(tokens, generator)
            first = int(generator.integers(length))
            second = first + round(math.exp(generator.uniform(low, high)))
            if second >= length or question in asked:
                continue
            asked.add(question)
            first, second = (int(places[np.abs(places - wanted).argmin()]) for wanted in (first, second))
            statements += [_Statement(first, sentence, len(sentence)), _Statement(second, sentence, answer_begin)]
        pieces: list[NDArray[np.int64]] = []
        marks: list[NDArray[np.bool_]] = []
        end = 0
        for statement in sorted(statements, key=lambda one: (one.place, -one.answer_begin)):
            pieces += [tokens[end : statement.place], statement.tokens]
            marks += [is_answer[end : statement.place], np.arange(len(statement.tokens)) >= statement.answer_begin]
            end = statement.place
        pieces.append(tokens[end:])
        marks.append(is_answer[end:])
        return PlantedSample(np.concatenate(pieces)[:length], np.concatenate(marks)[:length])

    def _draw(self, text: NDArray[np.int64], generator: np.random.Generator) -> tuple[str, NDArray[np.int64], int]:
        """A question, the tokens of the whole statement, and where in them the answer begins."""
        config, pieces = self._config, self._pieces
        task = config.planted_tasks[generator.integers(len(config.planted_tasks))]
        name = None
        if task == "facts" and pieces is not None and generator.random() < config.planted_made_up:
            name = self._make_name(pieces, generator)
        needle = draw_needle(task, "train", 1, generator, name=name)
        question = encode_sentence(self._tokenizer, needle.prompt)
        if task == "facts" and pieces is not None and generator.random() < config.planted_made_up:
            statement = np.concatenate([question, self._make_word(pieces, text, generator), pieces.full_stop])
        else:
            statement = encode_sentence(self._tokenizer, needle.statement)
        return needle.prompt, statement, len(question)

    def _make_name(self, pieces: WordPieces, generator: np.random.Generator) -> str:
        """A first name and a surname that the measurement of recall does not ask for."""
        names: list[str] = []
        while len(names) < NAMES:
            name = pieces.make_name(generator)
            if name not in list_words("eval"):
                names.append(name)
        return " ".join(names)

    def _make_word(
        self, pieces: WordPieces, text: NDArray[np.int64], generator: np.random.Generator
    ) -> NDArray[np.int64]:
        """A made-up word or one of the text, as often the one as the other, that recall is not measured with."""
        while True:
            word = pieces.find_word(text, generator) if generator.random() < TEXT_WORDS else None
            word = pieces.make_word(generator) if word is None else word
            if self._tokenizer.decode(word.tolist()).strip() not in list_words("eval"):
                return word
