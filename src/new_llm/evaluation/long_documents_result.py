"""The figures of long documents: perplexities by distance, their differences, and intervals over documents."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from new_llm.evaluation.bootstrap import find_interval
from new_llm.evaluation.document_sums import DocumentSums, LongDocument
from new_llm.evaluation.estimate import Estimate

CARRIED, RESET, FOREIGN = "carried", "reset", "foreign"
"""The names of the three ways."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """How much better or worse the carried memory predicts than another way, on the same tokens.

    Attributes:
        nats: mean loss of a token carried − the other way; below 0 the carried memory is better.
        relative: perplexity carried / the other way − 1 = exp(nats) − 1.
    """

    nats: Estimate
    relative: Estimate


@dataclass(frozen=True)
class RangeFigures:
    """The figures of the tokens in one range of distance.

    Attributes:
        start: distance of the first token of the range; the first range has no token 0, which nothing predicts.
        end: one past the last; None: the range is open.
        num_tokens: tokens scored in each way.
        num_documents: documents that have a token in the range.
        perplexity: by way: carried, reset, foreign (where there is one), and each baseline.
        differences: carried against each other way that has scored the same tokens.

    An interval's ends are None where fewer than two documents have a token in the range.
    """

    start: int
    end: int | None
    num_tokens: int
    num_documents: int
    perplexity: dict[str, Estimate]
    differences: dict[str, Difference]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = dataclasses.asdict(self)
        plain["perplexity"] = {name: found._asdict() for name, found in self.perplexity.items()}
        plain["differences"] = {
            name: {"nats": found.nats._asdict(), "relative": found.relative._asdict()}
            for name, found in self.differences.items()
        }
        return plain


@dataclass(frozen=True)
class LongDocumentsResult:
    """Long documents measured three ways, and by baselines.

    Attributes:
        overall: all tokens.
        ranges: those that hold a token, by distance.
        documents: what the figures are summed from, for each document: its index in the split, the index of the one
            whose memory it borrowed (None: it had none), tokens scored and total loss in nats by way and range.
        range_starts: where the ranges of `documents` begin.
        baselines: segment length and stride of each baseline; no stride: it was read as a stream.
        min_tokens: tokens that a document had to have.
        segment_length: tokens of the model's segments.
        num_documents: documents measured.
        num_tokens: tokens scored in each of the three ways.
        num_planned: tokens that were to be scored in each.
        is_complete: whether everything, the baselines too, has been scored.
        num_resamples: resamples behind the intervals.
        confidence: of the intervals.
        seed: of the resamples.
        seconds: wall-clock time of the measurement.
        tokens_per_second: tokens scored a second, each counted once a way.
    """

    overall: RangeFigures
    ranges: list[RangeFigures]
    documents: list[dict[str, Any]]
    range_starts: list[int]
    baselines: dict[str, dict[str, Any]]
    min_tokens: int
    segment_length: int
    num_documents: int
    num_tokens: int
    num_planned: int
    is_complete: bool
    num_resamples: int
    confidence: float
    seed: int
    seconds: float
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {
            "overall": self.overall.to_dict(),
            "ranges": [found.to_dict() for found in self.ranges],
        }


def summarize_ranges(sums: Mapping[str, DocumentSums], resamples: Array, confidence: float) -> dict[str, Any]:
    """`overall`, `ranges` and `range_starts` of the result.

    Args:
        sums: by way; `CARRIED` among them, with a token at least.
        resamples: how often each document is drawn, [R, D].
        confidence: of the intervals.
    """
    starts = sums[CARRIED].edges.tolist()
    spans = list(zip(starts, [*starts[1:], None], strict=True))
    ranges = [
        _summarize(sums, [column], start, end, resamples, confidence)
        for column, (start, end) in enumerate(spans)
        if sums[CARRIED].counts[:, column].any()
    ]
    overall = _summarize(sums, list(range(len(starts))), 0, None, resamples, confidence)
    return {"overall": overall, "ranges": ranges, "range_starts": starts}


def describe_documents(
    documents: Sequence[LongDocument], sums: Mapping[str, DocumentSums], lenders: Mapping[int, int]
) -> list[dict[str, Any]]:
    """The sums of each document as plain values."""
    return [
        {
            "index": document.index,
            "foreign_memory_of": documents[lenders[place]].index if place in lenders else None,
            "num_tokens": {name: found.counts[place].tolist() for name, found in sums.items()},
            "total_nll": {name: found.total_nll[place].tolist() for name, found in sums.items()},
        }
        for place, document in enumerate(documents)
    ]


def _summarize(
    sums: Mapping[str, DocumentSums],
    columns: list[int],
    start: int,
    end: int | None,
    resamples: Array,
    confidence: float,
) -> RangeFigures:
    counts = {name: found.counts[:, columns].sum(1) for name, found in sums.items()}
    totals = {name: found.total_nll[:, columns].sum(1) for name, found in sums.items()}
    num_documents = int((counts[CARRIED] > 0).sum())

    def estimate(function: Any, *names: str) -> Estimate:
        """A function of the mean losses of some ways."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            value = function(*(totals[name].sum() / counts[name].sum() for name in names))
            if num_documents < 2:
                return Estimate(float(value), None, None)
            drawn = function(*((resamples @ totals[name]) / (resamples @ counts[name]) for name in names))
        return Estimate(float(value), *find_interval(drawn, confidence))

    measured = [name for name in sums if counts[name].any()]
    same_tokens = [name for name in measured if name != CARRIED and (counts[name] == counts[CARRIED]).all()]
    return RangeFigures(
        start=start,
        end=end,
        num_tokens=int(counts[CARRIED].sum()),
        num_documents=num_documents,
        perplexity={name: estimate(np.exp, name) for name in measured},
        differences={
            name: Difference(
                nats=estimate(np.subtract, CARRIED, name),
                relative=estimate(lambda a, b: np.expm1(a - b), CARRIED, name),
            )
            for name in same_tokens
        },
    )
