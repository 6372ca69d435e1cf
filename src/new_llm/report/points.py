"""Numbers for charts: those that an axis can hold, and the mean of several seeds with its band."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from new_llm.report.results import compute_mean, get_finite

SMOOTHING_SHARE = 0.08  # the training loss is averaged over about this share of its points
MAX_POINTS = 240  # points drawn of one curve; more cannot be seen
MAX_VALUE = 1e12  # a picture leaves out what is beyond: the model broke, and the table says so
MAX_X = 1e40


class Point(NamedTuple):
    """A value with the ends of its interval: over seeds, or over what was measured; None: it has none."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


def get_between(low: float, high: float, entry: Any, *keys: str) -> float | None:
    """The number at the keys where it is in low..high."""
    value = get_finite(entry, *keys)
    return value if value is not None and low <= value <= high else None


def get_perplexity(entry: Any, *keys: str) -> float | None:
    """The perplexity at the keys where it is one, at least 1, and can be drawn."""
    return get_between(1.0, MAX_VALUE, entry, *keys)


def get_share(entry: Any, *keys: str) -> float | None:
    """The number from 0 to 1 at the keys."""
    return get_between(0.0, 1.0, entry, *keys)


def average(x: float, values: Sequence[float]) -> Point:
    """The mean of some seeds, from the lowest to the highest of them; of one its value alone."""
    mean = compute_mean(values)
    return Point(x, mean, min(values), max(values)) if len(values) > 1 else Point(x, mean)


def smooth(points: list[Point]) -> list[Point]:
    """A centred running average over `SMOOTHING_SHARE` of the points; the window narrows at both ends."""
    reach = round(SMOOTHING_SHARE * len(points) / 2)

    def run(values: list[float]) -> list[float]:
        sums = [0.0]
        for value in values:
            sums.append(sums[-1] + value)
        found: list[float] = []
        for i in range(len(values)):
            side = min(reach, i, len(values) - 1 - i)  # the same on both sides, so that a slope is not bent
            found.append((sums[i + side + 1] - sums[i - side]) / (2 * side + 1))
        return found

    ys = run([point.y for point in points])
    if any(point.low is None or point.high is None for point in points):
        return [Point(point.x, y) for point, y in zip(points, ys, strict=True)]
    lows, highs = (run([getattr(point, end) for point in points]) for end in ("low", "high"))
    return [Point(p.x, y, low, high) for p, y, low, high in zip(points, ys, lows, highs, strict=True)]


def thin(points: list[Point]) -> list[Point]:
    """At most about `MAX_POINTS` of the points, evenly, the last one always."""
    step = math.ceil(len(points) / MAX_POINTS) or 1
    return points[:-1][::step] + points[-1:]


def shorten(name: str, most: int) -> str:
    """A name that fits."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def round_number(value: float) -> float:
    """A number as the page's script gets it: five digits."""
    return float(f"{value:.5g}")
