"""Does the memory help on long documents? The same weights on the same tokens, with three memories.

carried: a document is read as a stream. reset: each of its segments is read from an empty memory. foreign: each of its
segments is read with what another document's stream holds after as many segments. The first alone can know the
document; the third tells whether it is this document's content that helps, or any memory that is not empty.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from new_llm.config import UserError
from new_llm.config.long_documents import LongDocumentsConfig
from new_llm.data.tokens import TokenSplit
from new_llm.evaluation.bootstrap import draw_resamples
from new_llm.evaluation.document_reader import DocumentReader
from new_llm.evaluation.document_sums import DocumentSums, LongDocument
from new_llm.evaluation.long_documents_result import (
    CARRIED,
    FOREIGN,
    RESET,
    LongDocumentsResult,
    describe_documents,
    summarize_ranges,
)
from new_llm.evaluation.scoring import Autocast, LanguageModel, Progress, find_device, never


@dataclass(frozen=True)
class Baseline:
    """Another model that scores the same tokens.

    Attributes:
        name: what it is called in the result.
        model: one with the same tokenizer.
        stride: None: documents are read in consecutive segments, its memory, if it has one, carried; else in windows
            as long as its segment, so many tokens from one to the next, each from an empty memory.
        device: where it lies; None: where its weights are.
        autocast: makes the context in which it computes.
    """

    name: str
    model: LanguageModel
    stride: int | None = None
    device: torch.device | str | None = None
    autocast: Autocast = contextlib.nullcontext


def evaluate_long_documents(
    model: LanguageModel,
    split: TokenSplit,
    *,
    min_tokens: int,
    edges: Sequence[int] = LongDocumentsConfig.edges,
    batch_size: int,
    max_documents: int | None = None,
    max_tokens_per_document: int | None = None,
    baselines: Sequence[Baseline] = (),
    segments_per_call: int = LongDocumentsConfig.segments_per_call,
    num_resamples: int = LongDocumentsConfig.num_resamples,
    confidence: float = LongDocumentsConfig.confidence,
    seed: int = LongDocumentsConfig.seed,
    device: torch.device | str | None = None,
    autocast: Autocast = contextlib.nullcontext,
    on_progress: Progress | None = None,
    should_stop: Callable[[], bool] = never,
) -> LongDocumentsResult:
    """Perplexity of long documents by distance from their start: memory carried, reset, and another document's.

    Every token but a document's first is scored once in each way, in the model's segments: carried is
    `evaluate_streaming` of these documents, reset is `evaluate_independent`. A token's distance is its index in its
    document. All three ways advance together, so that they have scored the same tokens wherever a measurement is
    stopped. For the foreign memory documents of like length are paired (see `plan_pairs`); a lender that has ended
    lends what it held in the end. Of one document alone there is no foreign memory.

    The intervals are of a bootstrap over documents (see `draw_resamples`). One table of resamples serves all figures,
    so that differences are paired.

    Args:
        model: evaluated in evaluation mode; its held memory is neither read nor changed.
        split: the documents.
        min_tokens: tokens that a document must have.
        edges: where the ranges of distance begin; the first is 0, the last range is open.
        batch_size: documents read at once, but at least two; it does not change the result.
        max_documents: long documents at most, the first ones; None: all.
        max_tokens_per_document: tokens of a document that are read at most; None: all.
        baselines: other models, read one after the other.
        segments_per_call: segments of a baseline's stream a call; it changes the speed alone.
        num_resamples: resamples of the documents.
        confidence: of the intervals.
        seed: of the resamples.
        device: where the model lies; None: where its weights are.
        autocast: makes the context in which the model computes.
        on_progress: called with the tokens scored so far and in all, each counted once for every model.
        should_stop: asked after each batch; once it says True, the result is of what has been scored by then.

    Raises:
        UserError: no document is long enough.
        ValueError: two baselines have one name, or that of a way, or edges that do not rise from 0.
    """
    names = [CARRIED, RESET, FOREIGN, *(baseline.name for baseline in baselines)]
    if len(set(names)) < len(names):
        raise ValueError(f"baselines: {names[3:]}: their names must differ, and none be one of {names[:3]}")
    began = time.perf_counter()
    documents = select_long_documents(split, min_tokens, max_documents, max_tokens_per_document)
    num_planned = sum(len(document.tokens) - 1 for document in documents)
    sums = {name: DocumentSums(len(documents), edges) for name in names}
    if len(documents) < 2:
        del sums[FOREIGN]
    num_done, is_stopped = 0, False

    def make_reader(name: str, source: LanguageModel, where: Any, autocast: Autocast) -> DocumentReader:
        def note() -> bool:
            nonlocal is_stopped
            if on_progress:
                on_progress(num_done + sums[name].num_tokens, num_planned * (1 + len(baselines)))
            is_stopped = should_stop()
            return is_stopped

        return DocumentReader(source, documents, batch_size, find_device(source, where), autocast, note)

    reader = make_reader(CARRIED, model, device, autocast)
    lenders = reader.read_pairs(sums[CARRIED], sums[RESET], sums.get(FOREIGN))
    for baseline in baselines:
        num_done += num_planned
        if is_stopped:
            break
        reader = make_reader(baseline.name, baseline.model, baseline.device, baseline.autocast)
        if baseline.stride is None:
            reader.read_streams(sums[baseline.name], segments_per_call)
        else:
            reader.read_windows(sums[baseline.name], baseline.stride)
    seconds = time.perf_counter() - began
    is_complete = all(found.num_tokens == num_planned for found in sums.values())
    if not is_complete and not is_stopped:  # a fault of ours; no number is better than a wrong one
        raise RuntimeError(
            f"scored { ({name: found.num_tokens for name, found in sums.items()}) } of {num_planned} tokens"
        )
    resamples = draw_resamples(len(documents), num_resamples, seed)
    return LongDocumentsResult(
        **summarize_ranges(sums, resamples, confidence),
        documents=describe_documents(documents, sums, lenders),
        baselines={
            baseline.name: {"segment_length": baseline.model.segment_length, "stride": baseline.stride}
            for baseline in baselines
        },
        min_tokens=min_tokens,
        segment_length=model.segment_length,
        num_documents=len(documents),
        num_tokens=sums[CARRIED].num_tokens,
        num_planned=num_planned,
        is_complete=is_complete,
        num_resamples=num_resamples,
        confidence=confidence,
        seed=seed,
        seconds=seconds,
        tokens_per_second=sum(found.num_tokens for found in sums.values()) / seconds,
    )


def select_long_documents(
    split: TokenSplit, min_tokens: int, max_documents: int | None, max_tokens_per_document: int | None
) -> list[LongDocument]:
    """The first documents that are long enough, each cut to the tokens that may be read.

    Raises:
        UserError: there is none.
    """
    lengths = split.offsets[1:] - split.offsets[:-1]
    chosen = (lengths >= max(2, min_tokens)).nonzero()[0][:max_documents].tolist()
    if not chosen:
        longest = int(lengths.max()) if len(lengths) else 0
        raise UserError(
            f"min_tokens: no document has {max(2, min_tokens):,} tokens; the longest of "
            f"{split.num_documents:,} has {longest:,}"
        )
    return [LongDocument(index, split.document(index)[:max_tokens_per_document]) for index in chosen]
