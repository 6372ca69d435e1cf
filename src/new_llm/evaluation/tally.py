"""What a perplexity is summed from, and the result that says what it was measured on."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from new_llm.evaluation.scoring import (
    Autocast,
    LanguageModel,
    Progress,
    ScoredDocuments,
    cut_row,
    evaluation_mode,
    exp_or_inf,
    find_device,
    group_by_length,
    score_rows,
)
from new_llm.evaluation.windows import Window
from new_llm.processes import ALONE, Processes


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it was measured on.

    Attributes:
        protocol: sliding, streaming, independent or rolling.
        perplexity: exp(loss).
        standard_error: of the perplexity, by the delta method: perplexity · s / √num_tokens, s² the variance
            of the losses of single tokens, which are taken as independent. None for one token.
        loss: mean negative log-likelihood a token, nats.
        bits_per_byte: total negative log-likelihood / (ln 2 · num_bytes). Each document's first token has no
            context and is not scored: exact where documents begin with a mark of their own, else lower by
            that one token.
        word_perplexity: exp(total negative log-likelihood / num_words), under the same condition.
        num_tokens: tokens scored.
        num_planned: tokens that were to be scored: more than num_tokens where the measurement was stopped.
        num_words: words of the documents' raw text, as lm-evaluation-harness counts them.
        num_bytes: UTF-8 bytes of the documents' raw text. Where the only document was cut short, the text
            that was scored is not known to the byte: num_bytes, num_words and what rests on them are None. So
            they are where the measurement was stopped.
        num_documents: documents scored.
        context: tokens in a window or independent segment; None for streaming.
        stride: tokens from one window to the next; None for streaming.
        segment_length: tokens of the model's segments, which it cuts a longer window into.
        prefix_token: the token put before each document; None: none.
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
    num_planned: int
    num_words: int | None
    num_bytes: int | None
    num_documents: int
    context: int | None
    stride: int | None
    segment_length: int
    prefix_token: int | None
    seconds: float
    tokens_per_second: float

    @property
    def is_complete(self) -> bool:
        """Whether all was scored that was to be."""
        return self.num_tokens == self.num_planned

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a perplexity too large for a float is infinite."""
        return dataclasses.asdict(self) | {"is_complete": self.is_complete}


class Tally:
    """Sums of the losses of single tokens, in float64; with several processes, of all of them in the end.

    Args:
        model: the model.
        documents: that are scored by all processes together.
        on_progress: called with the tokens scored by this process so far, and with those to score in all.
        processes: those that share the work.
    """

    def __init__(
        self,
        model: LanguageModel,
        documents: ScoredDocuments,
        on_progress: Progress | None,
        processes: Processes = ALONE,
    ):
        self.model = model
        self.documents = documents
        self.on_progress = on_progress
        self.processes = processes
        self.began = time.perf_counter()
        self.num_tokens = 0
        self.total = 0.0
        self.total_of_squares = 0.0
        self.is_stopped = False

    def score_alone(
        self,
        plan: Callable[[int], list[Window]],
        batch_size: int,
        device: torch.device | str | None,
        autocast: Autocast,
        should_stop: Callable[[], bool],
    ) -> None:
        """Score the documents in windows, each read from an empty memory.

        Args:
            plan: the windows of a document of so many tokens.
            batch_size: windows read at once.
            device: where the model lies; None: where its weights are.
            autocast: makes the context in which the model computes.
            should_stop: asked after each batch; once it says True, nothing more is scored.
        """
        rows = [cut_row(tokens, window) for tokens in self.documents.tokens for window in plan(len(tokens))]
        where = find_device(self.model, device)
        with evaluation_mode(self.model, autocast), self.model.fresh_memory():
            for batch in group_by_length(rows, batch_size)[self.processes.rank :: self.processes.count]:
                self.add(score_rows(self.model, [rows[i] for i in batch], where), should_stop)
                if self.is_stopped:
                    break

    def add(self, losses: Iterable[np.ndarray], should_stop: Callable[[], bool]) -> None:
        """Count the losses of one batch."""
        values = np.concatenate(list(losses))
        self.num_tokens += len(values)
        self.total += float(values.sum())
        self.total_of_squares += float(values @ values)
        if self.on_progress:
            self.on_progress(self.num_tokens, self.documents.num_scored)
        self.is_stopped = should_stop()

    def finish(
        self, protocol: str, context: int | None, stride: int | None, prefix_token: int | None = None
    ) -> PerplexityResult:
        """The result of all that was counted, by whichever process."""
        sums = np.array([self.num_tokens, self.total, self.total_of_squares, self.is_stopped], dtype=np.float64)
        num_tokens, self.total, self.total_of_squares, num_stopped = self.processes.sum(sums).tolist()
        self.num_tokens, self.is_stopped = int(num_tokens), num_stopped > 0
        seconds = time.perf_counter() - self.began
        count, num_bytes, num_words = self.num_tokens, self.documents.num_bytes, self.documents.num_words
        if count < self.documents.num_scored and self.is_stopped:
            num_bytes = num_words = None
        elif count != self.documents.num_scored:  # a fault of ours; no number is better than a wrong one
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
            num_planned=self.documents.num_scored,
            num_words=num_words,
            num_bytes=num_bytes,
            num_documents=len(self.documents.tokens),
            context=context,
            stride=stride,
            segment_length=self.model.segment_length,
            prefix_token=prefix_token,
            seconds=seconds,
            tokens_per_second=count / seconds if seconds else math.inf,
        )
