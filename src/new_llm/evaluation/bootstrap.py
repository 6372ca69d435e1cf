"""Confidence intervals: a bootstrap over documents, pairs or trials, and Student's t over seeds."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Interval(NamedTuple):
    """A confidence interval; both ends are NaN where there is no item to draw."""

    low: float
    high: float


def draw_resamples(num_items: int, num_resamples: int, seed: int) -> NDArray[np.float64]:
    """How often each item is drawn in each resample, [num_resamples, num_items]; each row sums to num_items.

    One table for all figures of a measurement pairs them: a statistic of a resample is a function of the rows' sums
    (`table @ values`), and the difference of two statistics is taken within a resample.

    Raises:
        ValueError: a number that is not positive.
    """
    if num_items < 1 or num_resamples < 1:
        raise ValueError(f"{num_resamples} resamples of {num_items} items: both must be positive")
    generator = np.random.default_rng(seed)
    chances = np.full(num_items, 1 / num_items)
    return generator.multinomial(num_items, chances, size=num_resamples).astype(np.float64)


def find_interval(statistics: NDArray[np.float64], confidence: float) -> Interval:
    """The central share `confidence` of a statistic's resamples, [num_resamples]; NaN ones (empty groups) are left out.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (the percentile interval).

    Raises:
        ValueError: not 0 < confidence < 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence} is not between 0 and 1")
    known = statistics[~np.isnan(statistics)]
    if not len(known):
        return Interval(float("nan"), float("nan"))
    tail = (1 - confidence) / 2
    # Of infinite statistics (a perplexity that overflows) an interpolated quantile would be NaN.
    low, high = np.quantile(known, [tail, 1 - tail], method="nearest")
    return Interval(float(low), float(high))


def find_t_interval(values: Sequence[float], confidence: float) -> tuple[float, float] | tuple[None, None]:
    """Student's t interval of a mean, for the few seeds of a study; None, None for fewer than two values.

    mean ± t · s / √n, with P(|T| ≤ t) = confidence for n − 1 degrees of freedom.

    Raises:
        ValueError: not 0 < confidence < 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence} is not between 0 and 1")
    if len(values) < 2:
        return None, None
    mean = float(np.mean(values))
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = _find_t_quantile(confidence, len(values) - 1) * spread
    return mean - half, mean + half


def _find_t_quantile(confidence: float, freedom: int) -> float:
    """The t for which P(|T| ≤ t) is `confidence`, by bisection."""
    low, high = 0.0, 1.0
    while _student_within(high, freedom) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, freedom) < confidence else (low, middle)
    return (low + high) / 2


def _student_within(t: float, freedom: int) -> float:
    """P(|T| ≤ t) of Student's distribution with whole degrees of freedom.

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
