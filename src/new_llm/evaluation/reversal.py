"""The reversal curse: a model that learned "A is B" need not know "B is A" (arXiv:2309.12288)."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from new_llm.config import UserError
from new_llm.data.reversal_pairs import ReversalPair
from new_llm.evaluation.scoring import (
    Autocast,
    LanguageModel,
    Row,
    evaluation_mode,
    exp_or_inf,
    find_device,
    group_by_length,
    score_rows,
)

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class ReversalScores:
    """The figures of one group of pairs.

    Attributes:
        num_pairs: pairs in the group.
        forward_perplexity: of the sentences that training held, over all tokens but each sentence's first.
        backward_perplexity: of the reversed sentences, which training never held.
        forward_accuracy: share of the pairs whose right answer comes first, forward.
        backward_accuracy: the same, backward.
        chance_accuracy: the accuracy of a guess: the mean of 1 / candidates over pairs and both directions.
    """

    num_pairs: int
    forward_perplexity: float
    backward_perplexity: float
    forward_accuracy: float
    backward_accuracy: float
    chance_accuracy: float

    @property
    def ratio(self) -> float:
        """Forward / backward perplexity: 1 where both directions are known alike, near 0 under the curse."""
        return self.forward_perplexity / self.backward_perplexity

    @property
    def gap(self) -> float:
        """Backward − forward perplexity; 0 is best."""
        return self.backward_perplexity - self.forward_perplexity

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the ratio and the gap among them."""
        return dataclasses.asdict(self) | {"ratio": self.ratio, "gap": self.gap}


@dataclass(frozen=True)
class ReversalResult(ReversalScores):
    """The figures of all pairs, of each relation, and of real and invented facts.

    Attributes:
        per_relation: by the relation's name.
        by_kind: by "real" and "invented".
    """

    per_relation: dict[str, ReversalScores]
    by_kind: dict[str, ReversalScores]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        relations = [{"relation": name} | scores.to_dict() for name, scores in self.per_relation.items()]
        kinds = {kind: scores.to_dict() for kind, scores in self.by_kind.items()}
        return super().to_dict() | {"per_relation": relations, "by_kind": kinds}


@dataclass(frozen=True)
class _Reading:
    """What one pair showed in one direction."""

    total_nll: float
    num_tokens: int
    is_first: bool
    num_candidates: int


def evaluate_reversal_curse(
    model: LanguageModel,
    tokenizer: Any,
    pairs: Iterable[ReversalPair],
    device: torch.device | str | None = None,
    *,
    batch_size: int = 128,
    autocast: Autocast = contextlib.nullcontext,
) -> ReversalResult:
    """Compare what a model knows forward, as it was trained, with what it knows backward.

    Perplexity is exp(total negative log-likelihood / tokens) over all tokens of all sentences but each one's
    first.

    Accuracy asks which answer the model finds most probable after the prompt: the right one, or that of
    another pair of the same relation. Answers are compared by their total negative log-likelihood, −ln
    p(answer | prompt), not by the mean a token: the mean would favour long names, whose later pieces are
    certain once the first ones are given. The total favours short answers, but a preference that is the same
    after every prompt puts the same answer first each time and so can't lift accuracy above chance. Answers
    that are alike count once, another right answer to the same prompt doesn't compete, and a tie doesn't
    count as first.

    Prompt and answer are tokenized as the one text that training saw. A token may then straddle their border,
    and not the same way for each answer; so each total runs from the first token in which the candidates'
    texts differ. What they share before it is equally probable in all and changes no rank.

    Args:
        model: evaluated in evaluation mode from an empty memory; its held memory is neither read nor changed.
        tokenizer: of `tokenizers` or `transformers`.
        pairs: at least one.
        device: where the model lies; None: where its weights are.
        batch_size: sentences read at once; it does not change the result.
        autocast: makes the context in which the model computes.

    Raises:
        UserError: no pairs, or no sentence of two tokens.
    """
    pairs = list(pairs)
    if not pairs:
        raise UserError("reversal: no pairs were given")
    encoded: dict[str, np.ndarray] = {}
    tasks: dict[Direction, list[tuple[str, list[str]]]] = {"forward": [], "backward": []}
    for direction, found in tasks.items():
        for sentence, rivals in _list_candidates(pairs, direction):
            for text in (sentence, *rivals):
                if text not in encoded:
                    encoded[text] = encode_text(tokenizer, text)
            found.append((sentence, rivals))
    losses = _score_texts(model, encoded, find_device(model, device), batch_size, autocast)
    readings = {
        direction: [_read(encoded, losses, sentence, rivals) for sentence, rivals in found]
        for direction, found in tasks.items()
    }
    if any(not sum(reading.num_tokens for reading in found) for found in readings.values()):
        raise UserError("reversal: no sentence has two tokens or more, so there is nothing to score")

    def scores_of(belongs: Callable[[ReversalPair], bool]) -> ReversalScores:
        chosen = [index for index, pair in enumerate(pairs) if belongs(pair)]
        return _summarize([readings["forward"][i] for i in chosen], [readings["backward"][i] for i in chosen])

    return ReversalResult(
        **dataclasses.asdict(scores_of(lambda pair: True)),
        per_relation={
            name: scores_of(lambda pair, name=name: pair.relation == name) for name in _names(pairs, "relation")
        },
        by_kind={kind: scores_of(lambda pair, kind=kind: pair.kind == kind) for kind in _names(pairs, "kind")},
    )


def encode_text(tokenizer: Any, text: str) -> np.ndarray:
    """The ids of a text without special tokens, from a tokenizer of `tokenizers` or `transformers`."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return np.asarray(getattr(encoding, "ids", encoding), dtype=np.int64)


def _list_candidates(pairs: Sequence[ReversalPair], direction: Direction) -> list[tuple[str, list[str]]]:
    """For each pair its sentence, and the same prompt with each wrong answer of its relation."""
    right: dict[tuple[str, str], set[str]] = {}
    answers: dict[str, dict[str, None]] = {}  # a dict keeps the order
    parts = [
        (pair.relation, getattr(pair, f"{direction}_prompt"), getattr(pair, f"{direction}_answer")) for pair in pairs
    ]
    for relation, prompt, answer in parts:
        right.setdefault((relation, prompt), set()).add(answer)
        answers.setdefault(relation, {})[answer] = None
    return [
        (
            prompt + answer,
            [prompt + other for other in answers[relation] if other not in right[relation, prompt]],
        )
        for relation, prompt, answer in parts
    ]


def _score_texts(
    model: LanguageModel,
    encoded: dict[str, np.ndarray],
    device: torch.device,
    batch_size: int,
    autocast: Autocast,
) -> dict[str, np.ndarray]:
    """The losses of each text's tokens but the first, float64."""
    texts = [text for text, tokens in encoded.items() if len(tokens) > 1]
    rows = [Row(encoded[text]) for text in texts]
    losses = {text: np.zeros(0) for text in encoded}
    with evaluation_mode(model, autocast), model.fresh_memory():
        for batch in group_by_length(rows, batch_size):
            for index, found in zip(batch, score_rows(model, [rows[i] for i in batch], device), strict=True):
                losses[texts[index]] = found
    return losses


def _read(encoded: dict[str, np.ndarray], losses: dict[str, np.ndarray], sentence: str, rivals: list[str]) -> _Reading:
    candidates = [sentence, *rivals]
    shared = max(1, _count_shared([encoded[text] for text in candidates]))
    totals = [losses[text][shared - 1 :].sum() for text in candidates]  # losses begin with the second token
    return _Reading(
        total_nll=float(losses[sentence].sum()),
        num_tokens=len(losses[sentence]),
        is_first=all(totals[0] < total for total in totals[1:]),
        num_candidates=len(candidates),
    )


def _count_shared(texts: list[np.ndarray]) -> int:
    """Leading tokens that all texts have in common."""
    length = min(len(tokens) for tokens in texts)
    stacked = np.stack([tokens[:length] for tokens in texts])
    differs = (stacked != stacked[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else length


def _summarize(forward: list[_Reading], backward: list[_Reading]) -> ReversalScores:
    return ReversalScores(
        num_pairs=len(forward),
        forward_perplexity=_perplexity(forward),
        backward_perplexity=_perplexity(backward),
        forward_accuracy=float(np.mean([reading.is_first for reading in forward])),
        backward_accuracy=float(np.mean([reading.is_first for reading in backward])),
        chance_accuracy=float(np.mean([1 / reading.num_candidates for reading in forward + backward])),
    )


def _perplexity(readings: list[_Reading]) -> float:
    num_tokens = sum(reading.num_tokens for reading in readings)
    return exp_or_inf(sum(reading.total_nll for reading in readings) / num_tokens) if num_tokens else float("nan")


def _names(pairs: Sequence[ReversalPair], attribute: str) -> list[str]:
    return list(dict.fromkeys(getattr(pair, attribute) for pair in pairs))
