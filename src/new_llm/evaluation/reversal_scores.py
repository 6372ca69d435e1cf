"""From what single pairs showed to the figures of groups of pairs, with bootstrap intervals."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from new_llm.evaluation.statistics import Interval, draw_resamples, find_interval


class Reading(NamedTuple):
    """What one pair showed in one direction.

    Attributes:
        total_nll: of the sentence's tokens but the first, nats.
        num_tokens: how many these are.
        answer_nll: of the answer's tokens alone, nats.
        num_answer_tokens: how many these are.
        rank: of the right answer among the answers of its relation: 1 + those that are likelier + half of those that
            are as likely.
        num_candidates: the answers ranked, the right one among them.
    """

    total_nll: float
    num_tokens: int
    answer_nll: float
    num_answer_tokens: int
    rank: float
    num_candidates: int


@dataclass(frozen=True)
class ReversalScores:
    """The figures of one group of pairs.

    Attributes:
        num_pairs: pairs in the group.
        forward_perplexity: of the sentences that training held, over all tokens but each sentence's first. A sentence
            that is known by heart does not reach 1: which of the facts it will state can't be told before its subject.
        backward_perplexity: of the reversed sentences, which training never held.
        forward_answer_perplexity: of the answers' tokens alone, given the prompt: 1 where each answer is certain.
        backward_answer_perplexity: the same, backward.
        forward_accuracy: share of the pairs whose right answer comes first, forward.
        backward_accuracy: the same, backward.
        chance_accuracy: the accuracy of a guess: the mean of 1 / candidates over pairs and both directions.
        forward_mean_rank: mean rank of the right answer among the answers of its relation, 1 is best; a tie counts
            half.
        backward_mean_rank: the same, backward.
        chance_mean_rank: the mean rank of a guess: the mean of (candidates + 1) / 2.
        intervals: of every figure but the counts and the chances, by its name, ratios and gap among them.
    """

    num_pairs: int
    forward_perplexity: float
    backward_perplexity: float
    forward_answer_perplexity: float
    backward_answer_perplexity: float
    forward_accuracy: float
    backward_accuracy: float
    chance_accuracy: float
    forward_mean_rank: float
    backward_mean_rank: float
    chance_mean_rank: float
    intervals: dict[str, Interval]

    @property
    def ratio(self) -> float:
        """Forward / backward perplexity: 1 where both directions are known alike, near 0 under the curse."""
        return self.forward_perplexity / self.backward_perplexity

    @property
    def answer_ratio(self) -> float:
        """Forward / backward perplexity of the answers alone."""
        return self.forward_answer_perplexity / self.backward_answer_perplexity

    @property
    def gap(self) -> float:
        """Backward − forward perplexity; 0 is best."""
        return self.backward_perplexity - self.forward_perplexity

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the ratios and the gap among them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(ReversalScores)}
        values |= {"ratio": self.ratio, "answer_ratio": self.answer_ratio, "gap": self.gap}
        return values | {"intervals": {name: list(interval) for name, interval in self.intervals.items()}}


@dataclass(frozen=True)
class ReversalResult(ReversalScores):
    """The figures of all pairs, of each relation, and of real and invented facts.

    Attributes:
        per_relation: by the relation's name.
        by_kind: by "real", "invented" and, for pairs of a file that doesn't tell, "unstated".
        num_resamples: bootstrap resamples that the intervals rest on.
        confidence: of the intervals.
        seed: of the resamples.
    """

    per_relation: dict[str, ReversalScores]
    by_kind: dict[str, ReversalScores]
    num_resamples: int
    confidence: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        bootstrap = {
            "method": "percentile; pairs drawn within each relation",
            "num_resamples": self.num_resamples,
            "confidence": self.confidence,
            "seed": self.seed,
        }
        return super().to_dict() | {
            "per_relation": [{"relation": name} | scores.to_dict() for name, scores in self.per_relation.items()],
            "by_kind": {kind: scores.to_dict() for kind, scores in self.by_kind.items()},
            "bootstrap": bootstrap,
        }


class ReversalTable:
    """The readings of all pairs, and one table of resamples for all figures.

    Relations are given, and pairs are a sample of what each could hold: a resample draws, for each relation, as many of
    its pairs as it has. Every figure is computed within the same resamples, so that ratio and gap are paired.

    Args:
        forward: what each pair showed forward.
        backward: what each showed backward.
        relations: each pair's relation.
        num_resamples: resamples to draw.
        confidence: of the intervals.
        seed: of the resamples.
    """

    def __init__(
        self,
        forward: Sequence[Reading],
        backward: Sequence[Reading],
        relations: Sequence[str],
        *,
        num_resamples: int,
        confidence: float,
        seed: int,
    ) -> None:
        self.columns = {
            direction: {name: np.array([getattr(r, name) for r in readings], np.float64) for name in Reading._fields}
            for direction, readings in (("forward", forward), ("backward", backward))
        }
        self.confidence = confidence
        self.resamples = np.zeros((num_resamples, len(relations)))
        names = np.array(relations)
        groups = list(dict.fromkeys(relations))
        seeds = np.random.SeedSequence(seed).generate_state(len(groups))
        for group, group_seed in zip(groups, seeds, strict=True):
            members = np.flatnonzero(names == group)
            self.resamples[:, members] = draw_resamples(len(members), num_resamples, int(group_seed))

    def summarize(self, chosen: NDArray[np.bool_]) -> ReversalScores:
        """The figures of the pairs that are True, [num_pairs]."""
        figures = {name: float(value[0]) for name, value in self._compute(chosen[None].astype(np.float64)).items()}
        resampled = self._compute(self.resamples * chosen)
        candidates = np.concatenate([table["num_candidates"][chosen] for table in self.columns.values()])
        return ReversalScores(
            num_pairs=int(chosen.sum()),
            **{name: value for name, value in figures.items() if name not in ("ratio", "answer_ratio", "gap")},
            chance_accuracy=float(np.mean(1 / candidates)),
            chance_mean_rank=float(np.mean((candidates + 1) / 2)),
            intervals={name: find_interval(values, self.confidence) for name, values in resampled.items()},
        )

    def _compute(self, weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Every figure of each row of weights [R, num_pairs], how often a pair counts; NaN for a group without any."""
        figures: dict[str, NDArray[np.float64]] = {}
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for direction, table in self.columns.items():
                count = weights.sum(1)
                loss = (weights @ table["total_nll"]) / (weights @ table["num_tokens"])
                answer_loss = (weights @ table["answer_nll"]) / (weights @ table["num_answer_tokens"])
                figures[f"{direction}_perplexity"] = np.exp(loss)
                figures[f"{direction}_answer_perplexity"] = np.exp(answer_loss)
                figures[f"{direction}_accuracy"] = (weights @ (table["rank"] == 1)) / count
                figures[f"{direction}_mean_rank"] = (weights @ table["rank"]) / count
            for name, of in (("ratio", "perplexity"), ("answer_ratio", "answer_perplexity")):
                figures[name] = figures[f"forward_{of}"] / figures[f"backward_{of}"]
            figures["gap"] = figures["backward_perplexity"] - figures["forward_perplexity"]
        return figures
