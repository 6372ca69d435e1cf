"""Asking for what was hidden: does greedy decoding find it, and where does it rank among other answers?"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from new_llm.evaluation.hugging_face import HuggingFaceLM
from new_llm.evaluation.recall_texts import RecallText
from new_llm.evaluation.scoring import LanguageModel, Row, score_rows
from new_llm.models import TransformerLM
from new_llm.models.loss import IGNORE_INDEX, align_labels


class Answer(NamedTuple):
    """What one question showed.

    Attributes:
        is_exact: greedy decoding from the question gives the right answer, token by token.
        rank: place of the right answer among the candidates, 1 is first; equals share the mean of their places.
        is_first: whether it is more probable than every other; a tie is not first.
    """

    is_exact: bool
    rank: float
    is_first: bool


def has_memory(model: LanguageModel) -> bool:
    """Whether what a model has read in earlier calls can matter to it."""
    return not isinstance(model, HuggingFaceLM) and bool(getattr(model, "memory_layers", True))


def read_context(model: LanguageModel, texts: Sequence[RecallText], begin: int, end: int, device: torch.device) -> None:
    """Write a piece of every text's context into the row's memory; its losses are not asked for."""
    pieces = np.stack([text.context[begin:end] for text in texts])
    input_ids = torch.from_numpy(pieces).to(device)
    model.token_losses(input_ids, torch.full_like(input_ids, IGNORE_INDEX), update_memory=True)


def score_answers(model: LanguageModel, texts: Sequence[RecallText], device: torch.device) -> list[Answer]:
    """Ask the question of every text, one a row, with the memory in place; nothing is written.

    Candidates are ranked by their total negative log-likelihood from the first token in which they differ, as in
    `evaluate_reversal_curse`.
    """
    totals = np.zeros((len(texts), len(texts[0].candidates)))
    for number in range(totals.shape[1]):
        rows = [
            Row(
                np.concatenate([text.opening, text.candidates[number]]),
                len(text.opening) + text.differ_begin,
            )
            for text in texts
        ]
        totals[:, number] = [losses.sum() for losses in score_rows(model, rows, device)]
    right, others = totals[:, :1], totals[:, 1:]
    ahead, equal = (others < right).sum(1), (others == right).sum(1)
    # NaN is neither ahead nor behind: a model that gives it knows nothing, and comes last.
    unknown = np.isnan(others) | np.isnan(right)
    ahead = ahead + unknown.sum(1)
    exact = find_exact(model, texts, device)
    return [
        Answer(is_exact, float(1 + a + e / 2), bool(a + e == 0))
        for is_exact, a, e in zip(exact, ahead, equal, strict=True)
    ]


def find_exact(model: LanguageModel, texts: Sequence[RecallText], device: torch.device) -> list[bool]:
    """Whether greedy decoding gives each right answer.

    Read is the question with the right answer, and each of the answer's tokens must be the most probable one where it
    stands. That is the same: greedy decoding has read the right tokens for as long as it has found them.
    """
    rows = [np.concatenate([text.opening, text.candidates[0]]) for text in texts]
    width = max(map(len, rows)) - 1
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width + 1), IGNORE_INDEX, dtype=torch.int64)
    for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
        tokens, begin = torch.from_numpy(row), len(text.opening) + text.answer_begin
        input_ids[index, : len(row)] = tokens[:width]
        labels[index, begin : len(row)] = tokens[begin:]
    lengths = torch.tensor([len(row) for row in rows])
    mask = None if int(lengths.min()) >= width else (torch.arange(width) < lengths[:, None]).to(device)
    targets = align_labels(labels, width).to(device)
    wanted = targets != IGNORE_INDEX
    is_right = torch.ones_like(wanted)
    is_right[wanted] = predict_tokens(model, input_ids.to(device), mask, wanted) == targets[wanted]
    return is_right.all(1).tolist()


def predict_tokens(model: LanguageModel, input_ids: Tensor, mask: Tensor | None, wanted: Tensor) -> Tensor:
    """The most probable next token at the wanted positions [B, T], in their order.

    A model that is neither of this project nor of transformers is called for its logits: model(input_ids, mask).
    """
    if isinstance(model, TransformerLM):  # the head is the widest product: it runs where it is asked for alone
        return model.embed_out(model.compute_hidden(input_ids, mask)[wanted]).argmax(-1)
    if isinstance(model, HuggingFaceLM):
        logits = model.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    else:
        logits = cast(Any, model)(input_ids, mask)
    return logits[wanted].argmax(-1)
