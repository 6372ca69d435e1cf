"""Perplexity under several protocols: exp(total negative log-likelihood / tokens), never a mean of means.

All protocols score the same tokens, every one but the first of each document, exactly once; they differ only
in what the model may look back on. So one model's readings under different protocols compare the same
predictions.
"""

import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from new_llm.config import UserError
from new_llm.data.tokens import TokenSplit
from new_llm.evaluation.scoring import (
    Autocast,
    LanguageModel,
    Progress,
    Row,
    ScoredDocuments,
    evaluation_mode,
    exp_or_inf,
    find_device,
    group_by_length,
    score_rows,
    select_documents,
)
from new_llm.evaluation.windows import plan_segments, plan_windows


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it was measured on.

    Attributes:
        protocol: sliding, streaming or independent.
        perplexity: exp(loss).
        standard_error: of the perplexity, by the delta method: perplexity · s / √num_tokens, s² the variance
            of the losses of single tokens, which are taken as independent. None for one token.
        loss: mean negative log-likelihood a token, nats.
        bits_per_byte: total negative log-likelihood / (ln 2 · num_bytes). Each document's first token has no
            context and is not scored: exact where documents begin with a mark of their own, else lower by
            that one token.
        word_perplexity: exp(total negative log-likelihood / num_words), under the same condition.
        num_tokens: tokens scored.
        num_words: words of the documents' raw text, as lm-evaluation-harness counts them.
        num_bytes: UTF-8 bytes of the documents' raw text. Where the only document was cut short, the text
            that was scored is not known to the byte: num_bytes, num_words and what rests on them are None.
        num_documents: documents scored.
        context: tokens in a window or independent segment; None for streaming.
        stride: tokens from one window to the next; None for streaming.
        seconds: wall-clock time of the measurement.
        tokens_per_second: tokens scored a second.
    """

    protocol: str
    perplexity: float
    standard_error: float | None
    loss: float
    bits_per_byte: float | None
    word_perplexity: float | None
    num_tokens: int
    num_words: int | None
    num_bytes: int | None
    num_documents: int
    context: int | None
    stride: int | None
    seconds: float
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a perplexity too large for a float is infinite."""
        return dataclasses.asdict(self)


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

    Raises:
        UserError: the split has no token to score.
        ValueError: not 1 ≤ stride ≤ context.
    """
    documents = select_documents(split, max_tokens)
    rows = [
        Row(document[window.begin : window.end], window.first_scored - window.begin)
        for document in documents.tokens
        for window in plan_windows(len(document), context, stride)
    ]
    tally = _Tally(documents, on_progress)
    with evaluation_mode(model, autocast), model.fresh_memory():
        for batch in group_by_length(rows, batch_size):
            tally.add(score_rows(model, [rows[i] for i in batch], find_device(model, device)))
    return tally.finish("sliding", context, stride)


def evaluate_independent(
    model: LanguageModel,
    split: TokenSplit,
    *,
    batch_size: int,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    autocast: Autocast = contextlib.nullcontext,
    on_progress: Progress | None = None,
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

    Raises:
        UserError: the split has no token to score.
    """
    documents = select_documents(split, max_tokens)
    tally = _Tally(documents, on_progress)
    unread = deque(sorted(documents.tokens, key=len, reverse=True))  # so that few rows idle at the end
    pieces: list[deque[Row]] = [deque() for _ in range(min(batch_size, len(unread)))]
    with evaluation_mode(model, autocast), model.fresh_memory(batch_size=len(pieces)):
        while True:
            starts = [False] * len(pieces)
            for index, row in enumerate(pieces):
                if not row and unread:
                    starts[index] = True
                    document = unread.popleft()
                    windows = plan_segments(len(document), segments_per_call * model.segment_length)
                    row.extend(Row(document[window.begin : window.end]) for window in windows)
            active = [row[0] for row in pieces if row]
            if not active:
                break
            # A row without a document repeats another's tokens, unscored, so that it costs no mask.
            longest = max((row.tokens for row in active), key=len)
            idle = Row(longest, len(longest))
            batch = [row.popleft() if row else idle for row in pieces]
            where = find_device(model, device)
            model.reset_rows(torch.tensor(starts, device=where))
            tally.add(score_rows(model, batch, where, update_memory=True))
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


class _Tally:
    """Sums of the losses of single tokens, in float64."""

    def __init__(self, documents: ScoredDocuments, on_progress: Progress | None):
        self.documents = documents
        self.on_progress = on_progress
        self.began = time.perf_counter()
        self.num_tokens = 0
        self.total = 0.0
        self.total_of_squares = 0.0

    def add(self, losses: Iterable[np.ndarray]) -> None:
        """Count the losses of one batch."""
        values = np.concatenate(list(losses))
        self.num_tokens += len(values)
        self.total += float(values.sum())
        self.total_of_squares += float(values @ values)
        if self.on_progress:
            self.on_progress(self.num_tokens, self.documents.num_scored)

    def finish(self, protocol: str, context: int | None, stride: int | None) -> PerplexityResult:
        """The result of all that was counted."""
        seconds = time.perf_counter() - self.began
        count, num_bytes, num_words = self.num_tokens, self.documents.num_bytes, self.documents.num_words
        if count != self.documents.num_scored:  # a fault of ours; no number is better than a wrong one
            raise RuntimeError(f"{protocol}: scored {count} of {self.documents.num_scored} tokens")
        loss = self.total / count
        perplexity = exp_or_inf(loss)
        standard_error = None
        if count > 1:
            variance = (self.total_of_squares - count * loss**2) / (count - 1)
            standard_error = perplexity * math.sqrt(max(0.0, variance) / count)
        return PerplexityResult(
            protocol=protocol,
            perplexity=perplexity,
            standard_error=standard_error,
            loss=loss,
            bits_per_byte=self.total / (math.log(2) * num_bytes) if num_bytes else None,
            word_perplexity=exp_or_inf(self.total / num_words) if num_words else None,
            num_tokens=count,
            num_words=num_words,
            num_bytes=num_bytes,
            num_documents=len(self.documents.tokens),
            context=context,
            stride=stride,
            seconds=seconds,
            tokens_per_second=count / seconds if seconds else math.inf,
        )
