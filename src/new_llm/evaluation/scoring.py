"""What every measurement shares: rows of tokens in, the loss of each scored token out."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from new_llm.config import UserError
from new_llm.data.tokens import TokenSplit
from new_llm.evaluation.windows import Window
from new_llm.models.loss import IGNORE_INDEX

Autocast = Callable[[], AbstractContextManager[Any]]
"""Makes the context in which the model computes, e.g. the autocast of training."""

Progress = Callable[[int, int], None]
"""Called after each batch with the tokens scored so far and the tokens to score in all."""


class LanguageModel(Protocol):
    """What a model must offer to be measured; `new_llm.models.TransformerLM` does."""

    def token_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        update_memory: bool = False,
    ) -> Tensor:
        """Loss in nats of the token after each position, [B, T]; 0 where there is no target."""
        ...

    def fresh_memory(self, batch_size: int | None = None) -> AbstractContextManager[Any]:
        """An empty memory inside the context, the held one back afterwards."""
        ...

    def reset_rows(self, rows: Tensor) -> None:
        """Empty the memory of the rows that are True, [B] bool."""
        ...

    @property
    def segment_length(self) -> int:
        """Tokens in a segment."""
        ...

    def modules(self) -> Iterator[torch.nn.Module]:
        """The model and all its parts."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The model's weights."""
        ...


class Row(NamedTuple):
    """One row of a batch to score.

    Attributes:
        tokens: [W]; the last one is there to be predicted.
        first_scored: index in `tokens`, at least 1, of the first token that is scored; W: none is.
    """

    tokens: np.ndarray
    first_scored: int = 1


def cut_row(tokens: np.ndarray, window: Window) -> Row:
    """The row that reads and scores a window of a document's tokens."""
    return Row(tokens[window.begin : window.end], window.first_scored - window.begin)


def never() -> bool:
    """The answer to `should_stop` of a measurement that runs to its end."""
    return False


@dataclass(frozen=True)
class ScoredDocuments:
    """The documents that are scored, each of one scored token or more.

    Attributes:
        tokens: of each document.
        num_scored: tokens to score: all but each document's first, or all where a prefix stands before it.
        num_bytes: bytes of their raw text; None where the document was cut short.
        num_words: words of their raw text; None where the document was cut short.
    """

    tokens: list[np.ndarray]
    num_scored: int
    num_bytes: int | None
    num_words: int | None


def select_documents(split: TokenSplit, max_tokens: int | None, prefix: int | None = None) -> ScoredDocuments:
    """Whole documents in order, as `evaluate_sliding_window` says of max_tokens.

    Args:
        split: the documents.
        max_tokens: tokens to score at most.
        prefix: a token to put before each document, so that its first token is scored, too.
    """
    tokens: list[np.ndarray] = []
    chosen: list[int] = []
    num_scored = 0
    for index in range(split.num_documents):
        document = split.document(index)
        if prefix is not None:
            document = np.concatenate([np.array([prefix], dtype=np.int64), document])
        if len(document) < 2:
            continue
        if max_tokens is not None and num_scored + len(document) - 1 > max_tokens:
            if not tokens:
                return ScoredDocuments([document[: max_tokens + 1]], max_tokens, None, None)
            break
        tokens.append(document)
        chosen.append(index)
        num_scored += len(document) - 1
    if not tokens:
        least = "two tokens" if prefix is None else "a token"
        raise UserError(f"evaluation: no document has {least} or more, so there is nothing to score")
    return ScoredDocuments(tokens, num_scored, int(split.num_bytes[chosen].sum()), int(split.num_words[chosen].sum()))


def find_device(model: LanguageModel, device: torch.device | str | None) -> torch.device:
    """The device to put inputs on: the one given, else the one on which the model's weights lie."""
    if device is not None:
        return torch.device(device)
    parameter = next(iter(model.parameters()), None)
    return torch.device("cpu") if parameter is None else parameter.device


@contextlib.contextmanager
def evaluation_mode(model: LanguageModel, autocast: Autocast = contextlib.nullcontext) -> Iterator[None]:
    """No dropout and no gradients inside; afterwards each part of the model trains or not as before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.inference_mode(), autocast():
            yield
    finally:
        for module, training in modes:
            module.training = training


def score_rows(
    model: LanguageModel, rows: Sequence[Row], device: torch.device, *, update_memory: bool = False
) -> list[np.ndarray]:
    """Score one batch.

    Args:
        model: the model, in evaluation mode and with the memory to read already in place.
        rows: at least one; rows of different widths are padded on the right and masked.
        device: where the model lies.
        update_memory: keep what the rows write into the held memory.

    Returns:
        For each row the losses of tokens[first_scored:] in nats, float64.
    """
    width = max(len(row.tokens) for row in rows) - 1
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width + 1), IGNORE_INDEX, dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens = torch.from_numpy(row.tokens.astype(np.int64))
        # A shorter row reads its last token too: a masked token is no target. No earlier loss depends on it.
        input_ids[index, : len(tokens)] = tokens[:width]
        labels[index, row.first_scored : len(tokens)] = tokens[row.first_scored :]
    lengths = [len(row.tokens) for row in rows]
    mask = None
    if min(lengths) < width:
        mask = (torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]).to(device)
    losses = model.token_losses(input_ids.to(device), labels.to(device), mask, update_memory=update_memory)
    found = losses.cpu().double().numpy()
    # The loss at position t is that of the token at t + 1.
    return [found[i, row.first_scored - 1 : len(row.tokens) - 1] for i, row in enumerate(rows)]


def group_by_length(rows: Sequence[Row], batch_size: int) -> list[list[int]]:
    """Batches of row indices, longest first: rows of one length share a batch, so that padding is least."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].tokens))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def exp_or_inf(value: float) -> float:
    """Exponential; infinite where a float can't hold it. NaN stays NaN."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def count_shared(texts: Sequence[np.ndarray]) -> int:
    """Leading tokens that all texts have in common."""
    length = min(len(tokens) for tokens in texts)
    stacked = np.stack([tokens[:length] for tokens in texts])
    differs = (stacked != stacked[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else length
