"""Does the memory help on long documents? The same weights score the same tokens with three memories.

- carried: the document is read as a stream.
- reset: each segment is read from an empty memory.
- foreign: each segment is read with the memory of another document's stream after as many segments.

Only the carried memory can contain information about the document. The foreign memory shows whether its content helps,
or whether any memory that is not empty would.

Documents are read in pairs that lend each other their memories. Each row of the batch keeps one document's memory.
Before a row reads its next segment, it scores its partner's segment of the same number without writing, so that no
memory has to be moved between rows.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from new_llm.charts import Chart, line_chart
from new_llm.config import UserError
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
from new_llm.evaluation.statistics import MIN_DOCUMENTS, DocumentLosses, compare_models, estimate_perplexity
from new_llm.formats import WAYS, format_count, format_percent, format_plural, format_size, name_range

CARRIED, RESET, FOREIGN = "carried", "reset", "foreign"


class Piece(NamedTuple):
    """A segment of a document, with the token after it; document −1 marks an empty row."""

    document: int
    begin: int
    row: Row


NOTHING = Piece(-1, 0, Row(np.zeros(0, np.int64), 0))


class Pair(NamedTuple):
    """Documents to read side by side, one per row; only the first `num_scored` are scored."""

    members: tuple[int, ...]
    num_scored: int


def plan_pairs(lengths: Sequence[int]) -> list[Pair]:
    """Pair documents of similar length, longest first, to lend each other their memories.

    If their number is odd, the shortest borrows from the second shortest, which is read a second time without being
    scored. A single document has no partner.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    pairs = [Pair(members, 2) for members in zip(order[::2], order[1::2], strict=False)]
    if len(order) % 2:
        pairs.append(Pair((order[-1], *order[-2:-1]), 1))
    return pairs


def score_pairs(scorer: Scorer, segments_per_call: int) -> tuple[dict[str, list[Scores]], dict[int, int]]:
    """Score documents segment by segment, with carried, empty and foreign memory.

    Returns:
        The scores of all calls by way (without `FOREIGN` for a single document), and for each document the one whose
        memory it borrowed.
    """
    pairs = plan_pairs([len(tokens) for tokens in scorer.documents])
    width = len(pairs[0].members)
    carried, foreign = list[Scores](), list[Scores]()

    def score(pieces: Sequence[Piece], *, update_memory: bool = False) -> Scores:
        rows = [piece.row for piece in pieces]
        width = min(scorer.model.segment_length, max(len(row.tokens) for row in rows))  # also reads the last token
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
                foreign.append(score(swapped))
            carried.append(score(pieces, update_memory=True))
            if scorer.note(carried[-1]):
                break
    found = {CARRIED: carried, RESET: _score_alone(scorer, join_scores(carried), segments_per_call)}
    if width == 1:
        return found, {}
    lenders = [(one, other) for (a, b), num_scored in pairs for one, other in ((a, b), (b, a))[:num_scored]]
    return found | {FOREIGN: foreign}, dict(lenders)


def _score_alone(scorer: Scorer, carried: Scores, segments_per_call: int) -> list[Scores]:
    """Score from an empty memory the segments that have been read as a stream, many per batch."""
    read = [tokens[:1] for tokens in scorer.documents]
    for document in np.unique(carried.documents):
        read[document] = scorer.documents[document][: carried.positions[carried.documents == document].max() + 1]
    alone: Reading = {"batch_size": scorer.batch_size * segments_per_call, "autocast": scorer.autocast}
    return Scorer(scorer.model, read, alone).score_windows(partial(plan_windows, context=scorer.model.segment_length))


def _cut_pair(scorer: Scorer, pair: Pair, width: int) -> Iterator[list[Piece]]:
    """Yield the pair's segments side by side, until the scored documents end.

    A document that has ended before gets empty rows, which leave its memory unchanged.
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


def summarize_ranges(
    losses: Mapping[str, DocumentLosses], confidence: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compute the figures over all tokens, and for each range of distance that has tokens."""

    def summarize(column: int | None, start: int | None, end: int | None) -> dict[str, Any]:
        ways = {name: one.select(column) for name, one in losses.items()}
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

    spans = enumerate(pairwise([*losses[CARRIED].range_starts, None]))
    ranges = [summarize(column, *span) for column, span in spans if losses[CARRIED].num_tokens[:, column].any()]
    return summarize(None, 0, None), ranges


def describe_relative(found: Mapping[str, Any], confidence: float) -> str:
    """Describe a relative difference: 3.1 % [2.0, 4.2] lower."""
    said = f"{format_size(**found)} {'lower' if found['value'] < 0 else 'higher'}"
    if found["low"] is None:
        return f"{said} (fewer than {MIN_DOCUMENTS} documents: no interval)"
    return f"{said} ({confidence:.0%} interval over documents)"


@register_measure
class LongDocuments(Measure):
    """Perplexity of long documents with the memory carried, reset, and taken from another document."""

    name = "long"
    title = "long documents"
    can_stop = True

    def run(self, subject: Subject) -> dict[str, Any]:
        """Measure perplexity by distance from the document's start, with the memory carried, reset and foreign.

        A model without memory is read once, as "carried". Ways are compared in pairs, by document (`compare_models`).

        - `overall`, and `ranges`, a list with an entry for each range of distance that has tokens: `start`, `end`
          (None: open), `num_tokens`, `num_documents`; `perplexity` by way (carried, reset, foreign if there are two
          documents, and each baseline); `differences` carried − way, for each way that has scored the same tokens, in
          `nats` per token and `relative` perplexity, exp(nats) − 1. Figures have value, low and high; low and high are
          None if fewer than MIN_DOCUMENTS documents have tokens in the range.
        - `documents`: `index` in the split, `foreign_memory_of`, and `num_tokens` and `total_nll` (nats) by way and
          range; the ranges begin at `range_starts`.

        Raises:
            UserError: no document is long enough.
            ValueError: baselines have duplicate names, or the name of a way.
        """
        settings, baselines, split = subject.settings.long_documents, subject.baselines, subject.split
        names = [CARRIED, RESET, FOREIGN, *(baseline.name for baseline in baselines)]
        if len(set(names)) < len(names):
            raise ValueError(f"baselines: {names[3:]}: names must be distinct and different from {names[:3]}")
        began = time.perf_counter()
        indices = split.find_long(settings.min_tokens)[: settings.max_documents].tolist()
        if not indices:
            raise UserError(
                f"min_tokens: no document has {settings.min_tokens:,} tokens; the longest of "
                f"{split.num_documents:,} has {int(split.lengths.max(initial=0)):,}"
            )
        documents = [split.document(index)[: settings.max_tokens_per_document] for index in indices]
        num_planned = sum(len(tokens) - 1 for tokens in documents)
        num_done = 0

        def open_scorer(source: Subject | Baseline) -> Scorer:
            def note(done: int, _: int) -> None:
                if subject.on_progress:
                    subject.on_progress(num_done + done, num_planned * (1 + len(baselines)))

            reading = {"autocast": source.autocast, "batch_size": settings.batch_size, "on_progress": note}
            return Scorer(source.model, documents, Reading(**reading, should_stop=subject.should_stop))

        scorer = open_scorer(subject)
        if has_memory(subject.model):
            found, lenders = score_pairs(scorer, settings.segments_per_call)
            if not scorer.is_stopped:
                subject.shared[self.name] = indices, found.copy()
        else:
            found, lenders = {CARRIED: scorer.score_streams(settings.segments_per_call)}, {}
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

        losses = {way: DocumentLosses.sum(some, len(documents), settings.edges) for way, some in found.items()}
        num_scored = {way: int(one.num_tokens.sum()) for way, one in losses.items()}
        is_complete = all(number == num_planned for number in num_scored.values())
        if not is_complete and not scorer.is_stopped:  # a bug in New-LLM; no number is better than a wrong one
            raise RuntimeError(f"scored {num_scored} of {num_planned} tokens")
        seconds = time.perf_counter() - began
        overall, ranges = summarize_ranges(losses, settings.confidence)
        return {
            "overall": overall,
            "ranges": ranges,
            "documents": [
                {
                    "index": index,
                    "foreign_memory_of": indices[lenders[place]] if place in lenders else None,
                    "num_tokens": {way: one.num_tokens[place].tolist() for way, one in losses.items()},
                    "total_nll": {way: one.total_nll[place].tolist() for way, one in losses.items()},
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
        """Return the perplexity with the memory carried, and its relative difference from each other way."""
        overall = result["overall"]
        shared: dict[str, Any] = {"better": "lower", "group": "Long documents"}
        return [
            Column(CARRIED, "carried", **overall["perplexity"][CARRIED], **shared),
            *(
                Column(f"vs_{way}", f"vs. {way}", **found["relative"], format=format_percent, **shared)
                for way, found in overall["differences"].items()
            ),
        ]

    def losses(self, result: dict[str, Any]) -> dict[str, DocumentLosses]:
        """Return the losses with the memory carried first, then those of the other ways."""
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
        """Return a row per range of distance: perplexity by way, and the carried memory against each other way."""
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
        """State what is missing from the result."""
        overall, notes = result["overall"]["perplexity"], []
        if RESET in overall and FOREIGN not in overall:
            notes.append("a single document: there is no other document's memory")
        elif overall[CARRIED]["low"] is None:
            notes.append(f"{format_plural(result['num_documents'], 'document')}: too few for intervals over documents")
        return notes

    def charts(self, results: Sequence[ModelResult]) -> list[Chart]:
        """Draw perplexity by distance: for all models, by way for each model, and relative to each other way."""
        entries = [(one.name, name_range(entry), entry) for one in results for entry in one.result["ranges"]]
        columns: dict[str, Any] = {"x": "distance", "y": "value", "low": "low", "high": "high"}
        titles: dict[str, Any] = {"x_title": "tokens from the start", "y_title": "perplexity"}
        title, bands = "Perplexity by distance", "bands are intervals over documents."
        rows: list[dict[str, Any]] = [
            {"model": model, "distance": distance, **entry["perplexity"][CARRIED]} for model, distance, entry in entries
        ]
        caption = f"By distance from the document's start, with each model's memory carried; {bands}"
        charts = [line_chart("distance", title, caption, rows, **columns, **titles, series="model", view="all models")]
        for name in dict.fromkeys(one.name for one in results if len(one.result["overall"]["perplexity"]) > 1):
            rows = [
                {"distance": distance, "way": WAYS.get(way, way), **found}
                for model, distance, entry in entries
                if model == name
                for way, found in entry["perplexity"].items()
            ]
            caption = f"The memory helps where the line of the carried memory is below the others; {bands}"
            charts.append(
                line_chart(f"distance-{name}", title, caption, rows, **columns, **titles, series="way", view=name)
            )
        caption = "Perplexity with the memory carried relative to the other way, on the same documents."
        title = "What the memory is worth by distance"
        columns |= {"series": "model", "y_format": "+.1%", "reference": 0.0}
        for way in (RESET, FOREIGN):
            rows = [
                {"model": model, "distance": distance, **entry["differences"][way]["relative"]}
                for model, distance, entry in entries
                if way in entry["differences"]
            ]
            if rows:
                titles |= {"y_title": f"against {WAYS[way]}", "view": WAYS[way]}
                charts.append(line_chart(f"distance-against-{way}", title, caption, rows, **columns, **titles))
        return charts

    def describe(self, result: dict[str, Any]) -> str:
        """State how the carried memory compares with an empty one and with another document's."""
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
