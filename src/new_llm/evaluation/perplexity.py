"""Perplexity under several protocols: exp(total negative log-likelihood / tokens), never a mean of means.

The sliding, streaming and independent protocols score the same tokens exactly once: all but the first of each document.
They differ only in the context that the model sees, so a model's perplexities under these protocols are comparable. The
rolling protocol is lm-evaluation-harness's and scores each document's first token, too.
"""

import dataclasses
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Unpack

import numpy as np

from new_llm.charts import Chart, bar_chart, line_chart
from new_llm.config import UserError
from new_llm.data.tokenizer import TokenSplit, find_special_tokens, loses_text
from new_llm.evaluation.measure import Column, Measure, ModelResult, Subject, Table, register_measure
from new_llm.evaluation.scoring import (
    LanguageModel,
    Reading,
    Scorer,
    Window,
    exp_or_inf,
    join_scores,
    plan_rolling_windows,
    plan_windows,
    select_documents,
)
from new_llm.evaluation.statistics import DocumentLosses, find_clustered_error
from new_llm.formats import format_count


class Verdict(NamedTuple):
    """What a perplexity in this range most likely means, and what to do. Advice only; it never stops a run.

    `level` is abnormal, suspicious, normal, training or undertrained.
    """

    level: str
    range: str
    text: str


OVER_1000 = math.nextafter(1000.0, math.inf)
_VERDICTS = (
    (5.0, "abnormal", "< 5", "the model sees the tokens it should predict (leak or mask bug): run new-llm eval doctor"),
    (30.0, "suspicious", "5–30", "overfit, or trained on this text: compare both losses, and run new-llm eval doctor"),
    (100.0, "normal", "30–100", "normal for small data: train on more text to lower it"),
    (500.0, "normal", "100–500", "normal for a model trained from scratch: train longer to lower it"),
    (OVER_1000, "training", "500–1000", "still training: train for more epochs, or with a higher learning rate"),
    (
        math.inf,
        "undertrained",
        "> 1000",
        "undertrained: train longer; if its training loss is low, run new-llm eval doctor",
    ),
)
"""Upper bounds, and the verdicts below them."""
_NOT_FINITE = Verdict("abnormal", "not finite", "training diverged: lower the learning rate, or train in fp32")


def diagnose_perplexity(perplexity: float) -> Verdict:
    """Interpret the validation perplexity of a model trained from scratch on real text.

    A bound belongs to the range above it (30 is in "30–100"), except 1000, which is in "500–1000".
    """
    return next((Verdict(*verdict) for bound, *verdict in _VERDICTS if perplexity < bound), _NOT_FINITE)


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it was measured on.

    num_bytes, num_words and the figures based on them are None if the measurement was stopped or a document was cut
    short, because the size of the scored text is then unknown.
    """

    protocol: str
    """sliding, streaming, independent or rolling."""
    perplexity: float
    """exp(loss)."""
    standard_error: float | None
    """Perplexity · the standard error of the loss (delta method), clustered by document. None for fewer than five
    documents."""
    loss: float
    """Mean negative log-likelihood per token, nats."""
    bits_per_byte: float | None
    """Total negative log-likelihood / (ln 2 · num_bytes). The first token of each document is not scored, so this is
    exact only if documents begin with a special token; otherwise it is low by that token's share."""
    word_perplexity: float | None
    """exp(total negative log-likelihood / num_words), with the same restriction."""
    num_tokens: int
    """Tokens that were scored."""
    num_planned: int
    """Tokens to score; more than num_tokens if the measurement was stopped."""
    num_words: int | None
    """Words of the documents' raw text, as lm-evaluation-harness counts them."""
    num_bytes: int | None
    num_documents: int
    documents: dict[str, list[Any]]
    """For each document its `index` in the split, `num_tokens` and `total_nll` in nats, for comparing models."""
    context: int | None
    """Tokens per window or independent segment; None for streaming."""
    stride: int | None
    segment_length: int
    """Tokens per segment; the model cuts longer windows into segments."""
    prefix_token: int | None
    """The token put before each document (rolling only)."""
    seconds: float
    tokens_per_second: float

    is_complete: bool
    """Whether everything planned was scored."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; a perplexity too large for a float is infinite."""
        return dataclasses.asdict(self)


def evaluate_sliding_window(
    model: LanguageModel, split: TokenSplit, *, context: int, stride: int, **reading: Unpack[Reading]
) -> PerplexityResult:
    """Measure perplexity in sliding windows, each read from an empty memory (see `plan_windows`).

    Args:
        model: run in evaluation mode; its held memory is neither read nor changed.
        context: tokens per window.
        stride: distance between windows in tokens, at most the context.
        reading: the options in `Reading`; batch_size is required.

    Raises:
        UserError: the split has no token to score.
        ValueError: not 1 ≤ stride ≤ context.
    """
    plan = partial(plan_windows, context=context, stride=stride)
    return _evaluate("sliding", model, split, reading, plan, context=context, stride=stride)


def evaluate_rolling(
    model: LanguageModel, split: TokenSplit, *, context: int, prefix_token: int, **reading: Unpack[Reading]
) -> PerplexityResult:
    """Measure perplexity as lm-evaluation-harness's rolling log-likelihood does (see `plan_rolling_windows`).

    `prefix_token` is put before each document, so that the document's first token is scored. Word perplexity and bits
    per byte equal that program's word_perplexity and bits_per_byte if the documents are those of its task, `context` is
    its max_length, and the prefix is the tokenizer's bos token or, without one, its eos token.
    """
    plan = partial(plan_rolling_windows, context=context)
    return _evaluate("rolling", model, split, reading, plan, context=context, stride=context, prefix_token=prefix_token)


def evaluate_independent(model: LanguageModel, split: TokenSplit, **reading: Unpack[Reading]) -> PerplexityResult:
    """Measure perplexity on the same tokens and segments as `evaluate_streaming`, each segment from an empty memory."""
    length = model.segment_length
    plan = partial(plan_windows, context=length)
    return _evaluate("independent", model, split, reading, plan, context=length, stride=length)


def evaluate_streaming(
    model: LanguageModel, split: TokenSplit, *, segments_per_call: int = 8, **reading: Unpack[Reading]
) -> PerplexityResult:
    """Measure perplexity on consecutive segments, with the memory carried within each document.

    `segments_per_call` affects only the speed.
    """
    return _evaluate("streaming", model, split, reading, segments_per_call)


def unigram_perplexity(split: TokenSplit) -> float:
    """Return exp(H(p)), H(p) = −Σ p ln p, where p are the token frequencies of the split.

    This is the best perplexity that a predictor without context can reach.

    Raises:
        UserError: the split is empty.
    """
    counts = np.bincount(split.tokens)
    shares = counts[counts > 0] / max(1, counts.sum())
    if not len(shares):
        raise UserError("evaluation: the split has no tokens")
    return exp_or_inf(-float(np.sum(shares * np.log(shares))))


def _evaluate(
    protocol: str,
    model: LanguageModel,
    split: TokenSplit,
    reading: Reading,
    plan: Callable[[int], list[Window]] | int,
    *,
    context: int | None = None,
    stride: int | None = None,
    prefix_token: int | None = None,
) -> PerplexityResult:
    """Score in windows if `plan` is a function, or in streams with `plan` segments per call."""
    began = time.perf_counter()
    chosen = select_documents(split, reading.get("max_tokens"), prefix_token)
    scorer = Scorer(model, chosen.tokens, reading)
    found = scorer.score_streams(plan) if isinstance(plan, int) else scorer.score_windows(plan)
    own = DocumentLosses.sum([join_scores(found)], len(chosen.tokens))
    tokens, nll = scorer.processes.sum(own.num_tokens[:, 0]), scorer.processes.sum(own.total_nll[:, 0])
    # Summed batch by batch, in reading order, so that the result does not depend on how documents are counted.
    parts = np.array([sum(float(scores.losses.sum()) for scores in found), scorer.is_stopped], dtype=np.float64)
    total, num_stopped = scorer.processes.sum(parts).tolist()
    count, num_bytes, num_words = int(tokens.sum()), chosen.num_bytes, chosen.num_words
    if count < chosen.num_scored and num_stopped:
        num_bytes = num_words = None
    elif count != chosen.num_scored:  # a bug in New-LLM; no number is better than a wrong one
        raise RuntimeError(f"{protocol}: scored {count} of {chosen.num_scored} tokens")
    loss = total / count if count else math.nan
    perplexity, error = exp_or_inf(loss), find_clustered_error(nll, tokens)
    seconds = time.perf_counter() - began
    return PerplexityResult(
        protocol=protocol,
        perplexity=perplexity,
        standard_error=None if error is None else perplexity * error,
        loss=loss,
        bits_per_byte=total / (math.log(2) * num_bytes) if num_bytes else None,
        word_perplexity=exp_or_inf(total / num_words) if num_words else None,
        num_tokens=count,
        num_planned=chosen.num_scored,
        num_words=num_words,
        num_bytes=num_bytes,
        num_documents=len(chosen.tokens),
        documents={"index": chosen.indices, "num_tokens": tokens.tolist(), "total_nll": nll.tolist()},
        context=context,
        stride=stride,
        segment_length=model.segment_length,
        prefix_token=prefix_token,
        seconds=seconds,
        tokens_per_second=count / seconds if seconds else math.inf,
        is_complete=count == chosen.num_scored,
    )


class Perplexity(Measure):
    """Base class of the protocols' measures."""

    GROUP: ClassVar[str] = "Validation perplexity"
    can_stop = True

    @abstractmethod
    def evaluate(self, subject: Subject) -> PerplexityResult:
        """Measure the perplexity of the subject's documents."""

    def run(self, subject: Subject) -> dict[str, Any]:
        """Return the fields of `PerplexityResult`, the `verdict`, and the split's `unigram_perplexity`."""
        result = self.evaluate(subject)
        unknown = dict.fromkeys(("num_bytes", "num_words", "bits_per_byte", "word_perplexity"))
        lost = unknown | {"loses_text": True} if loses_text(subject.tokenizer, subject.split) else {}
        return result.to_dict() | {
            "verdict": diagnose_perplexity(result.perplexity)._asdict(),
            "unigram_perplexity": unigram_perplexity(subject.split),
            **lost,
        }

    def columns(self, result: dict[str, Any]) -> list[Column]:
        """Return the perplexity with its standard error."""
        value, error = result["perplexity"], result["standard_error"]
        return [Column("perplexity", self.name, value, better="lower", group=self.GROUP, error=error)]

    def losses(self, result: dict[str, Any]) -> dict[str, DocumentLosses]:
        """Return each document's losses."""
        return {"": DocumentLosses.read(result["documents"]["num_tokens"], result["documents"]["total_nll"])}

    def charts(self, results: Sequence[ModelResult]) -> list[Chart]:
        """Draw a bar per model, if there are several."""
        if len(results) < 2:
            return []
        rows = [{"model": one.name, "perplexity": one.result["perplexity"]} for one in results]
        caption = f"{self.title.capitalize()} of the validation documents; lower is better."
        return [bar_chart(f"perplexity-{self.name}", self.title, caption, rows, x="model", y="perplexity")]

    def describe(self, result: dict[str, Any]) -> str:
        """State the perplexity and its verdict."""
        said = f"{self.title} {result['perplexity']:,.2f}: {result['verdict']['text']}"
        if not result.get("loses_text"):
            return said
        lost = "the tokenizer loses part of the text, so figures per byte and word would be too low and are left out"
        return f"{said}; {lost}"

    def notes(self, result: dict[str, Any]) -> list[str]:
        """State the protocol's settings and how much was scored."""
        how = f"segments of {result['segment_length']:,}"
        if result["context"] is not None:
            how = f"context {result['context']:,}, stride {result['stride']:,}; {how}"
        tokens = f"{result['num_tokens']:,} of {result['num_planned']:,} tokens"
        speed = f"{result['tokens_per_second']:,.0f} tokens/s"
        return [f"{self.name}: {how}; {tokens}, documents: {result['num_documents']:,}; {speed}"]


@register_measure
class SlidingPerplexity(Perplexity):
    """Perplexity in overlapping windows, each read from an empty memory."""

    name = "sliding"
    title = "sliding-window perplexity"

    def evaluate(self, subject: Subject) -> PerplexityResult:
        """See `evaluate_sliding_window`."""
        context, stride = subject.settings.context, subject.settings.stride
        return evaluate_sliding_window(subject.model, subject.split, context=context, stride=stride, **subject.reading)

    def columns(self, result: dict[str, Any]) -> list[Column]:
        """Add the figures that do not depend on the tokenizer, the ratio to the unigram perplexity, and the verdict."""
        unigram, verdict, perplexity = result["unigram_perplexity"], result["verdict"], result["perplexity"]
        ratio = perplexity / unigram if unigram and perplexity is not None else None  # JSON has no infinity
        return [
            *super().columns(result),
            Column("word_perplexity", "per word", result["word_perplexity"], better="lower", group=self.GROUP),
            Column("unigram_ratio", "× unigram", ratio, better="lower", group=self.GROUP),
            Column("verdict", "verdict", verdict["level"], group=self.GROUP, hint=verdict["text"]),
            Column("bits_per_byte", "bits/byte", result["bits_per_byte"], better="lower", group=self.GROUP),
        ]


@register_measure
class StreamingPerplexity(Perplexity):
    """Perplexity on consecutive segments, with the memory carried within each document."""

    name = "streaming"
    title = "streaming perplexity"

    def evaluate(self, subject: Subject) -> PerplexityResult:
        """See `evaluate_streaming`."""
        per_call = subject.settings.segments_per_call
        return evaluate_streaming(subject.model, subject.split, segments_per_call=per_call, **subject.reading)

    def columns(self, result: dict[str, Any]) -> list[Column]:
        """Add bits per byte, which is comparable across tokenizers."""
        bits = Column("bits_per_byte", "streaming bits/byte", result["bits_per_byte"], better="lower", group=self.GROUP)
        return [*super().columns(result), bits]


@register_measure
class IndependentPerplexity(Perplexity):
    """Perplexity on single segments, each read from an empty memory."""

    name = "independent"
    title = "perplexity of single segments"

    def evaluate(self, subject: Subject) -> PerplexityResult:
        """See `evaluate_independent`."""
        return evaluate_independent(subject.model, subject.split, **subject.reading)


@register_measure
class RollingPerplexity(Perplexity):
    """Perplexity in lm-evaluation-harness's windows."""

    name = "rolling"
    title = "rolling perplexity"

    def evaluate(self, subject: Subject) -> PerplexityResult:
        """See `evaluate_rolling`."""
        begin = find_special_tokens(subject.tokenizer).get("bos_token")
        if begin is None:
            raise UserError("rolling perplexity: the tokenizer has no <|endoftext|> or <s> to put before documents")
        prefix, context = subject.tokenizer.get_vocab()[begin], subject.settings.context
        return evaluate_rolling(subject.model, subject.split, context=context, prefix_token=prefix, **subject.reading)


@register_measure
class Positions(Measure):
    """Perplexity by a token's position in its sample."""

    name = "positions"
    title = "perplexity by position"

    def run(self, subject: Subject) -> dict[str, Any]:
        """Measure perplexity by range of positions.

        Each document is cut into consecutive samples of `seq_length` tokens (the last may be shorter), each read from
        an empty memory. A token's position is its index in the sample; the first token has no context and is not
        scored. The result has `ranges`: {"start", "end", "perplexity", "num_tokens"} of each with scored tokens.

        Raises:
            UserError: the split has no token to score.
        """
        length, edges = subject.seq_length, subject.settings.position_edges
        samples = [
            document[begin : begin + length]
            for document in select_documents(subject.split, subject.settings.max_tokens).tokens
            for begin in range(0, len(document) - 1, length)
        ]
        scorer = Scorer(subject.model, samples, subject.reading)
        found = join_scores(scorer.score_windows(lambda length: [Window(0, length, 1)]))
        total_nll = scorer.processes.sum(np.bincount(found.positions, found.losses, length))
        counts = scorer.processes.sum(np.bincount(found.positions, minlength=length))
        ranges: list[dict[str, Any]] = []
        for start, end in pairwise([*(edge for edge in edges if edge < length), length]):
            if count := int(counts[start:end].sum()):
                perplexity = exp_or_inf(total_nll[start:end].sum() / count)
                ranges.append({"start": start, "end": end, "perplexity": perplexity, "num_tokens": count})
        return {"seq_length": length, "ranges": ranges}

    def charts(self, results: Sequence[ModelResult]) -> list[Chart]:
        """Draw a line per model, with a point per range."""
        rows = [
            {"model": one.name, "position": f"{entry['start']}–{entry['end']}", "perplexity": entry["perplexity"]}
            for one in results
            for entry in one.result["ranges"]
        ]
        caption = "Perplexity by range of positions in a sample. Where a line falls, the model uses its context."
        axes: dict[str, Any] = {"x": "position", "y": "perplexity", "series": "model"}
        axes |= {"x_title": "position in the sample", "y_title": "perplexity"}
        return [line_chart("positions", "Perplexity by position", caption, rows, **axes)]

    def tables(self, result: dict[str, Any]) -> list[Table]:
        """Return a row per range."""
        rows: list[tuple[str, list[Column]]] = []
        for entry in result["ranges"]:
            tokens = Column("num_tokens", "tokens", entry["num_tokens"], format_count)
            columns = [Column("perplexity", "perplexity", entry["perplexity"]), tokens]
            rows.append((f"{entry['start']}–{entry['end']}", columns))
        return [Table(f"by position in samples of {result['seq_length']} tokens", rows)]

    def describe(self, result: dict[str, Any]) -> str:
        """State the perplexity of the first and the last range."""
        first, last = result["ranges"][0], result["ranges"][-1]
        return (
            f"perplexity {first['perplexity']:,.1f} at positions {first['start']}–{first['end']}, "
            f"{last['perplexity']:,.1f} at {last['start']}–{last['end']}"
        )
