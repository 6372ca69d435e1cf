"""Texts to recall from: a sentence hidden at some depth of real text, whole segments of it, and a question."""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from new_llm.config import UserError
from new_llm.data.recall_facts import (
    Needle,
    RecallPart,
    RecallTask,
    SentenceBorders,
    choose_place,
    draw_needle,
    encode_sentence,
    plant_sentence,
)
from new_llm.data.tokenizer import TokenSplit
from new_llm.evaluation.scoring import count_shared

NEEDLE_STREAM, FILLER_STREAM = 1, 2  # keep the random numbers of different choices apart
TASK_STREAMS: dict[RecallTask, int] = {"passkey": 1, "facts": 2}
FIRST_SENTENCE_REACH = 1024  # tokens in which a sentence's end is looked for before the text is begun anywhere

Tokens = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RecallText:
    """One text with its question.

    Attributes:
        context: what is read into the memory: whole segments, [(length − 1) · S], the sentence among them.
        opening: what stands in the question's segment before it: empty, or the whole text where the length is 1.
        candidates: the question with each answer, tokenised as one text; the right one first.
        answer_begin: index in the right candidate of the first token that is not the question's.
        differ_begin: index of the first token in which the candidates differ.
        depth: tokens of the text before the sentence, as a share of all that is not the sentence.
        distance: segments from the sentence's end to the question; 0: they share one.
    """

    context: Tokens
    opening: Tokens
    candidates: tuple[Tokens, ...]
    answer_begin: int
    differ_begin: int
    depth: float
    distance: int


@dataclass(frozen=True, eq=False)
class EncodedNeedle:
    """A needle as tokens: the sentence, and the question with each answer, the right one first."""

    statement: Tokens
    candidates: tuple[Tokens, ...]
    answer_begin: int

    @property
    def question_tokens(self) -> int:
        """Tokens that are read to score any of the answers: all but the last one."""
        return max(len(tokens) for tokens in self.candidates) - 1


class TextMaker:
    """Makes the texts of a measurement; a text depends on the seed and on its own task, length, depth and trial alone.

    Trial i of a task hides the same sentence in the same text at every length and depth, so that these are compared
    alike. The documents are read in a ring from a place drawn for the trial, so that a text longer than all of them
    repeats them.

    Args:
        split: the documents.
        tokenizer: theirs, byte-level.
        segment_length: tokens S in a segment.
        part: where names, values and keys are drawn from.
        num_candidates: answers to choose from.
        seed: of all choices.

    Raises:
        UserError: the documents hold no token.
    """

    def __init__(
        self,
        split: TokenSplit,
        tokenizer: Tokenizer,
        segment_length: int,
        *,
        part: RecallPart,
        num_candidates: int,
        seed: int,
    ) -> None:
        if not split.num_tokens:
            raise UserError("recall: the documents hold no token to hide a sentence in")
        self.split = split
        self.tokenizer = tokenizer
        self.segment_length = segment_length
        self.borders = SentenceBorders(tokenizer)
        self._draw = functools.cache(functools.partial(self._draw_needle, part, num_candidates, seed))
        self._begin = functools.cache(functools.partial(self._find_begin, seed))

    def count_room(self, task: RecallTask, length: int, trial: int) -> int:
        """Tokens of the documents in a text; below 0: it can't hold the sentence and the question."""
        needle = self._draw(task, trial)
        if needle.question_tokens > self.segment_length:
            return -1
        if length == 1:
            return self.segment_length - len(needle.statement) - needle.question_tokens
        return (length - 1) * self.segment_length - len(needle.statement)

    def make(self, task: RecallTask, length: int, depth: float, trial: int) -> RecallText:
        """One text.

        A text of `length` segments has the question at the beginning of the last one, and the sentence in those
        before, so that it can reach the question through memory alone. In a text of one segment both stand in it.

        Raises:
            ValueError: there is no room.
        """
        room = self.count_room(task, length, trial)
        if room < 0:
            raise ValueError(
                f"{task}: {length} segments of {self.segment_length} tokens have no room for trial {trial}"
            )
        needle = self._draw(task, trial)
        begin = self._begin(trial)
        filler = np.take(self.split.tokens, np.arange(begin, begin + room), mode="wrap")
        place = choose_place(filler, len(needle.statement), depth, self.segment_length, self.borders)
        text = plant_sentence(filler, needle.statement, place)
        last_segment = (place + len(needle.statement) - 1) // self.segment_length
        nothing = text[:0]
        return RecallText(
            context=nothing if length == 1 else text,
            opening=text if length == 1 else nothing,
            candidates=needle.candidates,
            answer_begin=needle.answer_begin,
            differ_begin=max(1, count_shared(needle.candidates)),
            depth=place / room if room else 0.0,
            distance=length - 1 - last_segment,
        )

    def _draw_needle(
        self, part: RecallPart, num_candidates: int, seed: int, task: RecallTask, trial: int
    ) -> EncodedNeedle:
        generator = np.random.default_rng([seed, NEEDLE_STREAM, TASK_STREAMS[task], trial])
        return self._encode(draw_needle(task, part, num_candidates, generator))

    def _encode(self, needle: Needle) -> EncodedNeedle:
        candidates = tuple(encode_sentence(self.tokenizer, needle.prompt + answer) for answer in needle.candidates)
        prompt = encode_sentence(self.tokenizer, needle.prompt)
        return EncodedNeedle(
            statement=encode_sentence(self.tokenizer, needle.statement),
            candidates=candidates,
            answer_begin=max(1, count_shared([prompt, candidates[0]])),
        )

    def _find_begin(self, seed: int, trial: int) -> int:
        """The first sentence after a place drawn at random."""
        generator = np.random.default_rng([seed, FILLER_STREAM, trial])
        begin = int(generator.integers(self.split.num_tokens))
        ahead = np.take(self.split.tokens, np.arange(begin, begin + FIRST_SENTENCE_REACH), mode="wrap")
        found = self.borders.find_sentences(ahead)
        return begin + int(found[0]) if len(found) else begin
