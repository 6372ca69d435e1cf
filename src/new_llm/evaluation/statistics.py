"""Confidence intervals: Student's t over documents and seeds, bootstrap over pairs or trials, Wilson's for proportions.

Tokens of one document are not independent, so standard errors of perplexities are clustered by document. Models are
measured on the same documents, so `compare_models`, the only function that compares two models or two ways to read one,
pairs them by seed and document. It computes differences in nats per token, which are reported as percentages of the
perplexity. With fewer than MIN_DOCUMENTS documents or MIN_SEEDS seeds there is no interval, because so few say little
about others. Seeds vary only the initial weights and the order of samples; the split into training and validation is
fixed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from new_llm.evaluation.scoring import Scores, exp_or_inf

Array = NDArray[np.float64]
MIN_DOCUMENTS = 5
"""The fewest documents for an interval over documents."""
MIN_SEEDS = 3
"""The fewest seeds for an interval over seeds; with two it would be over ten times as wide as their distance."""
MIN_CLAIM_SEEDS = 5
"""The fewest seeds for claiming a difference; with fewer it is an indication."""
POWER = 0.8
"""The probability with which an effect of the smallest visible size would be detected."""


class Estimate(NamedTuple):
    """A figure and its confidence interval; the ends are None if there are too few items for one."""

    value: float
    low: float | None
    high: float | None


class DocumentLosses(NamedTuple):
    """Token count and total loss of each of D documents, in E ranges of distance from the document's start.

    Attributes:
        num_tokens: [D, E].
        total_nll: nats, [D, E].
        range_starts: where the E ranges begin, in tokens; the last is open-ended.
    """

    num_tokens: NDArray[np.int64]
    total_nll: Array
    range_starts: tuple[int, ...] = (0,)

    @classmethod
    def sum(cls, batches: Iterable[Scores], num_documents: int, range_starts: Sequence[int] = (0,)) -> Self:
        """Sum the scores of all batches by document and range."""
        shape = num_documents, len(range_starts)
        counts, losses = np.zeros(shape, np.int64), np.zeros(shape)
        for scores in batches:
            ranges = np.searchsorted(range_starts, scores.positions, side="right") - 1
            cells = scores.documents * len(range_starts) + ranges
            losses += np.bincount(cells, scores.losses, counts.size).reshape(shape)
            counts += np.bincount(cells, minlength=counts.size).reshape(shape)
        return cls(counts, losses, tuple(range_starts))

    @classmethod
    def read(cls, num_tokens: Sequence[Any], total_nll: Sequence[Any], range_starts: Sequence[int] = (0,)) -> Self:
        """Make one from the lists of a result, whose entries per document are numbers, or lists with one per range."""
        counts, losses = np.array(num_tokens, np.int64), np.array(total_nll, np.float64)
        shape = (len(counts), len(range_starts))
        return cls(counts.reshape(shape), losses.reshape(shape), tuple(range_starts))

    def select(self, column: int | None) -> "DocumentLosses":
        """Select one range, or sum all ranges if None; [D, 1]."""
        chosen = slice(None) if column is None else slice(column, column + 1)
        counts, losses = (part[:, chosen].sum(1, keepdims=True) for part in self[:2])
        return DocumentLosses(counts, losses, (self.range_starts[column or 0],))


class Comparison(NamedTuple):
    """One model's loss minus another's in nats per token; below 0, the first model is better.

    Attributes:
        nats: the mean over seeds.
        low: lower end of its interval; None if there are too few seeds or documents.
        high: upper end.
        smallest_visible: the smallest true difference of either sign that would be detected with probability POWER.
        num_seeds: seeds with which both were trained.
        num_documents: documents with at least one token.
        by_seed: the difference for each seed.
    """

    nats: float
    low: float | None
    high: float | None
    smallest_visible: float | None
    num_seeds: int
    num_documents: int
    by_seed: dict[Any, float]

    @property
    def estimate(self) -> Estimate:
        """The difference and its interval, in nats per token."""
        return Estimate(self.nats, self.low, self.high)

    @property
    def relative(self) -> Estimate:
        """The ratio of the perplexities − 1, and its interval."""
        with np.errstate(over="ignore"):
            ends = (None if nats is None else float(np.expm1(nats)) for nats in (self.low, self.high))
            return Estimate(float(np.expm1(self.nats)), *ends)

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def describe(self, *, is_share: bool = False) -> str:
        """Describe the difference and its interval and, unless it is clear, the smallest visible effect.

        The unit is percent of the perplexity; with `is_share`, for a difference of proportions, percentage points.
        """
        unit, convert = ("points", float) if is_share else ("%", math.expm1)
        text = f"{100 * convert(self.nats):+.1f} {unit}"
        if self.low is not None and self.high is not None:
            text += f" [{100 * convert(self.low):+.1f}, {100 * convert(self.high):+.1f}]"
        if self.smallest_visible is not None and not self.is_clear:
            text += f", {100 * convert(self.smallest_visible):.1f} {unit} visible"
        return text


def draw_resamples(num_items: int, num_resamples: int, seed: int) -> Array:
    """Draw bootstrap resamples: how often each item occurs, [num_resamples, num_items]; each row sums to num_items.

    Using one table for all figures of a measurement pairs them: each statistic is a function of sums `table @ values`,
    and differences are taken within a resample.
    """
    generator = np.random.default_rng(seed)
    chances = np.full(num_items, 1 / num_items)
    return generator.multinomial(num_items, chances, size=num_resamples).astype(np.float64)


def find_interval(statistics: Array, confidence: float) -> tuple[float, float]:
    """Return the percentile interval of a statistic's resamples, [num_resamples], ignoring NaN (empty groups).

    Both ends are NaN if all resamples are.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    known = statistics[~np.isnan(statistics)]
    if not len(known):
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    # "nearest", because interpolating between infinite statistics (perplexities that overflow) would give NaN.
    low, high = np.quantile(known, [tail, 1 - tail], method="nearest")
    return float(low), float(high)


def find_clustered_error(total_nll: NDArray[Any], num_tokens: NDArray[Any]) -> float | None:
    """Return the standard error of the mean loss per token: √(D/(D−1) · Σ_d (L_d − n_d L̄)²) / Σ_d n_d.

    It is clustered by document: L_d and n_d, [D], are each document's total loss and tokens. None for fewer than
    MIN_DOCUMENTS documents. Source: Cochran, Sampling Techniques, 1977, section 6.3 (ratio estimates).
    """
    is_read = num_tokens > 0
    count = int(is_read.sum())
    if count < MIN_DOCUMENTS:
        return None
    mean = total_nll.sum() / num_tokens.sum()
    residuals = (total_nll - num_tokens * mean)[is_read]
    return float(math.sqrt(count / (count - 1) * float(residuals @ residuals)) / num_tokens.sum())


def estimate_perplexity(losses: DocumentLosses, confidence: float = 0.95) -> Estimate:
    """Return exp(mean loss per token) over all ranges, with Student's t interval over documents.

    The interval is that of the mean loss, exponentiated; its standard error is `find_clustered_error`.
    """
    counts, total = (part[:, 0] for part in losses.select(None)[:2])
    loss, error = float(total.sum() / counts.sum()), find_clustered_error(total, counts)
    if error is None:
        return Estimate(exp_or_inf(loss), None, None)
    half = _find_t_quantile(confidence, int((counts > 0).sum()) - 1) * error
    return Estimate(exp_or_inf(loss), exp_or_inf(loss - half), exp_or_inf(loss + half))


def compare_models(
    one: Mapping[Any, DocumentLosses], other: Mapping[Any, DocumentLosses], confidence: float = 0.95
) -> Comparison | None:
    """Compare one model with another, paired by seed and document.

    Let d_s be the difference for seed s, and δ_j that for document j averaged over seeds. Seeds and documents are both
    samples, so the variance of the mean is var(d)/S plus the clustered variance of δ (`find_clustered_error`). This
    counts the interaction of seeds and documents twice, which makes the interval rather too wide. The interval is
    Student's t with Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946). With one seed it covers other
    documents only; with two there is none.

    Args:
        one: losses by seed; their ranges are summed.
        other: the same for the model to compare with.
        confidence: of the interval.

    Returns:
        None if they have no seed in common, or were measured on different tokens (their split was not fixed).
    """
    seeds = [seed for seed in one if seed in other]
    pairs = [(one[seed].select(None), other[seed].select(None)) for seed in seeds]
    counts = pairs[0][0].num_tokens[:, 0] if pairs else np.zeros(0)
    if not counts.sum() or any(not np.array_equal(part.num_tokens[:, 0], counts) for pair in pairs for part in pair):
        return None
    losses = np.array([(a.total_nll - b.total_nll)[:, 0] for a, b in pairs])  # [S, D]
    by_seed = losses.sum(1) / counts.sum()
    error = find_clustered_error(losses.mean(0), counts)
    num_documents = int((counts > 0).sum())
    each = dict(zip(seeds, by_seed.tolist(), strict=True))
    found = Comparison(float(by_seed.mean()), None, None, None, len(seeds), num_documents, each)
    if error is None or 1 < len(seeds) < MIN_SEEDS:
        return found
    parts = [(error**2, num_documents - 1)]
    if len(seeds) > 1:
        parts.append((float(by_seed.var(ddof=1)) / len(seeds), len(seeds) - 1))
    variance = sum(part for part, _ in parts)
    if not math.isfinite(variance):  # a model diverged
        return found
    freedom = int(variance**2 / sum(part**2 / free for part, free in parts)) if variance else num_documents - 1
    spread, quantile = math.sqrt(variance), _find_t_quantile(confidence, freedom)
    half, visible = quantile * spread, (quantile + _find_t_quantile(2 * POWER - 1, freedom)) * spread
    return found._replace(low=found.nats - half, high=found.nats + half, smallest_visible=visible)


def find_share_interval(num_hits: int, num_trials: int, confidence: float) -> tuple[float, float]:
    """Return Wilson's interval for a proportion: (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n).

    Unlike a bootstrap interval, it has a width even if all trials agree. Source: Wilson, JASA 22, 1927.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, extra = num_hits / num_trials, z * z / num_trials
    middle = share + extra / 2
    half = z * math.sqrt(share * (1 - share) / num_trials + extra / (4 * num_trials))
    return max(0.0, (middle - half) / (1 + extra)), min(1.0, (middle + half) / (1 + extra))


def find_t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | tuple[None, None]:
    """Return Student's t interval of a mean, e.g. over seeds; (None, None) for fewer than MIN_SEEDS values.

    mean ± t · s / √n, with P(|T| ≤ t) = confidence for n − 1 degrees of freedom.
    """
    if len(values) < MIN_SEEDS:
        return None, None
    mean = float(np.mean(values))
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = _find_t_quantile(confidence, len(values) - 1) * spread
    return mean - half, mean + half


def _find_t_quantile(confidence: float, freedom: int) -> float:
    """Find t with P(|T| ≤ t) = confidence, by bisection."""
    low, high = 0.0, 1.0
    while _student_within(high, freedom) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, freedom) < confidence else (low, middle)
    return (low + high) / 2


def _student_within(t: float, freedom: int) -> float:
    """Return P(|T| ≤ t) for Student's t distribution with an integer number of degrees of freedom.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 1964, equations 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = freedom % 2
    term = cosine if is_odd else 1.0
    total = term if freedom > 1 else 0.0
    for power in range(2 + is_odd, freedom - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total
