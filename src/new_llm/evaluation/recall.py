"""Recall: a sentence is hidden in real text, at some depth, and asked for at the end of the text.

A text is a whole number of segments long. The last segment is the question. The segments before it are text of the
documents, with the sentence inserted between two others, and are read into an empty memory. The question starts at a
segment border, so that only memory can connect it to the sentence, and their distance is a whole number of segments. In
a text of one segment, sentence and question share the segment; this shows what the model can do without memory. As a
control, the question is also asked with an empty memory.

A changed fact is first stated with another value at the beginning of the text, in a segment before the sentence that
replaces it; the newest value is the right answer. A memory that can only add contains both.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from new_llm.charts import Chart, line_chart
from new_llm.config import UserError
from new_llm.config.evaluation import RecallConfig
from new_llm.config.train import RecallTask
from new_llm.data.recall_facts import (
    SentenceBorders,
    choose_place,
    draw_needle,
)
from new_llm.data.tokenizer import TokenSplit, encode_continuation
from new_llm.evaluation.language_models import has_memory
from new_llm.evaluation.measure import Column, Measure, ModelResult, Subject, Table, register_measure, to_plain
from new_llm.evaluation.scoring import (
    LanguageModel,
    Row,
    count_shared,
    evaluation_mode,
    find_device,
    pad_rows,
    score_rows,
)
from new_llm.evaluation.statistics import Estimate, draw_resamples, find_interval, find_share_interval
from new_llm.formats import format_number, format_percent, format_plural
from new_llm.models import TransformerLM
from new_llm.models.inputs import IGNORE_INDEX, align_labels

TASKS = {"passkey": "pass keys", "facts": "facts", "changed": "changed facts", "reworded": "reworded facts"}
"""Readers' names for the tasks."""
FIGURES = {
    "exact": "greedy exact match",
    "old": "old value given",
    "first": "right answer ranked first",
    "mean_rank": "mean rank",
}
"""Readers' names for the figures; only changed facts have an old value."""
NEEDLE_STREAM, FILLER_STREAM = 1, 2  # independent random streams
TASK_STREAMS: dict[RecallTask, int] = {"passkey": 1, "facts": 2, "changed": 3, "reworded": 4}
FIRST_SENTENCE_REACH = 1024  # a text begins at the first sentence border within this many tokens, if there is one

Tokens = NDArray[np.int64]
NOTHING: Tokens = np.zeros(0, np.int64)


class Question(NamedTuple):
    """A question with its candidate answers.

    Attributes:
        candidates: the question with each answer, tokenised as one text; the right answer first.
        answer_begin: index of the right answer's first token in candidates[0].
        differ_begin: index of the first token in which the candidates differ.
        opening: text before the question in the same segment.
        has_old: whether the second answer is the old value of a changed fact.
    """

    candidates: tuple[Tokens, ...]
    answer_begin: int
    differ_begin: int
    opening: Tokens = NOTHING
    has_old: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens to read for scoring the longest candidate: all but its last."""
        return max(map(len, self.candidates)) - 1

    def read(self, candidate: int, first_scored: int) -> Row:
        """Make the row that reads the question with one answer, scored from the candidate's token `first_scored` on."""
        return Row(np.concatenate([self.opening, self.candidates[candidate]]), len(self.opening) + first_scored)


def pose_question(
    encode: Callable[[str], Tokens], prompt: str, answers: Iterable[str], *, has_old: bool = False
) -> Question:
    """Make a question from a prompt and the possible answers, the right one first."""
    candidates = tuple(encode(prompt + answer) for answer in answers)
    answer_begin = max(1, count_shared([encode(prompt), candidates[0]]))
    return Question(candidates, answer_begin, max(1, count_shared(candidates)), has_old=has_old)


class RecallText(NamedTuple):
    """One text with its question.

    Attributes:
        context: whole segments to read into the memory, [(length − 1) · S], including the sentence.
        question: its opening is empty, or the whole text if the length is 1.
        depth: tokens before the sentence, as a share of all tokens except the sentence's.
        distance: segments from the sentence's end to the question; 0 if they share a segment.
    """

    context: Tokens
    question: Question
    depth: float
    distance: int


class TextMaker:
    """Makes the texts of a measurement. Each depends only on the seed and its own task, length, depth and trial.

    Trial i of a task hides the same sentence in the same text at every length and depth, for a paired comparison. The
    text starts at a random place in the documents and wraps around at their end, so it may repeat itself.

    Raises:
        UserError: the documents have no tokens.
    """

    def __init__(self, split: TokenSplit, tokenizer: Tokenizer, segment_length: int, settings: RecallConfig) -> None:
        if not split.num_tokens:
            raise UserError("recall: the documents have no tokens to hide a sentence in")
        self.split = split
        self.encode = functools.partial(encode_continuation, tokenizer)
        self.segment_length = segment_length
        self.settings = settings
        self.borders = SentenceBorders(tokenizer)
        self._draw = functools.cache(self._draw_needle)
        self._begin = functools.cache(self._find_begin)

    def count_room(self, task: RecallTask, length: int, trial: int) -> int:
        """Count the document tokens that fit into a text; negative if sentence and question do not fit."""
        statement, replaced, question = self._draw(task, trial)
        if question.num_tokens > self.segment_length or (len(replaced) and length < 3):
            return -1
        if length == 1:
            return self.segment_length - len(statement) - question.num_tokens
        return (length - 1) * self.segment_length - len(statement) - len(replaced)

    def make(self, task: RecallTask, length: int, depth: float, trial: int) -> RecallText:
        """Make one text; raise a ValueError if sentence and question do not fit."""
        room = self.count_room(task, length, trial)
        if room < 0:
            raise ValueError(
                f"{task}: {length} segments of {self.segment_length} tokens are too short for trial {trial}"
            )
        statement, replaced, question = self._draw(task, trial)
        begin = self._begin(trial)
        filler = np.take(self.split.tokens, np.arange(begin, begin + room), mode="wrap")
        if len(replaced):  # the old statement comes first, and the sentence in a later segment
            filler = np.concatenate([replaced, filler])
            depth = max(depth, 1.5 * self.segment_length / len(filler))
        place = choose_place(filler, len(statement), depth, self.segment_length, self.borders)
        text = np.concatenate([filler[:place], statement, filler[place:]]).astype(np.int64)
        last_segment = (place + len(statement) - 1) // self.segment_length
        context, opening = (NOTHING, text) if length == 1 else (text, NOTHING)
        depth = place / len(filler) if len(filler) else 0.0
        return RecallText(context, question._replace(opening=opening), depth, length - 1 - last_segment)

    def _draw_needle(self, task: RecallTask, trial: int) -> tuple[Tokens, Tokens, Question]:
        """Draw a sentence, the one that it replaces (empty if none), and its question."""
        generator = np.random.default_rng([self.settings.seed, NEEDLE_STREAM, TASK_STREAMS[task], trial])
        needle = draw_needle(task, self.settings.part, self.settings.num_candidates, generator)
        statement, replaced = (self.encode(f" {one}") for one in (needle.statement, needle.replaced))
        has_old = bool(needle.replaced)
        question = pose_question(self.encode, f" {needle.prompt}", needle.candidates, has_old=has_old)
        return statement, replaced if has_old else NOTHING, question

    def _find_begin(self, trial: int) -> int:
        """Find the first sentence border after a random place."""
        generator = np.random.default_rng([self.settings.seed, FILLER_STREAM, trial])
        begin = int(generator.integers(self.split.num_tokens))
        ahead = np.take(self.split.tokens, np.arange(begin, begin + FIRST_SENTENCE_REACH), mode="wrap")
        found = self.borders.find_sentences(ahead)
        return begin + int(found[0]) if len(found) else begin


class Answer(NamedTuple):
    """The model's answer to one question.

    Attributes:
        is_exact: whether greedy decoding gives the right answer.
        rank: the right answer's rank among the candidates, from 1; a tie counts half.
        is_first: whether the right answer is more probable than all others; a tie is not first.
        is_old: whether greedy decoding gives the old value of a changed fact.
    """

    is_exact: bool
    rank: float
    is_first: bool
    is_old: bool = False


class Plan(NamedTuple):
    """One text to make: its length in segments, the depth from 0 to 1."""

    task: RecallTask
    length: int
    depth: float
    trial: int


class Outcome(NamedTuple):
    """The result of one text: its sentence's place, and the answers with the text's memory and with an empty one."""

    depth: float
    distance: int
    carried: Answer
    reset: Answer


def plan_texts(maker: TextMaker) -> tuple[list[Plan], list[str]]:
    """Plan the texts, short ones first; also return notes on lengths that are too short.

    Within a length, each trial covers all tasks and depths before the next trial, so that a stopped measurement has
    about equally many trials of each.

    Raises:
        UserError: all lengths are too short.
    """
    plans: list[Plan] = []
    notes: list[str] = []
    settings, trials = maker.settings, range(maker.settings.trials)
    for length in sorted(settings.lengths):
        fitting: list[RecallTask] = []
        for task in settings.tasks:
            if all(maker.count_room(task, length, trial) >= 0 for trial in trials):
                fitting.append(task)
            else:
                segments = f"{format_plural(length, 'segment')} of {maker.segment_length} tokens"
                notes.append(f"{task}: {segments} can't hold sentence and question")
        plans += [Plan(task, length, depth, trial) for trial in trials for task in fitting for depth in settings.depths]
    if not plans:
        raise UserError(f"recall: {'; '.join(notes)}")
    return plans, notes


def ask_all(subject: Subject, maker: TextMaker, plans: Sequence[Plan]) -> dict[Plan, Outcome]:
    """Read each text and ask for its sentence; if stopped, return the outcomes so far."""
    model, settings, size = subject.model, subject.settings.recall, subject.model.segment_length
    reads, num_planned = has_memory(model), sum(plan.length for plan in plans) * size
    step, num_rows = settings.segments_per_call * size, settings.batch_size
    of_length = [list(same) for _, same in itertools.groupby(plans, lambda plan: plan.length)]
    outcomes: dict[Plan, Outcome] = {}
    num_read = 0

    def note(num_tokens: int) -> bool:
        """Report progress; return whether to stop."""
        nonlocal num_read
        num_read += num_tokens
        if subject.on_progress:
            subject.on_progress(num_read, num_planned)
        return subject.should_stop()

    with evaluation_mode(model, subject.autocast):
        for batch in (same[i : i + num_rows] for same in of_length for i in range(0, len(same), num_rows)):
            texts = [maker.make(*plan) for plan in batch]
            questions, num_context = [text.question for text in texts], len(texts[0].context)
            with model.fresh_memory(batch_size=len(texts)):
                for begin in range(0, num_context, step):
                    pieces = [text.context[begin : begin + step] for text in texts]
                    if reads:
                        read_context(model, pieces)
                    if note(sum(map(len, pieces))):
                        return outcomes
                carried = reset = score_answers(model, questions)
                if reads and num_context:
                    with model.fresh_memory():
                        reset = score_answers(model, questions)
            for plan, text, *answers in zip(batch, texts, carried, reset, strict=True):
                outcomes[plan] = Outcome(text.depth, text.distance, *answers)
            if note(len(texts) * size):
                break
    return outcomes


def read_context(model: LanguageModel, contexts: Sequence[Tokens]) -> None:
    """Write texts of equal length into the memory, one per row, without computing losses."""
    input_ids = torch.from_numpy(np.stack(contexts)).to(find_device(model))
    model.token_losses(input_ids, torch.full_like(input_ids, IGNORE_INDEX), update_memory=True)


def score_answers(model: LanguageModel, questions: Sequence[Question]) -> list[Answer]:
    """Ask questions, one per row, with the current memory and without writing to it.

    Candidates are ranked by their total negative log-likelihood from the first token in which they differ, as in
    `evaluate_reversal_curse`.
    """
    totals = np.zeros((len(questions), len(questions[0].candidates)))
    for number in range(totals.shape[1]):
        rows = [question.read(number, question.differ_begin) for question in questions]
        totals[:, number] = [losses.sum() for losses in score_rows(model, rows)]
    exact = find_exact(model, questions)
    old = find_exact(model, questions, 1) if any(question.has_old for question in questions) else exact
    return [
        Answer(is_exact, rank, rank == 1, question.has_old and is_old)
        for question, is_exact, is_old, rank in zip(questions, exact, old, rank_first(totals).tolist(), strict=True)
    ]


def rank_first(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rank of the first of the losses, [..., C]: 1 is the lowest; a tie counts half.

    Every comparison with NaN counts against the first.
    """
    right, others = totals[..., :1], totals[..., 1:]
    return 1 + (~(right < others)).sum(-1) - (right == others).sum(-1) / 2


def find_exact(model: LanguageModel, questions: Sequence[Question], candidate: int = 0) -> list[bool]:
    """Return whether greedy decoding would give each question's right answer, or another candidate.

    The question is read together with the answer, and each token of the answer must be the most probable one. This is
    equivalent to decoding, which reads the same tokens up to the first wrong one.
    """
    rows = [question.read(candidate, question.answer_begin) for question in questions]
    input_ids, labels, mask = pad_rows(rows, find_device(model))
    targets = align_labels(labels, input_ids.shape[1])
    wanted = targets != IGNORE_INDEX
    if isinstance(model, TransformerLM):  # run the output head, the largest product, only where it is needed
        logits = model.embed_out(model.compute_hidden(input_ids, mask)[wanted])
    else:
        logits = cast(Any, model)(input_ids, mask)[wanted]
    is_right = torch.ones_like(wanted)
    is_right[wanted] = logits.argmax(-1) == targets[wanted]
    return is_right.all(1).tolist()


def summarize_answers(answers: Sequence[Answer], settings: RecallConfig) -> dict[str, Any]:
    """Summarise one or more trials: the shares `exact`, `old` and `first`, the `mean_rank` and the `answers`.

    Shares have Wilson's interval; the mean rank has a bootstrap interval over trials.
    """
    count = len(answers)
    ranks = np.array([answer.rank for answer in answers])

    def share(hits: Iterable[bool]) -> Estimate:
        number = sum(hits)
        return Estimate(number / count, *find_share_interval(number, count, settings.confidence))

    mean_rank = Estimate(float(ranks.mean()), None, None)
    if count > 1:
        drawn = draw_resamples(count, settings.num_resamples, settings.seed) @ ranks / count
        mean_rank = Estimate(mean_rank.value, *find_interval(drawn, settings.confidence))
    return {
        "exact": share(answer.is_exact for answer in answers),
        "old": share(answer.is_old for answer in answers),
        "first": share(answer.is_first for answer in answers),
        "mean_rank": mean_rank,
        "answers": answers,
    }


def average_by(cells: Sequence[dict[str, Any]], place: str, way: str, figure: str) -> dict[int, float]:
    """Average a figure over the trials by `place`: a cell's `length`, or its `mean_distance` in rounded segments."""
    totals: dict[int, tuple[float, int]] = {}
    for cell in cells:
        total, count = totals.get(where := round(cell[place]), (0.0, 0))
        num = cell["num_trials"]
        totals[where] = (total + cell[way][figure]["value"] * num, count + num)
    return {where: total / count for where, (total, count) in sorted(totals.items())}


def group_by_task(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Group the cells by task."""
    return {task: found for task in TASKS if (found := [cell for cell in result["cells"] if cell["task"] == task])}


@register_measure
class Recall(Measure):
    """Whether a model recalls, at the end of a long text, a sentence hidden in it."""

    name = "recall"
    title = "recall"
    can_stop = True

    def run(self, subject: Subject) -> dict[str, Any]:
        """Measure greedy exact match and the right answer's rank, by task, length and depth.

        A model without memory is asked without reading the text, because it can know no more than the control.

        - `cells`, in the configured order; a stopped measurement has only those with a trial. Each has its `task`,
          `length` in segments, requested `depth`, `num_trials`, `mean_depth` (the actual one, at a sentence border),
          `mean_distance` in segments to the question, and the figures of `summarize_answers` with the memory of the
          text, `carried`, and with an empty one, `reset`.
        - `chance_first` and `chance_rank`: the share ranked first and the mean rank of a random guess.
        - `notes`: which lengths were left out, and whether text repeats.

        Raises:
            UserError: there is no text, or all lengths are too short for sentence and question.
        """
        began = time.perf_counter()
        model, settings, size = subject.model, subject.settings.recall, subject.model.segment_length
        maker = TextMaker(subject.split, subject.tokenizer, size, settings)
        plans, notes = plan_texts(maker)
        longest, num_tokens = max(plan.length for plan in plans) * size, subject.split.num_tokens
        if longest > num_tokens:
            notes.append(f"the documents have only {num_tokens:,} tokens, so a text of {longest:,} repeats them")
        outcomes = ask_all(subject, maker, plans)
        cells: list[dict[str, Any]] = []
        for place in itertools.product(settings.tasks, settings.lengths, settings.depths):
            keys = [key for trial in range(settings.trials) if (key := Plan(*place, trial)) in outcomes]
            if not keys:
                continue
            depths, distances, carried, reset = zip(*(outcomes[key] for key in keys), strict=True)
            cells.append(
                dict(zip(("task", "length", "depth"), place, strict=True))
                | {
                    "num_trials": len(keys),
                    "mean_depth": float(np.mean(depths)),
                    "mean_distance": float(np.mean(distances)),
                    "carried": summarize_answers(carried, settings),
                    "reset": summarize_answers(reset, settings),
                }
            )
        return {
            "cells": to_plain(cells),
            "num_candidates": settings.num_candidates,
            "has_memory": has_memory(model),
            "segment_length": size,
            "num_trials": len(outcomes),
            "num_planned": len(plans),
            "notes": notes,
            "confidence": settings.confidence,
            "num_resamples": settings.num_resamples,
            "seed": settings.seed,
            "num_tokens": sum(plan.length for plan in outcomes) * size,
            "seconds": time.perf_counter() - began,
            "chance_first": 1 / settings.num_candidates,
            "chance_rank": (1 + settings.num_candidates) / 2,
            "is_complete": len(outcomes) == len(plans),
        }

    def columns(self, result: dict[str, Any]) -> list[Column]:
        """Return for each task the share of exact answers over all texts longer than one segment."""
        columns: list[Column] = []
        for task, cells in group_by_task(result).items():
            cells = [cell for cell in cells if cell["length"] > 1]
            trials = sum(cell["num_trials"] for cell in cells)
            exact = sum(cell["carried"]["exact"]["value"] * cell["num_trials"] for cell in cells)
            share = exact / trials if trials else None
            columns.append(Column(task, TASKS[task], share, format_percent, better="higher", group="Recall, exact"))
        return columns

    def tables(self, result: dict[str, Any]) -> list[Table]:
        """Return for each task the figures by depth and length, with an empty memory as control, and by distance."""
        tables: list[Table] = []
        for task, cells in group_by_task(result).items():
            by_distance: dict[str, list[Column]] = {}
            for key, title in FIGURES.items():
                if key == "old" and task != "changed":
                    continue
                write = format_number if key == "mean_rank" else format_percent
                better = "higher" if key in ("exact", "first") else "lower"
                rows: dict[str, list[Column]] = {}
                for cell in sorted(cells, key=lambda cell: (cell["depth"], cell["length"])):
                    length, found = f"{cell['length']:,}", cell["carried"][key]
                    column = Column(length, length, **found, format=write, group="segments")
                    rows.setdefault(f"depth {cell['depth']:g}", []).append(column)
                rows["memory reset"] = [
                    Column(f"{length:,}", f"{length:,}", value, write, group="segments")
                    for length, value in average_by(cells, "length", "reset", key).items()
                ]
                tables.append(Table(f"{TASKS[task]}: {title}", list(rows.items())))
                for distance, value in average_by(cells, "mean_distance", "carried", key).items():
                    column = Column(key, title, value, write, better=better)
                    by_distance.setdefault(format_plural(distance, "segment"), []).append(column)
            tables.append(Table(f"{TASKS[task]} by distance", list(by_distance.items()), is_for_studies=True))
        return tables

    def notes(self, result: dict[str, Any]) -> list[str]:
        """State the chance level, what was left out, and how much was measured."""
        notes = [
            f"a random guess is right in {result['chance_first']:.1%}; its mean rank is {result['chance_rank']:g} of "
            f"{result['num_candidates']}",
            *result["notes"],
        ]
        if not result["has_memory"]:
            notes.append("this model has no memory: beyond 1 segment it can know no more than the control")
        counts = f"{result['num_trials']:,} of {result['num_planned']:,} texts, {result['num_tokens']:,} tokens"
        return [*notes, counts]

    def charts(self, results: Sequence[ModelResult]) -> list[Chart]:
        """Draw for each task the share ranked first by distance, with a line per model."""
        charts: list[Chart] = []
        for task, words in TASKS.items():
            rows = []
            for name, result in results:
                shares = average_by(group_by_task(result).get(task, []), "mean_distance", "carried", "first")
                rows += [{"model": name, "distance": distance, "share": share} for distance, share in shares.items()]
            if rows:
                caption = "Share of questions whose right answer ranks first, by distance from the hidden sentence."
                columns: dict[str, Any] = {"x": "distance", "y": "share", "series": "model", "y_format": ".0%"}
                titles: dict[str, Any] = {"x_title": "segments", "y_title": "ranked first"}
                charts.append(line_chart(f"recall-{task}", f"Recall: {words}", caption, rows, **columns, **titles))
        return charts

    def describe(self, result: dict[str, Any]) -> str:
        """State the share of exact answers for each task."""
        shares = [f"{column.title} {column.value:.0%}" for column in self.columns(result) if column.value is not None]
        return f"recall, exact answers: {', '.join(shares)}" if shares else ""
