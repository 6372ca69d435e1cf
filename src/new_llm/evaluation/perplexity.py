"""Perplexity under several protocols: exp(total negative log-likelihood / tokens), never a mean of means.

The sliding, streaming and independent protocols score the same tokens, every one but the first of each document,
exactly once; they differ only in what the model may look back on. So one model's readings under different protocols
compare the same predictions. The rolling protocol is lm-evaluation-harness's: it scores each document's first token,
too.
"""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from new_llm.charts import Chart, bar_chart
from new_llm.config import UserError
from new_llm.data.tokenizer import END_OF_TEXT
from new_llm.data.tokens import TokenSplit
from new_llm.evaluation.diagnosis import diagnose_perplexity
from new_llm.evaluation.measure import Column, Measure, ModelResult, Subject, register_measure
from new_llm.evaluation.scoring import (
    Autocast,
    LanguageModel,
    Progress,
    Row,
    cut_row,
    evaluation_mode,
    exp_or_inf,
    find_device,
    never,
    score_rows,
    select_documents,
)
from new_llm.evaluation.tally import PerplexityResult, Tally
from new_llm.evaluation.windows import plan_rolling_windows, plan_segments, plan_windows
from new_llm.processes import ALONE, Processes


def evaluate_sliding_window(
    model: LanguageModel,
    split: TokenSplit,
    *,
    context: int,
    stride: int,
    batch_size: int,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    autocast: Autocast = contextlib.nullcontext,
    on_progress: Progress | None = None,
    should_stop: Callable[[], bool] = never,
    processes: Processes = ALONE,
) -> PerplexityResult:
    """Perplexity in sliding windows, each read from an empty memory (see `plan_windows`).

    Args:
        model: evaluated in evaluation mode; its held memory is neither read nor changed.
        split: the documents.
        context: tokens in a window.
        stride: tokens from one window to the next, at most the context.
        batch_size: windows read at once; it does not change the result.
        max_tokens: score whole documents, in order, while their scored tokens are at most so many; but at
            least one document, which alone is cut short if it is longer. None: all.
        device: where the model lies; None: where its weights are.
        autocast: makes the context in which the model computes.
        on_progress: called with the tokens scored so far and in all.
        should_stop: asked after each batch; once it says True, the result is of what has been scored by then.
        processes: those that share the work; every one of them gets the whole result.

    Raises:
        UserError: the split has no token to score.
        ValueError: not 1 ≤ stride ≤ context.
    """
    documents = select_documents(split, max_tokens)
    tally = Tally(model, documents, on_progress, processes)
    tally.score_alone(partial(plan_windows, context=context, stride=stride), batch_size, device, autocast, should_stop)
    return tally.finish("sliding", context, stride)


def evaluate_rolling(
    model: LanguageModel,
    split: TokenSplit,
    *,
    context: int,
    prefix_token: int,
    batch_size: int,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    autocast: Autocast = contextlib.nullcontext,
    on_progress: Progress | None = None,
    should_stop: Callable[[], bool] = never,
    processes: Processes = ALONE,
) -> PerplexityResult:
    """Perplexity in the windows of lm-evaluation-harness's rolling log-likelihood (see `plan_rolling_windows`).

    Its word perplexity and bits a byte are that program's word_perplexity and bits_per_byte where each document is one
    of the task's, the context its max_length, and the prefix token the tokenizer's bos or, without one, eos token.

    Args:
        model: as for `evaluate_sliding_window`.
        split: the documents.
        context: tokens that the model reads at most in a window.
        prefix_token: put before each document, so that its first token is scored.
        batch_size: as for `evaluate_sliding_window`, and so are the other arguments and the errors.
        max_tokens: score whole documents while their tokens are at most so many.
        device: where the model lies.
        autocast: makes the context in which the model computes.
        on_progress: called with the tokens scored so far and in all.
        should_stop: asked after each batch.
        processes: those that share the work; every one of them gets the whole result.
    """
    documents = select_documents(split, max_tokens, prefix_token)
    tally = Tally(model, documents, on_progress, processes)
    tally.score_alone(partial(plan_rolling_windows, context=context), batch_size, device, autocast, should_stop)
    return tally.finish("rolling", context, context, prefix_token)


def evaluate_independent(
    model: LanguageModel,
    split: TokenSplit,
    *,
    batch_size: int,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    autocast: Autocast = contextlib.nullcontext,
    on_progress: Progress | None = None,
    should_stop: Callable[[], bool] = never,
    processes: Processes = ALONE,
) -> PerplexityResult:
    """Perplexity of the model's segments, each read alone: what streaming is to be compared with.

    The same tokens in the same segments as `evaluate_streaming`, without the memory. Arguments and errors are
    those of `evaluate_sliding_window`, with both context and stride the model's segment length.
    """
    result = evaluate_sliding_window(
        model,
        split,
        context=model.segment_length,
        stride=model.segment_length,
        batch_size=batch_size,
        max_tokens=max_tokens,
        device=device,
        autocast=autocast,
        on_progress=on_progress,
        should_stop=should_stop,
        processes=processes,
    )
    return dataclasses.replace(result, protocol="independent")


def evaluate_streaming(
    model: LanguageModel,
    split: TokenSplit,
    *,
    batch_size: int,
    segments_per_call: int = 8,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    autocast: Autocast = contextlib.nullcontext,
    on_progress: Progress | None = None,
    should_stop: Callable[[], bool] = never,
    processes: Processes = ALONE,
) -> PerplexityResult:
    """Perplexity of documents read in consecutive segments, the memory carried within a document.

    Each row reads one document with a memory of its own, and takes up the next unread document, from an empty
    memory, when it has come to the end. Calls are cut at whole segments, so the segments are the same however
    many one holds.

    Args:
        model: evaluated in evaluation mode; its held memory is neither read nor changed.
        split: the documents.
        batch_size: documents read at once; it does not change the result.
        segments_per_call: segments a call; it changes the speed alone.
        max_tokens: as for `evaluate_sliding_window`, so that both score the same documents.
        device: where the model lies; None: where its weights are.
        autocast: makes the context in which the model computes.
        on_progress: called with the tokens scored so far and in all.
        should_stop: as for `evaluate_sliding_window`.
        processes: those that share the documents; every one of them gets the whole result.

    Raises:
        UserError: the split has no token to score.
    """
    documents = select_documents(split, max_tokens)
    tally = Tally(model, documents, on_progress, processes)
    by_length = sorted(documents.tokens, key=len, reverse=True)  # so that few rows idle at the end
    unread = deque(by_length[processes.rank :: processes.count])
    pieces: list[deque[Row]] = [deque() for _ in range(min(batch_size, len(unread)))]
    with evaluation_mode(model, autocast), model.fresh_memory(batch_size=len(pieces) or None):
        while not tally.is_stopped:
            starts = [False] * len(pieces)
            for index, row in enumerate(pieces):
                if not row and unread:
                    starts[index] = True
                    document = unread.popleft()
                    windows = plan_segments(len(document), segments_per_call * model.segment_length)
                    row.extend(cut_row(document, window) for window in windows)
            active = [row[0] for row in pieces if row]
            if not active:
                break
            # A row without a document repeats another's tokens, unscored, so that it costs no mask.
            longest = max((row.tokens for row in active), key=len)
            idle = Row(longest, len(longest))
            batch = [row.popleft() if row else idle for row in pieces]
            where = find_device(model, device)
            model.reset_rows(torch.tensor(starts, device=where))
            tally.add(score_rows(model, batch, where, update_memory=True), should_stop)
    return tally.finish("streaming", None, None)


def unigram_perplexity(split: TokenSplit) -> float:
    """exp(H(p)), H(p) = −Σ p ln p, p the share of each token among all tokens of the split.

    The floor of skill: the best that a predictor without context could do, were it told the split's own
    frequencies.

    Raises:
        UserError: the split is empty.
    """
    counts = np.bincount(split.tokens)
    shares = counts[counts > 0] / max(1, counts.sum())
    if not len(shares):
        raise UserError("evaluation: the split holds no token")
    return exp_or_inf(-float(np.sum(shares * np.log(shares))))


class _Perplexity(Measure):
    """What the protocols share as measures."""

    def evaluate(self, subject: Subject, **options: Any) -> PerplexityResult:
        """The perplexity of the subject's documents."""
        raise NotImplementedError

    def run(self, subject: Subject) -> dict[str, Any]:
        """The fields of `PerplexityResult`, the verdict, and the unigram's perplexity on the same documents."""
        result = self.evaluate(
            subject,
            batch_size=subject.settings.batch_size,
            max_tokens=subject.settings.max_tokens,
            device=subject.device,
            autocast=subject.autocast,
            on_progress=subject.on_progress,
            should_stop=subject.should_stop,
            processes=subject.processes,
        )
        return result.to_dict() | {
            "verdict": diagnose_perplexity(result.perplexity).to_dict(),
            "unigram_perplexity": unigram_perplexity(subject.split),
        }

    def columns(self, result: dict[str, Any]) -> list[Column]:
        """The perplexity and its standard error."""
        return [
            Column(
                "perplexity",
                self.name,
                result["perplexity"],
                better="lower",
                group="Validation perplexity",
                error=result["standard_error"],
            )
        ]

    def charts(self, results: Sequence[ModelResult]) -> list[Chart]:
        """A bar per model."""
        rows = [{"model": one.name, "perplexity": one.result["perplexity"]} for one in results]
        caption = f"Perplexity of the validation documents, {self.title}; lower is better."
        return [bar_chart(f"perplexity-{self.name}", self.title, caption, rows, x="model", y="perplexity")]

    def describe(self, result: dict[str, Any]) -> str:
        """The perplexity with its verdict."""
        return f"{self.title} {result['perplexity']:,.2f}: {result['verdict']['text']}"


@register_measure
class SlidingPerplexity(_Perplexity):
    """Perplexity in overlapping windows, each read from an empty memory."""

    name = "sliding"
    title = "sliding-window perplexity"

    def evaluate(self, subject: Subject, **options: Any) -> PerplexityResult:
        """See `evaluate_sliding_window`."""
        settings = subject.settings
        return evaluate_sliding_window(
            subject.model, subject.split, context=settings.context, stride=settings.stride, **options
        )

    def columns(self, result: dict[str, Any]) -> list[Column]:
        """Also the figures that do not depend on the tokenizer, the unigram's share, and the verdict."""
        group = "Validation perplexity"
        unigram = result["unigram_perplexity"]
        ratio = result["perplexity"] / unigram if unigram else None
        verdict = result["verdict"]
        return [
            *super().columns(result),
            Column("word_perplexity", "per word", result["word_perplexity"], better="lower", group=group),
            Column("unigram_ratio", "× unigram", ratio, better="lower", group=group),
            Column("verdict", "verdict", verdict["level"], group=group, hint=verdict["text"]),
            Column("bits_per_byte", "bits/byte", result["bits_per_byte"], better="lower", group=group),
        ]


@register_measure
class StreamingPerplexity(_Perplexity):
    """Perplexity in consecutive segments, the memory carried along each document."""

    name = "streaming"
    title = "streaming perplexity"

    def evaluate(self, subject: Subject, **options: Any) -> PerplexityResult:
        """See `evaluate_streaming`."""
        return evaluate_streaming(
            subject.model, subject.split, segments_per_call=subject.settings.segments_per_call, **options
        )


@register_measure
class IndependentPerplexity(_Perplexity):
    """Perplexity in single segments, each read from an empty memory."""

    name = "independent"
    title = "perplexity of single segments"

    def evaluate(self, subject: Subject, **options: Any) -> PerplexityResult:
        """See `evaluate_independent`."""
        return evaluate_independent(subject.model, subject.split, **options)


@register_measure
class RollingPerplexity(_Perplexity):
    """Perplexity in lm-evaluation-harness's windows."""

    name = "rolling"
    title = "rolling perplexity"

    def evaluate(self, subject: Subject, **options: Any) -> PerplexityResult:
        """See `evaluate_rolling`.

        Raises:
            UserError: the tokenizer has no end-of-text token to put before each document.
        """
        prefix = subject.tokenizer.token_to_id(END_OF_TEXT)
        if prefix is None:
            raise UserError(f"rolling perplexity: the tokenizer has no {END_OF_TEXT} token to begin with")
        context = subject.settings.context
        return evaluate_rolling(subject.model, subject.split, context=context, prefix_token=prefix, **options)
