"""What the pictures share: curves out of logs, and the look of axes."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from new_llm.report.results import get_entries, get_finite
from new_llm.report.svg import INK, MUTED, series_marker
from new_llm.report.tables import format_short

LOG_FROM_RATIO = 8.0  # an axis whose values differ by more is logarithmic
SMOOTHING_SHARE = 0.08  # the training loss is averaged over about this share of its points
MAX_POINTS = 600  # points drawn of one curve; more cannot be seen
MAX_VALUE = 1e12  # a picture leaves out what is beyond: the model broke, and the table says so
MAX_TOKENS = 1e18
MAX_NAME = 16  # characters of a name in a picture
DASHES = (4, 3)
PALE = 0.4  # opacity of what stands behind or second

Points = list[tuple[float, float]]


def get_perplexity(entry: Any, *keys: str) -> float | None:
    """The perplexity at the keys where it is one, at least 1, and can be drawn."""
    return _get_between(1.0, MAX_VALUE, entry, *keys)


def get_share(entry: Any, *keys: str) -> float | None:
    """The number from 0 to 1 at the keys."""
    return _get_between(0.0, 1.0, entry, *keys)


def _get_between(low: float, high: float, entry: Any, *keys: str) -> float | None:
    value = get_finite(entry, *keys)
    return value if value is not None and low <= value <= high else None


def read_curve(entry: dict[str, Any], log: str, key: str) -> Points:
    """(tokens, value) of a log's lines that have both; a perplexity that can't be drawn is left out."""
    lines = get_entries(entry, "training", log)
    least = 1.0 if "perplexity" in key else -MAX_VALUE
    points = [
        (_get_between(0.0, MAX_TOKENS, line, "tokens"), _get_between(least, MAX_VALUE, line, key)) for line in lines
    ]
    return [(x, y) for x, y in points if x is not None and y is not None]


def smooth(points: Points) -> Points:
    """A centred running average over `SMOOTHING_SHARE` of the points; the window narrows at both ends."""
    reach = round(SMOOTHING_SHARE * len(points) / 2)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    smoothed: Points = []
    for i, (x, _) in enumerate(points):
        side = min(reach, i, len(points) - 1 - i)  # the same on both sides, so that a slope is not bent
        smoothed.append((x, (sums[i + side + 1] - sums[i - side]) / (2 * side + 1)))
    return smoothed


def thin(points: Points) -> Points:
    """At most about `MAX_POINTS` of the points, evenly, the last one always."""
    step = math.ceil(len(points) / MAX_POINTS) or 1
    return points[:-1][::step] + points[-1:]


def split(points: Points) -> tuple[list[float], list[float]]:
    """The points' x and y, as matplotlib takes them."""
    return [x for x, _ in points], [y for _, y in points]


def mark_some(index: int, num_points: int) -> dict[str, Any]:
    """Keywords for a few markers along a curve, at other places for each model."""
    every = max(1, num_points // 6)
    first = min(max(0, num_points - 1), index * every // 4)
    return {
        "marker": series_marker(index),
        "markersize": 5,
        "markeredgewidth": 0,
        "markevery": (first, every),
    }


def shorten(name: str) -> str:
    """A name that fits beside an axis."""
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def format_tick(value: float, _: Any = None) -> str:
    """A tick's number: 0.5, 90, 1.2M."""
    if abs(value) < 1000:
        return f"{value:g}"
    short = format_short(value)
    digits = short.rstrip("kMBT")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + short[len(digits) :]


def set_rows(axes: Axes, names: list[str]) -> None:
    """One named row each, the first on top."""
    axes.set_yticks(range(len(names)), [shorten(name) for name in names])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False)
    axes.grid(axis="x")


def set_scale(axes: Axes, which: str, values: list[float], floor: float = 0.9, force_log: bool = False) -> None:
    """A linear axis, or a logarithmic one where the values differ by more than `LOG_FROM_RATIO`."""
    axis = getattr(axes, f"{which}axis")
    if force_log or (values and max(values) / min(values) > LOG_FROM_RATIO):
        getattr(axes, f"set_{which}scale")("log")
        low, high = min(values) * floor, max(values) * 1.12
        set_log_ticks(axis, low, high)
        getattr(axes, f"set_{which}lim")(low, high)
    else:
        axis.set_major_formatter(FuncFormatter(format_tick))
        axis.set_major_locator(MaxNLocator(6))


def set_log_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks at 1, 2 and 5 of each decade where they fit, else at the decades."""
    decades = math.log10(high / low)
    if decades < 3.5:
        subs = (1, 2, 5) if decades > 0.8 else (1, 1.5, 2, 3, 4, 5, 6, 8)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [sub * 10.0**power for power in powers for sub in subs]
        axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    else:
        axis.set_major_locator(LogLocator(numticks=7))
    axis.set_minor_locator(FixedLocator([]))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(format_tick))


def label_axes(axes: Axes, x: str, y: str, count_x: bool = True) -> None:
    """Names of the axes; the vertical one's stands above it, level, where it is read first."""
    axes.set_xlabel(x)
    axes.set_title(y, loc="left", color=MUTED, fontsize="medium", pad=8)
    if count_x:
        axes.xaxis.set_major_formatter(FuncFormatter(format_tick))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
