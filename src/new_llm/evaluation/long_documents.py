"""Does the memory help on long documents? The same weights on the same tokens, with three memories.

carried: a document is read as a stream. reset: each of its segments is read from an empty memory. foreign: each of its
segments is read with what another document's stream holds after as many segments. The first alone can know the
document; the third tells whether it is this document's content that helps, or any memory that is not empty.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from new_llm.charts import Chart, line_chart
from new_llm.config import UserError
from new_llm.config.evaluation import LongDocumentsConfig
from new_llm.data.tokenizer import TokenSplit
from new_llm.evaluation.document_pairs import score_pairs
from new_llm.evaluation.measure import (
    Baseline,
    Column,
    Measure,
    ModelResult,
    Subject,
    Table,
    register_measure,
    to_plain,
)
from new_llm.evaluation.scoring import Autocast, LanguageModel, LossSums, Progress, Reading, Scorer, Scores, never
from new_llm.evaluation.statistics import (
    MIN_DOCUMENTS,
    Array,
    Estimate,
    draw_resamples,
    estimate_over_documents,
)
from new_llm.evaluation.windows import plan_windows
from new_llm.formats import WAYS, format_count, format_percent, format_size, name_range

CARRIED, RESET, FOREIGN = "carried", "reset", "foreign"


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
    """The figures of the tokens in one range of distance from the document's start.

    Attributes:
        start: distance of the first token of the range; the first range has no token 0, which nothing predicts.
        end: one past the last; None: the range is open.
        num_tokens: tokens scored in each way.
        num_documents: documents that have a token in the range.
        perplexity: by way: carried, reset, foreign (where there is one), and each baseline.
        differences: carried against each other way that has scored the same tokens.

    Intervals are over documents; their ends are None where fewer than MIN_DOCUMENTS have a token in the range.
    """

    start: int
    end: int | None
    num_tokens: int
    num_documents: int
    perplexity: dict[str, Estimate]
    differences: dict[str, Difference]


@dataclass(frozen=True)
class LongDocumentsResult:
    """Long documents measured three ways, and by baselines.

    Attributes:
        overall: all tokens.
        ranges: those that hold a token, by distance.
        documents: what the figures are summed from, for each document: its index in the split, the index of the one
            whose memory it borrowed (None: it had none), tokens scored and total loss in nats by way and range.
        range_starts: where the ranges of `documents` begin.
        baselines: segment length, stride and facts of each baseline; no stride: it was read as a stream.
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
        tokens_per_second: tokens scored per second, each counted once for every way.
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
        return to_plain(self)


def evaluate_long_documents(
    model: LanguageModel,
    split: TokenSplit,
    settings: LongDocumentsConfig | None = None,
    *,
    baselines: Sequence[Baseline] = (),
    device: torch.device | str | None = None,
    autocast: Autocast = contextlib.nullcontext,
    on_progress: Progress | None = None,
    should_stop: Callable[[], bool] = never,
) -> LongDocumentsResult:
    """Perplexity of long documents by distance from their start, with the memory carried, reset and foreign.

    Documents are read in pairs, and segment by segment in all three ways, so that the ways share batches. The
    intervals are percentile bootstrap ones over documents, paired: each resample draws documents and takes the
    difference of the ways within them.

    Args:
        model: evaluated in evaluation mode; its held memory is neither read nor changed.
        split: the documents.
        settings: which documents, ranges and intervals; None: the defaults. The baselines that it names are the
            caller's to load.
        baselines: other models, read one after the other.
        device: where the model lies; None: where its weights are.
        autocast: makes the context in which the model computes.
        on_progress: called with the tokens scored so far and in all, each counted once for every model.
        should_stop: asked after each batch; once it says True, the result is of what has been scored by then.

    Raises:
        UserError: no document is long enough.
        ValueError: two baselines have one name, or that of a way.
    """
    settings = settings or LongDocumentsConfig()
    names = [CARRIED, RESET, FOREIGN, *(baseline.name for baseline in baselines)]
    if len(set(names)) < len(names):
        raise ValueError(f"baselines: {names[3:]}: their names must differ, and none be one of {names[:3]}")
    began = time.perf_counter()
    indices = select_long_documents(split, settings)
    documents = [split.document(index)[: settings.max_tokens_per_document] for index in indices]
    num_planned = sum(len(tokens) - 1 for tokens in documents)
    num_done, is_stopped = 0, False

    def open_scorer(source: LanguageModel, place: torch.device | str | None, context: Autocast) -> Scorer:
        def note(done: int, _: int) -> None:
            if on_progress:
                on_progress(num_done + done, num_planned * (1 + len(baselines)))

        reading: Reading = {"batch_size": settings.batch_size, "should_stop": should_stop, "on_progress": note}
        return Scorer(source, documents, {**reading, "device": place, "autocast": context})

    scorer = open_scorer(model, device, autocast)
    pairs = score_pairs(scorer)
    found: dict[str, list[Scores]] = {CARRIED: pairs.carried, RESET: pairs.reset}
    if len(documents) > 1:
        found[FOREIGN] = pairs.foreign
    for baseline in baselines:
        num_done += num_planned
        is_stopped = is_stopped or scorer.is_stopped
        if is_stopped:
            found[baseline.name] = []
            continue
        scorer = open_scorer(baseline.model, baseline.device, baseline.autocast)
        if baseline.stride is None:
            found[baseline.name] = scorer.score_streams(settings.segments_per_call)
        else:
            plan = partial(plan_windows, context=baseline.model.segment_length, stride=baseline.stride)
            found[baseline.name] = scorer.score_windows(plan)
    is_stopped = is_stopped or scorer.is_stopped

    sums: dict[str, LossSums] = {}
    for name, batches in found.items():
        sums[name] = LossSums(len(documents), settings.edges)
        for scores in batches:
            sums[name].add(scores)
    is_complete = all(one.num_tokens == num_planned for one in sums.values())
    if not is_complete and not is_stopped:  # a bug in New-LLM; no number is better than a wrong one
        raise RuntimeError(f"scored { ({name: one.num_tokens for name, one in sums.items()}) } of {num_planned} tokens")
    seconds = time.perf_counter() - began
    resamples = draw_resamples(len(documents), settings.num_resamples, settings.seed)
    overall, ranges = summarize_ranges(sums, resamples, settings.confidence)
    return LongDocumentsResult(
        overall=overall,
        ranges=ranges,
        range_starts=list(settings.edges),
        documents=[
            {
                "index": index,
                "foreign_memory_of": indices[pairs.lenders[place]] if place in pairs.lenders else None,
                "num_tokens": {name: one.counts[place].tolist() for name, one in sums.items()},
                "total_nll": {name: one.total_nll[place].tolist() for name, one in sums.items()},
            }
            for place, index in enumerate(indices)
        ],
        baselines={
            baseline.name: {
                "segment_length": baseline.model.segment_length,
                "stride": baseline.stride,
                "subject": baseline.facts,
            }
            for baseline in baselines
        },
        min_tokens=settings.min_tokens,
        segment_length=model.segment_length,
        num_documents=len(documents),
        num_tokens=sums[CARRIED].num_tokens,
        num_planned=num_planned,
        is_complete=is_complete,
        num_resamples=settings.num_resamples,
        confidence=settings.confidence,
        seed=settings.seed,
        seconds=seconds,
        tokens_per_second=sum(one.num_tokens for one in sums.values()) / seconds,
    )


def select_long_documents(split: TokenSplit, settings: LongDocumentsConfig) -> list[int]:
    """The first documents that are long enough, by their index in the split.

    Raises:
        UserError: there is none.
    """
    chosen = split.find_long(settings.min_tokens)[: settings.max_documents].tolist()
    if not chosen:
        longest = int(split.lengths.max(initial=0))
        raise UserError(
            f"min_tokens: no document has {settings.min_tokens:,} tokens; the longest of "
            f"{split.num_documents:,} has {longest:,}"
        )
    return chosen


def summarize_ranges(
    sums: Mapping[str, LossSums], resamples: Array, confidence: float
) -> tuple[RangeFigures, list[RangeFigures]]:
    """The figures of all tokens, and of each range that holds one.

    Args:
        sums: by way; `CARRIED` among them, with a token at least.
        resamples: how often each document is drawn, [R, D].
        confidence: of the intervals.
    """
    starts = sums[CARRIED].edges.tolist()

    def summarize(columns: list[int], start: int, end: int | None) -> RangeFigures:
        ways: dict[str, tuple[Array, NDArray[np.int64]]] = {
            name: (one.total_nll[:, columns].sum(1), one.counts[:, columns].sum(1)) for name, one in sums.items()
        }
        counts = ways[CARRIED][1]
        measured = [name for name, (_, count) in ways.items() if count.any()]
        comparable = [name for name in measured if name != CARRIED and (ways[name][1] == counts).all()]

        def estimate(function: Callable[..., Any], *names: str) -> Estimate:
            return estimate_over_documents(function, [ways[name] for name in names], resamples, confidence)

        return RangeFigures(
            start=start,
            end=end,
            num_tokens=int(counts.sum()),
            num_documents=int((counts > 0).sum()),
            perplexity={name: estimate(np.exp, name) for name in measured},
            differences={
                name: Difference(
                    nats=estimate(np.subtract, CARRIED, name),
                    relative=estimate(lambda a, b: np.expm1(a - b), CARRIED, name),
                )
                for name in comparable
            },
        )

    spans = zip(starts, [*starts[1:], None], strict=True)
    ranges = [
        summarize([column], start, end)
        for column, (start, end) in enumerate(spans)
        if sums[CARRIED].counts[:, column].any()
    ]
    return summarize(list(range(len(starts))), 0, None), ranges


def describe_relative(found: Mapping[str, Any], confidence: float) -> str:
    """A relative difference in words: 3.1 % [2.0, 4.2] lower."""
    value, low, high = (found["value"], found["low"], found["high"])
    said = f"{format_size(value, low, high)} {'lower' if value < 0 else 'higher'}"
    if low is None or high is None:
        return f"{said} (fewer than {MIN_DOCUMENTS} documents: no interval)"
    return f"{said} ({confidence:.0%} interval over documents)"


def name_way(way: str) -> str:
    """What a way or a baseline is called for readers."""
    return WAYS.get(way, way)


@register_measure
class LongDocuments(Measure):
    """Long documents with the memory carried, emptied, and another document's."""

    name = "long"
    title = "long documents"
    can_stop = True

    def run(self, subject: Subject) -> dict[str, Any]:
        """See `LongDocumentsResult`."""
        return evaluate_long_documents(
            subject.model,
            subject.split,
            subject.settings.long_documents,
            baselines=subject.baselines,
            device=subject.device,
            autocast=subject.autocast,
            on_progress=subject.on_progress,
            should_stop=subject.should_stop,
        ).to_dict()

    def columns(self, result: dict[str, Any]) -> list[Column]:
        """Perplexity with the memory carried, and what it is worth against each other way."""
        group, overall = "Long documents", result["overall"]
        carried = overall["perplexity"][CARRIED]
        columns = [Column(CARRIED, "carried", **carried, better="lower", group=group)]
        for name, found in overall["differences"].items():
            columns.append(
                Column(
                    f"vs_{name}", f"vs. {name}", **found["relative"], format=format_percent, better="lower", group=group
                )
            )
        return columns

    def tables(self, result: dict[str, Any]) -> list[Table]:
        """A row per range of distance: perplexity each way, and the carried memory against each other way."""
        rows: list[tuple[str, list[Column]]] = []
        for entry in (*result["ranges"], result["overall"]):
            name = "all" if entry is result["overall"] else name_range(entry)
            columns = [
                Column("num_documents", "documents", entry["num_documents"], format_count),
                Column("num_tokens", "tokens", entry["num_tokens"], format_count),
            ]
            for way, found in entry["perplexity"].items():
                columns.append(Column(way, name_way(way), found["value"], group="perplexity"))
            for way, found in entry["differences"].items():
                relative: dict[str, Any] = {"format": format_percent, "group": "carried against", **found["relative"]}
                columns.append(Column(f"vs_{way}", name_way(way), **relative))
            rows.append((name, columns))
        return [Table("by distance from the document's start, in tokens", rows)]

    def notes(self, result: dict[str, Any]) -> list[str]:
        """What is missing."""
        overall, notes = result["overall"]["perplexity"], []
        if FOREIGN not in overall:
            notes.append("one document alone: there is no other document's memory")
        if overall[CARRIED]["low"] is None:
            notes.append(f"{result['num_documents']} documents are too few for intervals over documents")
        return notes

    def charts(self, results: Sequence[ModelResult]) -> list[Chart]:
        """Perplexity by distance: per model a line per way, and per other way a line per model."""
        charts: list[Chart] = []
        for name in dict.fromkeys(one.name for one in results):
            rows = [
                {"distance": name_range(entry), "way": name_way(way), **found}
                for one in results
                if one.name == name
                for entry in one.result["ranges"]
                for way, found in entry["perplexity"].items()
            ]
            caption = (
                "Perplexity by distance from the document's start. Where the line of the carried memory lies below the "
                "others, the memory helps; bands are intervals over documents."
            )
            columns: dict[str, Any] = {"x": "distance", "y": "value", "series": "way", "low": "low", "high": "high"}
            titles: dict[str, Any] = {"x_title": "tokens from the start", "y_title": "perplexity", "view": name}
            charts.append(line_chart(f"distance-{name}", "Long documents", caption, rows, **columns, **titles))
        for way in (RESET, FOREIGN):
            rows = [
                {"model": one.name, "distance": name_range(entry), **entry["differences"][way]["relative"]}
                for one in results
                for entry in one.result["ranges"]
                if way in entry["differences"]
            ]
            if rows:
                caption = "Perplexity with the memory carried against the other way, on the same documents."
                columns = {"x": "distance", "y": "value", "series": "model", "low": "low", "high": "high"}
                titles = {"x_title": "tokens from the start", "y_title": f"against {WAYS[way]}", "view": WAYS[way]}
                name, title = f"distance-against-{way}", "What the memory is worth by distance"
                charts.append(
                    line_chart(name, title, caption, rows, **columns, **titles, y_format="+.1%", reference=0.0)
                )
        return charts

    def describe(self, result: dict[str, Any]) -> str:
        """What the memory is worth: carried against reset, and against another document's."""
        overall = result["overall"]
        parts = [
            f"{describe_relative(overall['differences'][way]['relative'], result['confidence'])} than with {words}"
            for way, words in ((RESET, "an empty memory"), (FOREIGN, "another document's memory"))
            if way in overall["differences"]
        ]
        value = overall["perplexity"][CARRIED]["value"]
        opening = f"perplexity of {result['num_documents']} long documents with the memory carried {value:,.2f}"
        return f"{opening}: {', '.join(parts)}" if parts else opening
