"""Figures with their intervals."""

import math
from statistics import NormalDist
from typing import NamedTuple

from new_llm.evaluation.bootstrap import Interval


class Estimate(NamedTuple):
    """A figure and its interval, whose ends are None where there are too few items for one."""

    value: float
    low: float | None
    high: float | None


def find_share_interval(num_hits: int, num_trials: int, confidence: float) -> Interval:
    """Wilson's interval of a share: (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n).

    Unlike the bootstrap's it has a width where all trials end alike. Source: Wilson, JASA 22, 1927.

    Raises:
        ValueError: no trials, or not 0 < confidence < 1.
    """
    if num_trials < 1 or not 0 <= num_hits <= num_trials or not 0 < confidence < 1:
        raise ValueError(f"{num_hits} hits of {num_trials} trials, confidence {confidence}: no interval")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, extra = num_hits / num_trials, z * z / num_trials
    middle = share + extra / 2
    half = z * math.sqrt(share * (1 - share) / num_trials + extra / (4 * num_trials))
    return Interval(max(0.0, (middle - half) / (1 + extra)), min(1.0, (middle + half) / (1 + extra)))
