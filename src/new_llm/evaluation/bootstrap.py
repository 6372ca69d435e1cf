"""Percentile bootstrap over items that were drawn independently: documents, pairs, trials."""

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
