"""Perplexity by position: how much a prediction gains from the tokens before it."""

import contextlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from new_llm.charts import Chart, line_chart
from new_llm.data.tokens import TokenSplit
from new_llm.evaluation.measure import Measure, ModelResult, Subject, register_measure
from new_llm.evaluation.scoring import (
    Autocast,
    LanguageModel,
    Progress,
    Row,
    evaluation_mode,
    exp_or_inf,
    find_device,
    group_by_length,
    score_rows,
    select_documents,
)
from new_llm.processes import ALONE, Processes


def evaluate_positions(
    model: LanguageModel,
    split: TokenSplit,
    *,
    seq_length: int,
    edges: Sequence[int],
    batch_size: int,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    autocast: Autocast = contextlib.nullcontext,
    on_progress: Progress | None = None,
    processes: Processes = ALONE,
) -> list[dict[str, Any]]:
    """Perplexity by position: how much a prediction gains from the tokens before it.

    Each document is cut into consecutive samples of `seq_length` tokens, each read from an empty memory. A
    token's position is its index in its sample; a sample's first token has no context and is not scored. A
    document's last, shorter sample counts too.

    Args:
        model: evaluated in evaluation mode; its held memory is neither read nor changed.
        split: the documents.
        seq_length: tokens in a sample.
        edges: where the ranges of positions begin, rising; the last range ends with the sample.
        batch_size: samples read at once.
        max_tokens: as for `evaluate_sliding_window`.
        device: where the model lies; None: where its weights are.
        autocast: makes the context in which the model computes.
        on_progress: called with the tokens scored so far and in all.
        processes: those that share the work; every one of them gets the whole result.

    Returns:
        {"start", "end", "perplexity", "num_tokens"} for each range [start, end) in which a token was scored.

    Raises:
        UserError: the split has no token to score.
    """
    documents = select_documents(split, max_tokens)
    samples = [
        Row(document[begin : begin + seq_length])
        for document in documents.tokens
        for begin in range(0, len(document) - 1, seq_length)
    ]
    num_tokens = sum(len(sample.tokens) - 1 for sample in samples)
    total_nll = np.zeros(seq_length)
    counts = np.zeros(seq_length, dtype=np.int64)
    with evaluation_mode(model, autocast), model.fresh_memory():
        for batch in group_by_length(samples, batch_size)[processes.rank :: processes.count]:
            for losses in score_rows(model, [samples[i] for i in batch], find_device(model, device)):
                total_nll[1 : 1 + len(losses)] += losses
                counts[1 : 1 + len(losses)] += 1
            if on_progress:
                on_progress(int(counts.sum()), num_tokens)
    total_nll, counts = processes.sum(total_nll), processes.sum(counts)
    ranges = pairwise([*(edge for edge in edges if edge < seq_length), seq_length])
    return [
        {
            "start": start,
            "end": end,
            "perplexity": exp_or_inf(total_nll[start:end].sum() / counts[start:end].sum()),
            "num_tokens": int(counts[start:end].sum()),
        }
        for start, end in ranges
        if counts[start:end].any()
    ]


@register_measure
class Positions(Measure):
    """Perplexity by a token's position in its sample."""

    name = "positions"
    title = "perplexity by position"

    def run(self, subject: Subject) -> dict[str, Any]:
        """`seq_length` and `ranges`, as `evaluate_positions` gives them."""
        ranges = evaluate_positions(
            subject.model,
            subject.split,
            seq_length=subject.seq_length,
            edges=subject.settings.position_edges,
            batch_size=subject.settings.batch_size,
            max_tokens=subject.settings.max_tokens,
            device=subject.device,
            autocast=subject.autocast,
            on_progress=subject.on_progress,
            processes=subject.processes,
        )
        return {"seq_length": subject.seq_length, "ranges": ranges}

    def charts(self, results: Sequence[ModelResult]) -> list[Chart]:
        """A line per model, a point per range."""
        rows = [
            {"model": one.name, "position": (entry["start"] + entry["end"]) / 2, **entry}
            for one in results
            for entry in one.result["ranges"]
        ]
        caption = "Perplexity of the tokens in each range of positions of a sample; falling lines use what came before."
        return [
            line_chart(
                "positions",
                "Perplexity by position",
                caption,
                rows,
                x="position",
                y="perplexity",
                series="model",
                x_title="position in the sample (tokens)",
                y_title="perplexity",
            )
        ]

    def describe(self, result: dict[str, Any]) -> str:
        """The first range against the last one."""
        first, last = result["ranges"][0], result["ranges"][-1]
        return (
            f"perplexity {first['perplexity']:,.1f} at positions {first['start']}–{first['end']}, "
            f"{last['perplexity']:,.1f} at {last['start']}–{last['end']}"
        )
