"""Perplexity by position: how much a prediction gains from the tokens before it."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from new_llm.charts import Chart, line_chart
from new_llm.evaluation.measure import Column, Measure, ModelResult, Subject, Table, register_measure
from new_llm.evaluation.scoring import Scorer, Window, exp_or_inf, join_scores, select_documents
from new_llm.formats import format_count


@register_measure
class Positions(Measure):
    """Perplexity by a token's position in its sample."""

    name = "positions"
    title = "perplexity by position"

    def run(self, subject: Subject) -> dict[str, Any]:
        """`ranges`: {"start", "end", "perplexity", "num_tokens"} of each range in which a token was scored.

        Each document is cut into consecutive samples of `seq_length` tokens, each read from an empty memory. A
        token's position is its index in its sample; a sample's first token has no context and is not scored. A
        document's last, shorter sample counts too.

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
        ranges = [
            {
                "start": start,
                "end": end,
                "perplexity": exp_or_inf(total_nll[start:end].sum() / counts[start:end].sum()),
                "num_tokens": int(counts[start:end].sum()),
            }
            for start, end in pairwise([*(edge for edge in edges if edge < length), length])
            if counts[start:end].any()
        ]
        return {"seq_length": length, "ranges": ranges}

    def charts(self, results: Sequence[ModelResult]) -> list[Chart]:
        """A line per model, a point per range."""
        rows = [
            {"model": one.name, "position": f"{entry['start']}–{entry['end']}", "perplexity": entry["perplexity"]}
            for one in results
            for entry in one.result["ranges"]
        ]
        caption = "Perplexity of the tokens in each range of positions of a sample; falling lines use what came before."
        columns: dict[str, Any] = {"x": "position", "y": "perplexity", "series": "model"}
        titles: dict[str, Any] = {"x_title": "position in the sample", "y_title": "perplexity"}
        return [line_chart("positions", "Perplexity by position", caption, rows, **columns, **titles)]

    def tables(self, result: dict[str, Any]) -> list[Table]:
        """A row per range."""
        rows = [
            (
                f"{entry['start']}–{entry['end']}",
                [
                    Column("perplexity", "perplexity", entry["perplexity"]),
                    Column("num_tokens", "tokens", entry["num_tokens"], format_count),
                ],
            )
            for entry in result["ranges"]
        ]
        return [Table(f"by position in samples of {result['seq_length']} tokens", rows)]

    def describe(self, result: dict[str, Any]) -> str:
        """The first range against the last one."""
        first, last = result["ranges"][0], result["ranges"][-1]
        return (
            f"perplexity {first['perplexity']:,.1f} at positions {first['start']}–{first['end']}, "
            f"{last['perplexity']:,.1f} at {last['start']}–{last['end']}"
        )
