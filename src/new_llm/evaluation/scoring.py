"""The scorer behind all measures: from documents to the loss of each scored token, with its document and position.

`Scorer.score_windows` reads windows of documents, each from an empty memory; `Scorer.score_streams` reads documents in
consecutive segments with the memory carried. Both return `Scores`, which each measure aggregates as it needs.
"""

import contextlib
import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, Required, TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from new_llm.config import UserError
from new_llm.data.tokenizer import TokenSplit
from new_llm.models.decoding import cast_weights_once
from new_llm.models.inputs import IGNORE_INDEX
from new_llm.processes import ALONE, Processes

Autocast = Callable[[], AbstractContextManager[Any]]
"""Makes the context in which the model computes, e.g. the autocast of training."""

Progress = Callable[[int, int], None]
"""Called after each batch with the tokens scored so far and in all."""

Item = TypeVar("Item")


class LanguageModel(Protocol):
    """The interface of models that can be measured, such as `new_llm.models.TransformerLM`."""

    def token_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        update_memory: bool = False,
    ) -> Tensor:
        """Return the loss in nats of the token after each position, [B, T]; 0 where there is no target."""
        ...

    def fresh_memory(self, batch_size: int | None = None) -> AbstractContextManager[Any]:
        """Use an empty memory inside the block and restore the held one afterwards."""
        ...

    def reset_rows(self, rows: Tensor) -> None:
        """Empty the memory of the rows that are True, [B] bool."""
        ...

    @property
    def segment_length(self) -> int:
        """Tokens per segment."""
        ...

    def modules(self) -> Iterator[torch.nn.Module]:
        """Yield the model and all its submodules."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the model's weights."""
        ...


class Window(NamedTuple):
    """A window on a document: tokens [begin, end − 1) are read and tokens [first_scored, end) are scored.

    Tokens before `first_scored` are only context; the last token is only a target.
    """

    begin: int
    end: int
    first_scored: int


def plan_windows(length: int, context: int, stride: int | None = None) -> list[Window]:
    """Plan sliding windows over a document that score every token except the first exactly once.

    Window i spans the `context` tokens from i · stride on. Each token is scored in the first window that reaches it,
    with at least context − stride tokens of the window, or the whole document so far, before it. These are the windows
    of Hugging Face's guide "Perplexity of fixed-length models", with one difference: if windows do not overlap
    (stride = context, the default), the guide leaves the first token of each window unscored. Here such windows extend
    one token further, so that every token is scored and the model still reads at most `context` tokens.

    Raises:
        ValueError: not 1 ≤ stride ≤ context.
    """
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(
            f"stride {stride}, context {context}: 1 ≤ stride ≤ context is required, or tokens would be skipped"
        )
    span = context if stride < context else context + 1
    windows: list[Window] = []
    first_scored = 1
    for begin in range(0, length, stride):
        end = min(begin + span, length)
        if first_scored < end:
            windows.append(Window(begin, end, first_scored))
            first_scored = end
        if end == length:
            break
    return windows


def plan_rolling_windows(length: int, context: int) -> list[Window]:
    """Plan the windows of lm-evaluation-harness's rolling log-likelihood, which score all tokens but the first once.

    Each window scores `context` tokens and spans one more, the token before them. The last window extends backwards to
    the same span, but scores only the remaining tokens. `length` includes the prefix token.
    """
    ends = [*range(context + 1, length, context), length] if length > 1 else []
    return [Window(max(0, end - context - 1), end, max(1, begin)) for begin, end in pairwise([0, *ends])]


class Reading(TypedDict, total=False):
    """Options for reading documents, common to all perplexity measures.

    Attributes:
        batch_size: windows or documents read at once; does not change the result.
        max_tokens: score whole documents, in order, as long as they have at most this many scored tokens in all. If
            the first document alone has more, it is cut short. None: score all.
        autocast: makes the context in which the model computes.
        on_progress: called with the tokens scored so far and in all.
        should_stop: called after each batch; once it returns True, the result covers only what was scored until then.
        processes: the processes that share the work; each gets the whole result.
    """

    batch_size: Required[int]
    max_tokens: int | None
    autocast: Autocast
    on_progress: Progress | None
    should_stop: Callable[[], bool]
    processes: Processes


class Scores(NamedTuple):
    """Losses of tokens, three arrays [N].

    Attributes:
        documents: each token's document, as an index into the scored documents.
        positions: each token's index in its document.
        losses: each token's negative log-likelihood in nats, float64.
    """

    documents: NDArray[np.int64]
    positions: NDArray[np.int64]
    losses: NDArray[np.float64]


def join_rows(rows: Iterable[tuple[int, int, NDArray[np.float64]]]) -> Scores:
    """Join rows of consecutive tokens, each (document, position of the first token, losses)."""
    found = list(rows) or [(0, 0, np.zeros(0))]
    return Scores(
        np.concatenate([np.full(len(losses), document, dtype=np.int64) for document, _, losses in found]),
        np.concatenate([np.arange(first, first + len(losses)) for _, first, losses in found]),
        np.concatenate([losses for *_, losses in found]),
    )


def join_scores(batches: Iterable[Scores]) -> Scores:
    """Concatenate the scores of several batches."""
    found = list(batches) or [join_rows([])]
    return Scores(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))


class Scorer:
    """Scores documents with a model in evaluation mode; the model's held memory is neither read nor changed.

    `max_tokens` is not applied here; callers use `select_documents`. `num_scored` counts the tokens that this process
    has scored so far; `is_stopped` is whether `should_stop` has ended the reading.
    """

    def __init__(self, model: LanguageModel, documents: Sequence[NDArray[Any]], reading: Reading) -> None:
        self.model = model
        self.documents = documents
        self.batch_size = reading["batch_size"]
        self.device = find_device(model)
        self.autocast = reading.get("autocast", contextlib.nullcontext)
        self.on_progress = reading.get("on_progress")
        self.should_stop = reading.get("should_stop", lambda: False)
        self.processes = reading.get("processes", ALONE)
        self.num_planned = sum(len(tokens) - 1 for tokens in documents)
        self.num_scored = 0
        self.is_stopped = False

    def score_windows(self, plan: Callable[[int], list[Window]]) -> list[Scores]:
        """Score the documents in windows, each read from an empty memory; return this process's scores by batch.

        `plan` returns the windows of a document of a given length.
        """
        pieces = [(index, window) for index, tokens in enumerate(self.documents) for window in plan(len(tokens))]
        pieces.sort(key=lambda piece: piece[1].begin - piece[1].end)  # equal lengths share a batch: least padding
        batches = [pieces[begin : begin + self.batch_size] for begin in range(0, len(pieces), self.batch_size)]
        found: list[Scores] = []
        with evaluation_mode(self.model, self.autocast), self.model.fresh_memory():
            for batch in batches[self.processes.rank :: self.processes.count]:
                losses = score_rows(self.model, [cut_row(self.documents[index], window) for index, window in batch])
                scored = zip(batch, losses, strict=True)
                found.append(join_rows((index, window.first_scored, row) for (index, window), row in scored))
                if self.note(found[-1]):
                    break
        return found

    def score_streams(self, segments_per_call: int) -> list[Scores]:
        """Score the documents in consecutive segments with the memory carried; return this process's scores by call.

        Each row reads one document with its own memory; at its end it starts the next unread document with an empty
        memory. Calls consist of whole segments, so `segments_per_call` does not change the result.
        """
        # Longest first, so that few rows are idle at the end.
        by_length = sorted(range(len(self.documents)), key=lambda index: -len(self.documents[index]))
        own = by_length[self.processes.rank :: self.processes.count]
        per_call = segments_per_call * self.model.segment_length
        num_rows = choose_rows([len(self.documents[index]) for index in own], per_call, self.batch_size, self.device)
        pieces = ([(index, one) for one in plan_windows(len(self.documents[index]), per_call)] for index in own)
        found: list[Scores] = []
        with evaluation_mode(self.model, self.autocast), self.model.fresh_memory(batch_size=num_rows or None):
            for begins, batch in read_side_by_side(pieces, num_rows):
                read = [cut_row(self.documents[piece[0]], piece[1]) for piece in batch if piece is not None]
                # A row without a document repeats another's tokens, unscored, which avoids a mask.
                longest = max((row.tokens for row in read), key=len)
                rest = iter(read)
                rows = [Row(longest, len(longest)) if piece is None else next(rest) for piece in batch]
                self.model.reset_rows(torch.tensor(begins, device=self.device))
                losses = score_rows(self.model, rows, update_memory=True)
                scored = zip(batch, losses, strict=True)
                found.append(join_rows((p[0], p[1].first_scored, row) for p, row in scored if p is not None))
                if self.note(found[-1]):
                    break
        return found

    def note(self, scores: Scores) -> bool:
        """Count a batch and report progress; return whether to stop."""
        self.num_scored += len(scores.losses)
        if self.on_progress:
            self.on_progress(self.num_scored, self.num_planned)
        self.is_stopped = self.should_stop()
        return self.is_stopped


class ScoredDocuments(NamedTuple):
    """The documents to score, each with at least one scored token.

    Attributes:
        indices: the documents' indices in the split.
        tokens: each document's tokens, after the prefix if there is one.
        num_scored: tokens to score: all except the first of each entry of `tokens`.
        num_bytes: bytes of their raw text; None if the document was cut short.
        num_words: words of their raw text; None if the document was cut short.
    """

    indices: list[int]
    tokens: list[NDArray[Any]]
    num_scored: int
    num_bytes: int | None
    num_words: int | None


def select_documents(split: TokenSplit, max_tokens: int | None, prefix: int | None = None) -> ScoredDocuments:
    """Select whole documents in order, up to `max_tokens` as in `Reading`.

    `prefix` is a token to put before each document, so that the document's first token is scored, too.

    Raises:
        UserError: no document is long enough.
    """
    tokens: list[np.ndarray] = []
    indices: list[int] = []
    num_scored = 0
    for index in range(split.num_documents):
        document = split.document(index)
        if prefix is not None:
            document = np.concatenate([np.array([prefix], dtype=np.int64), document])
        if len(document) < 2:
            continue
        if max_tokens is not None and num_scored + len(document) - 1 > max_tokens:
            if not tokens:
                return ScoredDocuments([index], [document[: max_tokens + 1]], max_tokens, None, None)
            break
        tokens.append(document)
        indices.append(index)
        num_scored += len(document) - 1
    if not tokens:
        least = "two tokens" if prefix is None else "a token"
        raise UserError(f"evaluation: no document has {least} or more, so there is nothing to score")
    return ScoredDocuments(indices, tokens, num_scored, *split.count_raw(indices))


def find_device(model: LanguageModel) -> torch.device:
    """Return the device of the model's weights."""
    parameter = next(iter(model.parameters()), None)
    return torch.device("cpu") if parameter is None else parameter.device


@contextlib.contextmanager
def evaluation_mode(model: LanguageModel, autocast: Autocast = contextlib.nullcontext) -> Iterator[None]:
    """Disable dropout and gradients inside the block; restore each module's mode afterwards."""
    with set_mode(model, training=False), torch.inference_mode(), autocast(), cast_weights_once(model):
        yield


@contextlib.contextmanager
def set_mode(model: LanguageModel, *, training: bool) -> Iterator[None]:
    """Set the mode of all modules inside the block; restore each module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = training
        yield
    finally:
        for module, before in modes:
            module.training = before


class Row(NamedTuple):
    """One row of a batch: tokens [W], scored from index `first_scored` ≥ 1 on; W: none are scored."""

    tokens: np.ndarray
    first_scored: int = 1


def choose_rows(lengths: Sequence[int], per_call: int, most: int, device: torch.device) -> int:
    """Choose how many documents, given by length, longest first, to read at once, `per_call` tokens at a time.

    On a GPU it is as many as possible, up to `most`. On a CPU, rows without a document left cost as much as others: the
    choice minimises the work: (rows + 2) · calls, where 2 stands for the fixed cost of a call.
    """
    counts = range(1, min(most, len(lengths)) + 1)
    if device.type != "cpu":
        return len(counts)

    def count_calls(num_rows: int) -> int:
        busy = [0] * num_rows
        for length in lengths:
            heapq.heapreplace(busy, busy[0] + -(-(length - 1) // per_call))
        return max(busy)

    return min(counts, key=lambda num_rows: (num_rows + 2) * count_calls(num_rows), default=0)


def read_side_by_side(texts: Iterable[Sequence[Item]], num_rows: int) -> Iterator[tuple[list[bool], list[Item | None]]]:
    """Read texts, each a sequence of pieces, in rows; a row that has finished a text starts the next unread one.

    Yields for each batch which rows start a text, and the next piece of each row (None: no text is left).
    """
    unread = iter(texts)
    rows: list[deque[Item]] = [deque() for _ in range(num_rows)]
    while True:
        begins = [False] * num_rows
        for place, row in enumerate(rows):
            if not row and (text := next(unread, None)) is not None:
                begins[place] = True
                row.extend(text)
        if not any(rows):
            return
        yield begins, [row.popleft() if row else None for row in rows]


def cut_row(tokens: np.ndarray, window: Window) -> Row:
    """Cut the row that reads and scores a window of a document."""
    return Row(tokens[window.begin : window.end], window.first_scored - window.begin)


def pad_rows(
    rows: Sequence[Row], device: torch.device, width: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pad rows on the right to input ids [B, T], labels [B, T + 1] and a mask [B, T] of real tokens (None: no padding).

    T is `width`, by default one less than the longest row, whose last token is only a target. Shorter rows also read
    their last token, because a masked token can't be a target; this changes no earlier loss.
    """
    width = width or max(len(row.tokens) for row in rows) - 1
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width + 1), IGNORE_INDEX, dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens = torch.from_numpy(row.tokens.astype(np.int64))
        input_ids[index, : len(tokens)] = tokens[:width]
        labels[index, row.first_scored : len(tokens)] = tokens[row.first_scored :]
    lengths = torch.tensor([len(row.tokens) for row in rows])
    mask = None if int(lengths.min()) >= width else (torch.arange(width) < lengths[:, None]).to(device)
    return input_ids.to(device), labels.to(device), mask


def score_rows(
    model: LanguageModel, rows: Sequence[Row], *, width: int | None = None, update_memory: bool = False
) -> list[np.ndarray]:
    """Return for each row the losses of tokens[first_scored:] in nats, float64.

    The caller sets evaluation mode and the memory to read. `update_memory` keeps what the rows write; for `width` see
    `pad_rows`.
    """
    input_ids, labels, mask = pad_rows(rows, find_device(model), width)
    losses = model.token_losses(input_ids, labels, mask, update_memory=update_memory)
    found = losses.cpu().double().numpy()
    # The loss at position t belongs to the token at t + 1.
    return [found[i, row.first_scored - 1 : len(row.tokens) - 1] for i, row in enumerate(rows)]


def exp_or_inf(value: float) -> float:
    """Return exp(value), or infinity on overflow; NaN stays NaN."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def count_shared(texts: Sequence[np.ndarray]) -> int:
    """Count the leading tokens that all texts have in common."""
    length = min(len(tokens) for tokens in texts)
    stacked = np.stack([tokens[:length] for tokens in texts])
    differs = (stacked != stacked[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else length
