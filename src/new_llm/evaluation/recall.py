"""Recall: a sentence hidden in real text, some depth down, and asked for at the end of it."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from new_llm.charts import Chart, line_chart
from new_llm.config import UserError
from new_llm.config.evaluation import RecallConfig
from new_llm.data.recall_facts import RecallTask
from new_llm.data.tokenizer import TokenSplit
from new_llm.evaluation.hugging_face import HuggingFaceLM
from new_llm.evaluation.measure import Column, Measure, ModelResult, Subject, Table, register_measure, to_plain
from new_llm.evaluation.recall_texts import RecallText, TextMaker
from new_llm.evaluation.scoring import (
    Autocast,
    LanguageModel,
    Progress,
    Row,
    evaluation_mode,
    find_device,
    never,
    score_rows,
)
from new_llm.evaluation.statistics import Estimate, draw_resamples, find_interval, find_share_interval
from new_llm.formats import format_number, format_percent
from new_llm.models import TransformerLM
from new_llm.models.loss import IGNORE_INDEX, align_labels

TASKS = {"passkey": "pass keys", "facts": "facts"}
"""What readers know the tasks by."""
FIGURES = {"exact": "greedy exact match", "first": "right answer ranked first", "mean_rank": "mean rank"}
"""What they know the figures by."""


class Answer(NamedTuple):
    """What one question showed.

    Attributes:
        is_exact: greedy decoding from the question gives the right answer, token by token.
        rank: place of the right answer among the candidates, 1 is first; equals share the mean of their places.
        is_first: whether it is more probable than every other; a tie is not first.
    """

    is_exact: bool
    rank: float
    is_first: bool


class Plan(NamedTuple):
    """One text to be made."""

    task: RecallTask
    length: int
    depth: float
    trial: int


class Outcome(NamedTuple):
    """What one text showed: where its sentence stood, and the answers with its memory and with an empty one."""

    depth: float
    distance: int
    carried: Answer
    reset: Answer


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


@dataclass(frozen=True)
class RecallResult:
    """Recall by depth and length.

    Attributes:
        cells: by task, length and depth, in the order asked for; of a stopped measurement those that hold a trial.
        num_candidates: answers among which the right one was ranked.
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
    def is_complete(self) -> bool:
        """Whether all texts have been measured."""
        return self.num_trials == self.num_planned

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with what a guess reaches: first in 1 / n of the trials, mean rank (n + 1) / 2."""
        chances = {"chance_first": 1 / self.num_candidates, "chance_rank": (1 + self.num_candidates) / 2}
        return to_plain(self) | chances | {"is_complete": self.is_complete}


def evaluate_recall(
    model: LanguageModel,
    tokenizer: Tokenizer,
    split: TokenSplit,
    settings: RecallConfig | None = None,
    *,
    device: torch.device | str | None = None,
    autocast: Autocast = contextlib.nullcontext,
    on_progress: Progress | None = None,
    should_stop: Callable[[], bool] = never,
) -> RecallResult:
    """Hide sentences in the documents' text and ask for them: greedy exact match, and rank among candidates.

    A text has a length in whole segments. Its last segment is the question; the ones before are the documents' own
    text with the sentence between two of its sentences, and are read into an empty memory. The question then begins at
    a segment's beginning, so that memory is the only way from the sentence to it, and the distance between them is a
    whole number of segments. In a text of one segment the sentence and the question share it: what a model can do
    without its memory. The question is also asked of an empty memory, which is the control.

    Args:
        model: evaluated in evaluation mode; its held memory is neither read nor changed. One without memory is asked
            without reading: it can know no more than the control.
        tokenizer: the model's, byte-level.
        split: documents of real text, tokenised with it.
        settings: what is hidden, in how long a text and how deep; None: the defaults.
        device: where the model lies; None: where its weights are.
        autocast: makes the context in which the model computes.
        on_progress: called with the tokens of the texts read so far and in all.
        should_stop: asked after each call; once it says True, the result is of the texts that have been asked by then.

    Raises:
        UserError: there is no text, or the segments are too short for any sentence and question asked for.
    """
    began = time.perf_counter()
    settings = settings or RecallConfig()
    size = model.segment_length
    maker = TextMaker(
        split, tokenizer, size, part=settings.part, num_candidates=settings.num_candidates, seed=settings.seed
    )
    plans, notes = plan_texts(maker, settings)
    longest = max(plan.length for plan in plans)
    if longest * size > split.num_tokens:
        notes.append(f"the documents have {split.num_tokens:,} tokens: a text of {longest * size:,} repeats them")
    where, reads = find_device(model, device), has_memory(model)
    num_planned = sum(plan.length for plan in plans) * size
    outcomes: dict[Plan, Outcome] = {}
    num_read, is_stopped = 0, False

    def note(num_tokens: int) -> bool:
        nonlocal num_read, is_stopped
        num_read += num_tokens
        if on_progress:
            on_progress(num_read, num_planned)
        is_stopped = should_stop()
        return is_stopped

    def ask(texts: list[RecallText]) -> list[Outcome]:
        """Nothing where the reading was stopped."""
        num_context, step = len(texts[0].context), settings.segments_per_call * size
        with model.fresh_memory(batch_size=len(texts)):
            for begin in range(0, num_context, step):
                end = min(begin + step, num_context)
                if reads:
                    read_context(model, texts, begin, end, where)
                if note(len(texts) * (end - begin)):
                    return []
            carried = reset = score_answers(model, texts, where)
            if reads and num_context:
                with model.fresh_memory():
                    reset = score_answers(model, texts, where)
        note(len(texts) * size)
        return [Outcome(t.depth, t.distance, a, b) for t, a, b in zip(texts, carried, reset, strict=True)]

    with evaluation_mode(model, autocast):
        for batch in cut_batches(plans, settings.batch_size):
            texts = [maker.make(*plan) for plan in batch]
            outcomes |= dict(zip(batch, ask(texts), strict=False))
            if is_stopped:
                break
    cells: list[RecallCell] = []
    for task in settings.tasks:
        for length in settings.lengths:
            for depth in settings.depths:
                keys = [Plan(task, length, depth, trial) for trial in range(settings.trials)]
                if found := [outcomes[key] for key in keys if key in outcomes]:
                    cells.append(summarize_cell(task, length, depth, found, settings))
    return RecallResult(
        cells=cells,
        num_candidates=settings.num_candidates,
        has_memory=reads,
        segment_length=size,
        num_trials=len(outcomes),
        num_planned=len(plans),
        notes=notes,
        confidence=settings.confidence,
        num_resamples=settings.num_resamples,
        seed=settings.seed,
        num_tokens=sum(plan.length for plan in outcomes) * size,
        seconds=time.perf_counter() - began,
    )


def plan_texts(maker: TextMaker, settings: RecallConfig) -> tuple[list[Plan], list[str]]:
    """The texts, short ones first, and notes on lengths that a sentence and its question don't fit in.

    Of one length trial comes after trial, so that a measurement that is stopped has about as many for every depth.

    Raises:
        UserError: none fits.
    """
    plans: list[Plan] = []
    notes: list[str] = []
    trials = range(settings.trials)
    for length in sorted(settings.lengths):
        fitting: list[RecallTask] = []
        for task in settings.tasks:
            if all(maker.count_room(task, length, trial) >= 0 for trial in trials):
                fitting.append(task)
            else:
                segments = "1 segment" if length == 1 else f"{length} segments"
                notes.append(f"{task}: {segments} of {maker.segment_length} tokens can't hold sentence and question")
        plans += [Plan(task, length, depth, trial) for trial in trials for task in fitting for depth in settings.depths]
    if not plans:
        raise UserError(f"recall: {'; '.join(notes)}")
    return plans, notes


def cut_batches(plans: Sequence[Plan], batch_size: int) -> list[list[Plan]]:
    """Consecutive texts of one length, batch_size at most."""
    batches: list[list[Plan]] = []
    for plan in plans:
        if not batches or len(batches[-1]) == batch_size or batches[-1][0].length != plan.length:
            batches.append([])
        batches[-1].append(plan)
    return batches


def summarize_cell(
    task: RecallTask, length: int, depth: float, found: Sequence[Outcome], settings: RecallConfig
) -> RecallCell:
    """The figures of at least one trial."""
    return RecallCell(
        task=task,
        length=length,
        depth=depth,
        num_trials=len(found),
        mean_depth=float(np.mean([outcome.depth for outcome in found])),
        mean_distance=float(np.mean([outcome.distance for outcome in found])),
        carried=summarize_answers([outcome.carried for outcome in found], settings),
        reset=summarize_answers([outcome.reset for outcome in found], settings),
    )


def summarize_answers(answers: Sequence[Answer], settings: RecallConfig) -> RecallFigures:
    """The figures of at least one trial."""
    count = len(answers)
    ranks = np.array([answer.rank for answer in answers])

    def share(hits: int) -> Estimate:
        return Estimate(hits / count, *find_share_interval(hits, count, settings.confidence))

    mean_rank = Estimate(float(ranks.mean()), None, None)
    if count > 1:
        drawn = draw_resamples(count, settings.num_resamples, settings.seed) @ ranks / count
        mean_rank = Estimate(mean_rank.value, *find_interval(drawn, settings.confidence))
    return RecallFigures(
        exact=share(sum(answer.is_exact for answer in answers)),
        first=share(sum(answer.is_first for answer in answers)),
        mean_rank=mean_rank,
        answers=tuple(answers),
    )


def has_memory(model: LanguageModel) -> bool:
    """Whether what a model has read in earlier calls can matter to it."""
    return not isinstance(model, HuggingFaceLM) and bool(getattr(model, "memory_layers", True))


def read_context(model: LanguageModel, texts: Sequence[RecallText], begin: int, end: int, device: torch.device) -> None:
    """Write a piece of every text's context into the row's memory; its losses are not asked for."""
    pieces = np.stack([text.context[begin:end] for text in texts])
    input_ids = torch.from_numpy(pieces).to(device)
    model.token_losses(input_ids, torch.full_like(input_ids, IGNORE_INDEX), update_memory=True)


def score_answers(model: LanguageModel, texts: Sequence[RecallText], device: torch.device) -> list[Answer]:
    """Ask the question of every text, one per row, with the memory in place; nothing is written.

    Candidates are ranked by their total negative log-likelihood from the first token in which they differ, as in
    `evaluate_reversal_curse`.
    """
    totals = np.zeros((len(texts), len(texts[0].candidates)))
    for number in range(totals.shape[1]):
        rows = [
            Row(np.concatenate([text.opening, text.candidates[number]]), len(text.opening) + text.differ_begin)
            for text in texts
        ]
        totals[:, number] = [losses.sum() for losses in score_rows(model, rows, device)]
    right, others = totals[:, :1], totals[:, 1:]
    ahead, equal = (others < right).sum(1), (others == right).sum(1)
    # NaN is neither ahead nor behind: a model that gives it knows nothing, and comes last.
    ahead = ahead + (np.isnan(others) | np.isnan(right)).sum(1)
    exact = find_exact(model, texts, device)
    return [
        Answer(is_exact, float(1 + a + e / 2), bool(a + e == 0))
        for is_exact, a, e in zip(exact, ahead, equal, strict=True)
    ]


def find_exact(model: LanguageModel, texts: Sequence[RecallText], device: torch.device) -> list[bool]:
    """Whether greedy decoding gives each right answer.

    Read is the question with the right answer, and each of the answer's tokens must be the most probable one where it
    stands. That is the same: greedy decoding has read the right tokens for as long as it has found them.
    """
    rows = [np.concatenate([text.opening, text.candidates[0]]) for text in texts]
    width = max(map(len, rows)) - 1
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width + 1), IGNORE_INDEX, dtype=torch.int64)
    for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
        tokens, begin = torch.from_numpy(row), len(text.opening) + text.answer_begin
        input_ids[index, : len(row)] = tokens[:width]
        labels[index, begin : len(row)] = tokens[begin:]
    lengths = torch.tensor([len(row) for row in rows])
    mask = None if int(lengths.min()) >= width else (torch.arange(width) < lengths[:, None]).to(device)
    targets = align_labels(labels, width).to(device)
    wanted = targets != IGNORE_INDEX
    is_right = torch.ones_like(wanted)
    is_right[wanted] = predict_tokens(model, input_ids.to(device), mask, wanted) == targets[wanted]
    return is_right.all(1).tolist()


def predict_tokens(model: LanguageModel, input_ids: Tensor, mask: Tensor | None, wanted: Tensor) -> Tensor:
    """The most probable next token at the wanted positions [B, T], in their order.

    A model that is neither of this project nor of transformers is called for its logits: model(input_ids, mask).
    """
    if isinstance(model, TransformerLM):  # the head is the widest product: it runs only where it is asked for
        return model.embed_out(model.compute_hidden(input_ids, mask)[wanted]).argmax(-1)
    if isinstance(model, HuggingFaceLM):
        logits = model.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    else:
        logits = cast(Any, model)(input_ids, mask)
    return logits[wanted].argmax(-1)


def average_by(cells: Sequence[dict[str, Any]], place: str, way: str, figure: str) -> dict[int, float]:
    """The mean of a figure over the trials of each length, or of each distance in whole segments (`mean_distance`)."""
    totals: dict[int, tuple[float, int]] = {}
    for cell in cells:
        total, count = totals.get(where := round(cell[place]), (0.0, 0))
        num = cell["num_trials"]
        totals[where] = (total + cell[way][figure]["value"] * num, count + num)
    return {where: total / count for where, (total, count) in sorted(totals.items())}


def group_by_task(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The cells of each task."""
    return {task: found for task in TASKS if (found := [cell for cell in result["cells"] if cell["task"] == task])}


@register_measure
class Recall(Measure):
    """Whether a sentence hidden in a long text is found again at its end."""

    name = "recall"
    title = "recall"
    can_stop = True

    def run(self, subject: Subject) -> dict[str, Any]:
        """See `RecallResult`."""
        return evaluate_recall(
            subject.model,
            subject.tokenizer,
            subject.split,
            subject.settings.recall,
            device=subject.device,
            autocast=subject.autocast,
            on_progress=subject.on_progress,
            should_stop=subject.should_stop,
        ).to_dict()

    def columns(self, result: dict[str, Any]) -> list[Column]:
        """Per task, the share of exact answers over all distances of one segment or more."""
        columns: list[Column] = []
        for task, cells in group_by_task(result).items():
            cells = [cell for cell in cells if cell["length"] > 1]
            trials = sum(cell["num_trials"] for cell in cells)
            exact = sum(cell["carried"]["exact"]["value"] * cell["num_trials"] for cell in cells)
            share = exact / trials if trials else None
            columns.append(Column(task, TASKS[task], share, format_percent, better="higher", group="Recall, exact"))
        return columns

    def tables(self, result: dict[str, Any]) -> list[Table]:
        """Per task each figure by depth and length, with that of an empty memory below; then all by distance."""
        tables: list[Table] = []
        for task, cells in group_by_task(result).items():
            by_distance: dict[str, list[Column]] = {}
            for key, title in FIGURES.items():
                write, better = (format_number, "lower") if key == "mean_rank" else (format_percent, "higher")
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
                    segments = "1 segment" if distance == 1 else f"{distance} segments"
                    column = Column(key, title, value, write, better=better)
                    by_distance.setdefault(segments, []).append(column)
            tables.append(Table(f"{TASKS[task]} by distance", list(by_distance.items()), is_for_studies=True))
        return tables

    def notes(self, result: dict[str, Any]) -> list[str]:
        """What a guess reaches, what was left out, and how much was measured."""
        notes = [
            f"a guess is right in {result['chance_first']:.1%}; its mean rank is {result['chance_rank']:g} of "
            f"{result['num_candidates']}",
            *result["notes"],
        ]
        if not result["has_memory"]:
            notes.append("this model has no memory: beyond 1 segment it can know no more than the control")
        counts = f"{result['num_trials']:,} of {result['num_planned']:,} texts, {result['num_tokens']:,} tokens"
        return [*notes, counts]

    def charts(self, results: Sequence[ModelResult]) -> list[Chart]:
        """Per task, the share ranked first by distance, a line per model."""
        charts: list[Chart] = []
        for task, words in TASKS.items():
            rows = [
                {"model": one.name, "distance": distance, "share": share}
                for one in results
                for distance, share in average_by(
                    group_by_task(one.result).get(task, []), "mean_distance", "carried", "first"
                ).items()
            ]
            if rows:
                caption = "Share of questions whose right answer ranks first, by segments from the sentence to it."
                columns: dict[str, Any] = {"x": "distance", "y": "share", "series": "model", "y_format": ".0%"}
                titles: dict[str, Any] = {"x_title": "segments", "y_title": "ranked first"}
                charts.append(line_chart(f"recall-{task}", f"Recall: {words}", caption, rows, **columns, **titles))
        return charts

    def describe(self, result: dict[str, Any]) -> str:
        """Per task, the share of exact answers."""
        shares = [f"{column.title} {column.value:.0%}" for column in self.columns(result) if column.value is not None]
        return f"recall, exact answers: {', '.join(shares)}" if shares else ""
