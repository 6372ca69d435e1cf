"""The figures of recall: a cell for each task, length and depth."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from new_llm.data.recall_facts import RecallTask
from new_llm.evaluation.bootstrap import draw_resamples, find_interval
from new_llm.evaluation.estimate import Estimate, find_share_interval
from new_llm.evaluation.recall_scoring import Answer


@dataclass(frozen=True)
class RecallFigures:
    """What a number of trials showed.

    Attributes:
        exact: share whose answer greedy decoding gives, with Wilson's interval.
        first: share whose right answer ranks first, likewise.
        mean_rank: mean rank of the right answer, with a bootstrap interval over trials.
        answers: the trials themselves.
    """

    exact: Estimate
    first: Estimate
    mean_rank: Estimate
    answers: tuple[Answer, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        figures = {name: getattr(self, name)._asdict() for name in ("exact", "first", "mean_rank")}
        return figures | {"answers": [answer._asdict() for answer in self.answers]}


@dataclass(frozen=True)
class RecallCell:
    """The trials of one task, length and depth.

    Attributes:
        task: passkey or facts.
        length: segments of the whole text.
        depth: the depth that was asked for.
        num_trials: texts.
        mean_depth: where the sentence really stood: it is put between two sentences.
        mean_distance: segments from the sentence to the question.
        carried: with the memory of the text.
        reset: the question asked of an empty memory, which can know no more than chance where the text has more than
            one segment.
    """

    task: RecallTask
    length: int
    depth: float
    num_trials: int
    mean_depth: float
    mean_distance: float
    carried: RecallFigures
    reset: RecallFigures

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"carried": self.carried.to_dict(), "reset": self.reset.to_dict()}


@dataclass(frozen=True)
class RecallResult:
    """Recall by depth and length.

    Attributes:
        cells: by task, length and depth, in the order asked for; of a stopped measurement those that hold a trial.
        num_candidates: answers among which the right one was ranked.
        chance_first: the share of first places of a guess, 1 / num_candidates.
        chance_rank: the mean rank of a guess.
        has_memory: whether the model has a memory at all.
        segment_length: tokens of the model's segments.
        num_trials: texts measured.
        num_planned: texts that were to be measured.
        notes: what the reader must know: lengths that were left out, text that repeats.
        confidence: of the intervals.
        num_resamples: resamples behind the intervals of ranks.
        seed: of texts, sentences and resamples.
        num_tokens: tokens of all texts.
        seconds: wall-clock time of the measurement.
    """

    cells: list[RecallCell]
    num_candidates: int
    has_memory: bool
    segment_length: int
    num_trials: int
    num_planned: int
    notes: list[str]
    confidence: float
    num_resamples: int
    seed: int
    num_tokens: int
    seconds: float

    @property
    def chance_first(self) -> float:
        """The share of first places of a guess."""
        return 1 / self.num_candidates

    @property
    def chance_rank(self) -> float:
        """The mean rank of a guess."""
        return (1 + self.num_candidates) / 2

    @property
    def is_complete(self) -> bool:
        """Whether all texts have been measured."""
        return self.num_trials == self.num_planned

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        derived = {name: getattr(self, name) for name in ("chance_first", "chance_rank", "is_complete")}
        return values | derived | {"cells": [cell.to_dict() for cell in self.cells]}


def summarize_answers(answers: Sequence[Answer], confidence: float, num_resamples: int, seed: int) -> RecallFigures:
    """The figures of at least one trial."""
    count = len(answers)
    ranks = np.array([answer.rank for answer in answers])

    def share(hits: int) -> Estimate:
        return Estimate(hits / count, *find_share_interval(hits, count, confidence))

    mean_rank = Estimate(float(ranks.mean()), None, None)
    if count > 1:
        drawn = draw_resamples(count, num_resamples, seed) @ ranks / count
        mean_rank = Estimate(mean_rank.value, *find_interval(drawn, confidence))
    return RecallFigures(
        exact=share(sum(answer.is_exact for answer in answers)),
        first=share(sum(answer.is_first for answer in answers)),
        mean_rank=mean_rank,
        answers=tuple(answers),
    )
