"""From values to places in a picture: linear and logarithmic scales with ticks that read well."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from new_llm.formats import format_short

LOG_FROM_RATIO = 8.0  # an axis whose values differ by more is logarithmic
NUM_TICKS = 5
NICE_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
ROOM = 0.06  # share of a linear axis left free beyond the values


@dataclass(frozen=True)
class Scale:
    """Maps low..high to start..end; values beyond are put at the ends."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()

    def __call__(self, value: float) -> float:
        """The place of a value."""
        low, high, value = (
            math.log(v) if self.is_log else v for v in (self.low, self.high, min(max(value, self.low), self.high))
        )
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def to_list(self) -> list[float]:
        """start, end, low, high, is_log, for the page's script."""
        return [self.start, self.end, float(f"{self.low:.6g}"), float(f"{self.high:.6g}"), int(self.is_log)]


def make_scale(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    log: bool | None = False,
    low: float | None = None,
    high: float | None = None,
    words: Callable[[float], str] | None = None,
) -> Scale:
    """A scale that holds all values.

    Args:
        values: finite; positive where the scale may be logarithmic.
        start: where the least value goes.
        end: where the greatest goes.
        log: whether it is logarithmic; None: where the values differ by more than `LOG_FROM_RATIO`.
        low: the scale's own least value; None: just below the values.
        high: likewise.
        words: how a tick reads; None: short.
    """
    known = list(values) or [0.0, 1.0]
    least, most = min(known), max(known)
    if log is None:
        log = least > 0 and most / least > LOG_FROM_RATIO
    if log:
        lowest = low if low is not None else least / 1.15
        highest = high if high is not None else max(most * 1.15, lowest * 1.5)
        ticks = list_log_ticks(lowest, highest)
    else:
        span = (most - least) or abs(most) * 0.2 or 1.0
        lowest = low if low is not None else least - ROOM * span
        highest = high if high is not None else most + ROOM * span
        if not highest > lowest:
            highest = lowest + (abs(lowest) or 1.0)
        ticks = list_linear_ticks(lowest, highest)
    say = words or format_tick
    return Scale(lowest, highest, start, end, bool(log), tuple((tick, say(tick)) for tick in ticks))


def list_linear_ticks(low: float, high: float) -> list[float]:
    """About `NUM_TICKS` round numbers in low..high."""
    rough = (high - low) / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(nice * power for nice in NICE_STEPS if nice * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    ticks = [index * step for index in range(first, first + 2 * NUM_TICKS + 2)]
    return [tick for tick in ticks if tick <= high + 1e-9 * step]


def list_log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade where they fit, else decades; finer within less than a decade."""
    decades = math.log10(high / low)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if decades >= 2.6:
        every = math.ceil(len(powers) / (NUM_TICKS + 1))
        ticks = [10.0**power for power in powers if power % every == 0]
    elif decades > 0.8:
        ticks = [sub * 10.0**power for power in powers for sub in (1, 2, 5)]
    else:
        return [tick for tick in list_linear_ticks(low, high) if tick > 0]
    return [tick for tick in ticks if low <= tick <= high]


def format_tick(value: float) -> str:
    """A tick's number: 0.5, 90, 1.2M."""
    if abs(value) < 1000:
        return f"{value:.6g}".replace("-", "−")
    short = format_short(value)
    digits = short.rstrip("kMBT")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + short[len(digits) :]


def format_power(value: float) -> str:
    """A large number as researchers write compute: 2.5e12."""
    if value == 0:
        return "0"
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def thin_labels(labels: Sequence[str], room: float, letter: float = 10.5) -> list[str]:
    """The labels side by side where they fit the room, else every second, third ... of them."""
    every = 1
    while sum(len(label) + 1 for label in labels[::every]) * letter > room and every < len(labels):
        every += 1
    return [label if index % every == 0 else "" for index, label in enumerate(labels)]
