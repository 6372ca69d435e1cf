"""Does the memory help on long documents? The same weights on the same tokens, with three memories.

carried: a document is read as a stream. reset: each of its segments is read from an empty memory. foreign: each of its
segments is read with what another document's stream holds after as many segments. The first alone can know the
document; the third tells whether it is this document's content that helps, or any memory that is not empty.

Documents are read in pairs that lend each other their memory. A row of the batch keeps the memory of one document.
Before the row reads its next segment, its partner's segment of the same number is scored in it without being written:
so the partner's tokens meet this document's memory, and no memory has to be moved from row to row.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from new_llm.charts import Chart, line_chart
from new_llm.config import UserError
from new_llm.config.evaluation import LongDocumentsConfig
from new_llm.data.tokenizer import TokenSplit
from new_llm.evaluation.language_models import has_memory
from new_llm.evaluation.measure import Baseline, Column, Measure, ModelResult, Subject, Table, register_measure
from new_llm.evaluation.scoring import (
    Reading,
    Row,
    Scorer,
    Scores,
    evaluation_mode,
    join_rows,
    join_scores,
    plan_windows,
    read_side_by_side,
    score_rows,
)
from new_llm.evaluation.statistics import (
    MIN_DOCUMENTS,
    DocumentLosses,
    LossSums,
    compare_models,
    estimate_perplexity,
)
from new_llm.formats import WAYS, format_count, format_percent, format_plural, format_size, name_range

CARRIED, RESET, FOREIGN = "carried", "reset", "foreign"


class Piece(NamedTuple):
    """A segment of a document and the token after it; document −1: nothing is left to read, and the row is empty."""

    document: int
    begin: int
    row: Row


class Pair(NamedTuple):
    """Two documents, or one, that are read side by side, a row of the batch each.

    Attributes:
        members: their indices.
        num_scored: this many of them are scored, from the first; another one is only read.
    """

    members: tuple[int, ...]
    num_scored: int


@dataclass
class PairScores:
    """The scores of each call by how the memory was, and for each document the one whose memory it borrowed.

    `foreign` is empty for one document alone.
    """

    carried: list[Scores] = field(default_factory=list)
    reset: list[Scores] = field(default_factory=list)
    foreign: list[Scores] = field(default_factory=list)
    lenders: dict[int, int] = field(default_factory=dict)


def plan_pairs(lengths: Sequence[int]) -> list[Pair]:
    """Pair documents of like length, longest first, so that each lends the other its memory.

    Of an odd number the shortest is left over: it borrows from the second shortest, which is read once more for that.
    One document alone stays alone.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    pairs = [Pair(members, 2) for members in zip(order[::2], order[1::2], strict=False)]
    if len(order) % 2:
        pairs.append(Pair((order[-1], *order[-2:-1]), 1))
    return pairs


def score_pairs(scorer: Scorer, segments_per_call: int) -> PairScores:
    """Score documents segment by segment, with the memory carried, empty, and that of another document."""
    pairs = plan_pairs([len(tokens) for tokens in scorer.documents])
    width = len(pairs[0].members)
    found = PairScores()

    def score(pieces: Sequence[Piece], *, update_memory: bool = False) -> Scores:
        rows = [piece.row for piece in pieces]
        width = min(scorer.model.segment_length, max(len(row.tokens) for row in rows))  # a document's last token too
        losses = score_rows(scorer.model, rows, width=width, update_memory=update_memory)
        return join_rows((piece.document, piece.begin + 1, row) for piece, row in zip(pieces, losses, strict=True))

    num_rows = min(max(1, scorer.batch_size // width), len(pairs))
    texts = (list(_cut_pair(scorer, pair, width)) for pair in pairs)
    memory = scorer.model.fresh_memory(batch_size=num_rows * width)
    with evaluation_mode(scorer.model, scorer.autocast), memory:
        for begins, batch in read_side_by_side(texts, num_rows):
            scorer.model.reset_rows(torch.tensor(begins, device=scorer.device).repeat_interleave(width))
            pieces = [piece for call in batch for piece in call or [NOTHING] * width]
            if width == 2:
                swapped = [piece for a, b in zip(pieces[::2], pieces[1::2], strict=True) for piece in (b, a)]
                found.foreign.append(score(swapped))
            found.carried.append(score(pieces, update_memory=True))
            if scorer.note(found.carried[-1]):
                break
    found.reset = _score_alone(scorer, join_scores(found.carried), segments_per_call)
    for pair in pairs:
        for member, lender in zip(pair.members[: pair.num_scored], reversed(pair.members), strict=False):
            if member != lender:
                found.lenders[member] = lender
    return found


def _score_alone(scorer: Scorer, carried: Scores, segments_per_call: int) -> list[Scores]:
    """The segments that have been read as a stream, each read from an empty memory; many fit a batch."""
    read = [tokens[:1] for tokens in scorer.documents]
    for document in np.unique(carried.documents):
        read[document] = scorer.documents[document][: carried.positions[carried.documents == document].max() + 1]
    batch_size = scorer.batch_size * segments_per_call
    reading: Reading = {"batch_size": batch_size, "autocast": scorer.autocast}
    alone = Scorer(scorer.model, read, reading)
    length = scorer.model.segment_length
    return alone.score_windows(partial(plan_windows, context=length, stride=length))


def _cut_pair(scorer: Scorer, pair: Pair, width: int) -> Iterator[list[Piece]]:
    """A segment of each member at a time, until the scored ones have ended; one that has nothing to read is empty, and
    leaves its memory as it is.
    """
    length = scorer.model.segment_length
    longest = max(len(scorer.documents[member]) for member in pair.members[: pair.num_scored])
    for begin in range(0, longest - 1, length):
        pieces: list[Piece] = []
        for place, member in enumerate(pair.members):
            tokens = scorer.documents[member][begin : begin + length + 1]
            row = Row(tokens, 1 if place < pair.num_scored else len(tokens))
            pieces.append(Piece(member, begin, row) if len(tokens) else NOTHING)
        yield pieces + [NOTHING] * (width - len(pieces))


NOTHING = Piece(-1, 0, Row(np.zeros(0, np.int64), 0))


def select_long_documents(split: TokenSplit, settings: LongDocumentsConfig) -> list[int]:
    """The first documents that are long enough, by their index in the split."""
    chosen = split.find_long(settings.min_tokens)[: settings.max_documents].tolist()
    if not chosen:
        longest = int(split.lengths.max(initial=0))
        raise UserError(
            f"min_tokens: no document has {settings.min_tokens:,} tokens; the longest of "
            f"{split.num_documents:,} has {longest:,}"
        )
    return chosen


def summarize_ranges(sums: Mapping[str, LossSums], confidence: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures of all tokens, and of each range of distance that holds one, as `LongDocuments.run` says.

    Args:
        sums: by way; `CARRIED` among them, with a token at least.
        confidence: of the intervals.
    """
    starts = sums[CARRIED].edges.tolist()

    def summarize(column: int | None, start: int, end: int | None) -> dict[str, Any]:
        ways = {name: one.losses.select(column) for name, one in sums.items()}
        counts = ways[CARRIED].num_tokens
        measured = {name: way for name, way in ways.items() if way.num_tokens.any()}
        compared = {name: compare_models({0: ways[CARRIED]}, {0: way}, confidence) for name, way in ways.items()}
        return {
            "start": start,
            "end": end,
            "num_tokens": int(counts.sum()),
            "num_documents": int((counts > 0).sum()),
            "perplexity": {name: estimate_perplexity(way, confidence)._asdict() for name, way in measured.items()},
            "differences": {
                name: {"nats": found.estimate._asdict(), "relative": found.relative._asdict()}
                for name, found in compared.items()
                if found is not None and name != CARRIED
            },
        }

    spans = zip(starts, [*starts[1:], None], strict=True)
    ranges = [
        summarize(column, start, end)
        for column, (start, end) in enumerate(spans)
        if sums[CARRIED].counts[:, column].any()
    ]
    return summarize(None, 0, None), ranges


def describe_relative(found: Mapping[str, Any], confidence: float) -> str:
    """A relative difference in words: 3.1 % [2.0, 4.2] lower."""
    value, low, high = (found["value"], found["low"], found["high"])
    said = f"{format_size(value, low, high)} {'lower' if value < 0 else 'higher'}"
    if low is None or high is None:
        return f"{said} (fewer than {MIN_DOCUMENTS} documents: no interval)"
    return f"{said} ({confidence:.0%} interval over documents)"


@register_measure
class LongDocuments(Measure):
    """Long documents with the memory carried, emptied, and another document's."""

    name = "long"
    title = "long documents"
    can_stop = True

    def run(self, subject: Subject) -> dict[str, Any]:
        """Perplexity by distance from the document's start, with the memory carried, reset and foreign; of a model
        without memory, whose ways are one, carried alone.

        The ways share batches and are compared in pairs, by document (`compare_models`). An interval's ends are None
        where fewer than MIN_DOCUMENTS documents have a token in the range.

        `overall`, and each of the `ranges` of distance that holds a token, has `start`, `end` (None: open),
        `num_tokens` and `num_documents`; its `perplexity` by way (carried, reset, foreign where there are two
        documents, and each baseline); and for each other way that has scored the same tokens the `differences`
        carried − that way, in `nats` per token and `relative` perplexity, exp(nats) − 1. Each is a value with low and
        high. `documents` holds what these are summed from: `index` in the split, `foreign_memory_of`, `num_tokens`
        and `total_nll` (nats) by way and range, the ranges beginning at `range_starts`.

        Raises:
            UserError: no document is long enough.
            ValueError: two baselines have one name, or that of a way.
        """
        settings, baselines, split = subject.settings.long_documents, subject.baselines, subject.split
        names = [CARRIED, RESET, FOREIGN, *(baseline.name for baseline in baselines)]
        if len(set(names)) < len(names):
            raise ValueError(f"baselines: {names[3:]}: their names must differ, and none be one of {names[:3]}")
        began = time.perf_counter()
        indices = select_long_documents(split, settings)
        documents = [split.document(index)[: settings.max_tokens_per_document] for index in indices]
        num_planned = sum(len(tokens) - 1 for tokens in documents)
        num_done = 0

        def open_scorer(source: Subject | Baseline) -> Scorer:
            def note(done: int, _: int) -> None:
                if subject.on_progress:
                    subject.on_progress(num_done + done, num_planned * (1 + len(baselines)))

            own: Any = {"autocast": source.autocast, "on_progress": note}
            own |= {"batch_size": settings.batch_size, "should_stop": subject.should_stop}
            return Scorer(source.model, documents, own)

        scorer = open_scorer(subject)
        if has_memory(subject.model):
            pairs = score_pairs(scorer, settings.segments_per_call)
            found = {CARRIED: pairs.carried, RESET: pairs.reset} | ({FOREIGN: pairs.foreign} if pairs.foreign else {})
            if not scorer.is_stopped:
                subject.shared[self.name] = indices, pairs
        else:
            pairs, found = PairScores(), {CARRIED: scorer.score_streams(settings.segments_per_call)}
        for baseline in baselines:
            num_done += num_planned
            found[baseline.name] = []
            if not scorer.is_stopped:
                scorer = open_scorer(baseline)
                if baseline.stride is None:
                    found[baseline.name] = scorer.score_streams(settings.segments_per_call)
                else:
                    plan = partial(plan_windows, context=baseline.model.segment_length, stride=baseline.stride)
                    found[baseline.name] = scorer.score_windows(plan)

        sums: dict[str, LossSums] = {}
        for name, batches in found.items():
            sums[name] = LossSums(len(documents), settings.edges)
            for scores in batches:
                sums[name].add(scores)
        num_scored = {name: one.num_tokens for name, one in sums.items()}
        is_complete = all(number == num_planned for number in num_scored.values())
        if not is_complete and not scorer.is_stopped:  # a bug in New-LLM; no number is better than a wrong one
            raise RuntimeError(f"scored {num_scored} of {num_planned} tokens")
        seconds = time.perf_counter() - began
        overall, ranges = summarize_ranges(sums, settings.confidence)
        return {
            "overall": overall,
            "ranges": ranges,
            "documents": [
                {
                    "index": index,
                    "foreign_memory_of": indices[pairs.lenders[place]] if place in pairs.lenders else None,
                    "num_tokens": {name: one.counts[place].tolist() for name, one in sums.items()},
                    "total_nll": {name: one.total_nll[place].tolist() for name, one in sums.items()},
                }
                for place, index in enumerate(indices)
            ],
            "range_starts": list(settings.edges),
            "baselines": {
                one.name: {"segment_length": one.model.segment_length, "stride": one.stride, "subject": one.facts}
                for one in baselines
            },
            "min_tokens": settings.min_tokens,
            "segment_length": subject.model.segment_length,
            "num_documents": len(documents),
            "num_tokens": num_scored[CARRIED],
            "num_planned": num_planned,
            "is_complete": is_complete,
            "confidence": settings.confidence,
            "seconds": seconds,
            "tokens_per_second": sum(num_scored.values()) / seconds,
        }

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

    def losses(self, result: dict[str, Any]) -> dict[str, DocumentLosses]:
        """The memory carried, and the other ways."""
        documents, starts = result["documents"], result["range_starts"]
        return {
            way: DocumentLosses.read(
                [document["num_tokens"][way] for document in documents],
                [document["total_nll"][way] for document in documents],
                starts,
            )
            for way in documents[0]["total_nll"]
        }

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
                columns.append(Column(way, str(WAYS.get(way, way)), found["value"], group="perplexity"))
            for way, found in entry["differences"].items():
                relative: dict[str, Any] = {"format": format_percent, "group": "carried against", **found["relative"]}
                columns.append(Column(f"vs_{way}", str(WAYS.get(way, way)), **relative))
            rows.append((name, columns))
        return [Table("by distance from the document's start, in tokens", rows)]

    def notes(self, result: dict[str, Any]) -> list[str]:
        """What is missing."""
        overall, notes = result["overall"]["perplexity"], []
        if RESET in overall and FOREIGN not in overall:
            notes.append("one document alone: there is no other document's memory")
        elif overall[CARRIED]["low"] is None:
            notes.append(f"{result['num_documents']} documents are too few for intervals over documents")
        return notes

    def charts(self, results: Sequence[ModelResult]) -> list[Chart]:
        """Perplexity by distance by model, and by way for each model that has several; what each way is worth."""
        entries = [(one.name, name_range(entry), entry) for one in results for entry in one.result["ranges"]]
        columns: dict[str, Any] = {"x": "distance", "y": "value", "low": "low", "high": "high"}
        titles: dict[str, Any] = {"x_title": "tokens from the start", "y_title": "perplexity"}
        title, bands = "Perplexity by distance", "bands are intervals over documents."
        rows: list[dict[str, Any]] = [
            {"model": model, "distance": distance, **entry["perplexity"][CARRIED]} for model, distance, entry in entries
        ]
        caption = f"By distance from the document's start, each model's memory carried; {bands}"
        charts = [line_chart("distance", title, caption, rows, **columns, **titles, series="model", view="all models")]
        for name in dict.fromkeys(one.name for one in results if len(one.result["overall"]["perplexity"]) > 1):
            rows = [
                {"distance": distance, "way": WAYS.get(way, way), **found}
                for model, distance, entry in entries
                if model == name
                for way, found in entry["perplexity"].items()
            ]
            caption = f"Where the line of the carried memory lies below the others, the memory helps; {bands}"
            charts.append(
                line_chart(f"distance-{name}", title, caption, rows, **columns, **titles, series="way", view=name)
            )
        for way in (RESET, FOREIGN):
            rows = [
                {"model": model, "distance": distance, **entry["differences"][way]["relative"]}
                for model, distance, entry in entries
                if way in entry["differences"]
            ]
            if rows:
                caption = "Perplexity with the memory carried against the other way, on the same documents."
                titles |= {"y_title": f"against {WAYS[way]}", "view": WAYS[way]}
                name, title = f"distance-against-{way}", "What the memory is worth by distance"
                charts.append(
                    line_chart(
                        name, title, caption, rows, **columns, **titles, series="model", y_format="+.1%", reference=0.0
                    )
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
        opening = f"perplexity of {format_plural(result['num_documents'], 'long document')}"
        if not parts:
            return f"{opening} {value:,.2f}"
        return f"{opening} with the memory carried {value:,.2f}: {', '.join(parts)}"
