"""Recall: a sentence hidden in real text, some depth down, and asked for at the end of it."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from new_llm.config import UserError
from new_llm.config.recall import RecallConfig
from new_llm.data.recall_facts import RecallPart, RecallTask
from new_llm.data.tokens import TokenSplit
from new_llm.evaluation.recall_result import RecallCell, RecallResult, summarize_answers
from new_llm.evaluation.recall_scoring import Answer, has_memory, read_context, score_answers
from new_llm.evaluation.recall_texts import RecallText, TextMaker
from new_llm.evaluation.scoring import Autocast, LanguageModel, Progress, evaluation_mode, find_device, never


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


def evaluate_recall(
    model: LanguageModel,
    tokenizer: Tokenizer,
    split: TokenSplit,
    *,
    lengths: Sequence[int] = RecallConfig.lengths,
    depths: Sequence[float] = RecallConfig.depths,
    trials: int = RecallConfig.trials,
    tasks: Sequence[RecallTask] = RecallConfig.tasks,
    num_candidates: int = RecallConfig.num_candidates,
    part: RecallPart = RecallConfig.part,
    batch_size: int = RecallConfig.batch_size,
    segments_per_call: int = RecallConfig.segments_per_call,
    num_resamples: int = RecallConfig.num_resamples,
    confidence: float = RecallConfig.confidence,
    seed: int = RecallConfig.seed,
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
        lengths: of whole texts, in segments.
        depths: from 0, the text's beginning, to 1, right before the question.
        trials: texts for each task, length and depth.
        tasks: passkey and facts.
        num_candidates: answers among which the right one is ranked.
        part: which names, values and keys are drawn from; training may have planted those of "train".
        batch_size: texts read at once; it does not change the result.
        segments_per_call: segments a call; it changes the speed alone.
        num_resamples: resamples behind the intervals of ranks.
        confidence: of all intervals.
        seed: of texts, sentences and resamples.
        device: where the model lies; None: where its weights are.
        autocast: makes the context in which the model computes.
        on_progress: called with the tokens of the texts read so far and in all.
        should_stop: asked after each call; once it says True, the result is of the texts that have been asked by then.

    Raises:
        UserError: there is no text, or the segments are too short for any sentence and question asked for.
    """
    began = time.perf_counter()
    size = model.segment_length
    maker = TextMaker(split, tokenizer, size, part=part, num_candidates=num_candidates, seed=seed)
    plans, notes = plan_texts(maker, tasks, lengths, depths, trials)
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
        num_context = len(texts[0].context)
        with model.fresh_memory(batch_size=len(texts)):
            for begin in range(0, num_context, segments_per_call * size):
                end = min(begin + segments_per_call * size, num_context)
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
        for batch in cut_batches(plans, batch_size):
            texts = [maker.make(*plan) for plan in batch]
            outcomes |= dict(zip(batch, ask(texts), strict=False))
            if is_stopped:
                break
    cells: list[RecallCell] = []
    for task in tasks:
        for length in lengths:
            for depth in depths:
                found = [outcomes[key] for t in range(trials) if (key := Plan(task, length, depth, t)) in outcomes]
                if found:
                    cells.append(_summarize(task, length, depth, found, confidence, num_resamples, seed))
    return RecallResult(
        cells=cells,
        num_candidates=num_candidates,
        has_memory=reads,
        segment_length=size,
        num_trials=len(outcomes),
        num_planned=len(plans),
        notes=notes,
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
        num_tokens=sum(plan.length for plan in outcomes) * size,
        seconds=time.perf_counter() - began,
    )


def plan_texts(
    maker: TextMaker, tasks: Sequence[RecallTask], lengths: Sequence[int], depths: Sequence[float], trials: int
) -> tuple[list[Plan], list[str]]:
    """The texts, short ones first, and notes on lengths that a sentence and its question don't fit in.

    Of one length trial comes after trial, so that a measurement that is stopped has about as many for every depth.

    Raises:
        UserError: none fits.
    """
    plans: list[Plan] = []
    notes: list[str] = []
    for length in sorted(lengths):
        fitting: list[RecallTask] = []
        for task in tasks:
            if all(maker.count_room(task, length, trial) >= 0 for trial in range(trials)):
                fitting.append(task)
            else:
                segments = "1 segment" if length == 1 else f"{length} segments"
                notes.append(f"{task}: {segments} of {maker.segment_length} tokens can't hold sentence and question")
        plans += [Plan(task, length, depth, trial) for trial in range(trials) for task in fitting for depth in depths]
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


def _summarize(
    task: RecallTask,
    length: int,
    depth: float,
    found: Sequence[Outcome],
    confidence: float,
    num_resamples: int,
    seed: int,
) -> RecallCell:
    return RecallCell(
        task=task,
        length=length,
        depth=depth,
        num_trials=len(found),
        mean_depth=float(np.mean([outcome.depth for outcome in found])),
        mean_distance=float(np.mean([outcome.distance for outcome in found])),
        carried=summarize_answers([outcome.carried for outcome in found], confidence, num_resamples, seed),
        reset=summarize_answers([outcome.reset for outcome in found], confidence, num_resamples, seed),
    )
