"""Formatting numbers for readers."""

import math
from typing import Any

MISSING = "—"
WAYS = {"carried": "memory carried", "reset": "memory reset", "foreign": "another document's memory"}
"""Readers' names for the three ways to read a document."""


def format_number(value: float | None, digits: int = 4) -> str:
    """Format a number with `digits` significant digits and thousands separators: 70,430; None becomes a dash."""
    special = _format_special(value)
    if value is None or special is not None:
        return special or MISSING
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude >= 9 or magnitude < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def format_count(value: float | None) -> str:
    """Format a count in full: 70,426,624."""
    return _format_special(value) or f"{value:,.0f}"


def format_plural(count: int, thing: str) -> str:
    """Format a count with its noun: 1 document, 2 documents, 3 batches."""
    return f"{count:,} {thing}{'' if count == 1 else 'es' if thing.endswith(('ch', 's')) else 's'}"


def format_short(value: float | None) -> str:
    """Format a count in thousands, millions or billions: 70.4M."""
    return _format_special(value) or _scale(value or 0.0, ("", "k", "M", "B", "T"), "")


def format_bytes(value: float | None) -> str:
    """Format bytes in decimal units: 1.05 MB."""
    return _format_special(value) or _scale(value or 0.0, ("B", "kB", "MB", "GB", "TB"), " ")


def format_percent(value: float | None) -> str:
    """Format a fraction as a percentage: 4.2%."""
    return _format_special(value) or f"{100 * (value or 0.0):.1f}%"


def format_size(value: float, low: float | None, high: float | None) -> str:
    """Format the magnitude of a relative difference, without its sign, and its interval if known: 3.1 % [2.0, 4.2]."""
    if low is None or high is None:
        return f"{100 * abs(value):.1f} %"
    ends = sorted((-100 * low, -100 * high) if value < 0 else (100 * low, 100 * high))
    return f"{100 * abs(value):.1f} % [{ends[0]:.1f}, {ends[1]:.1f}]"


def format_seconds(value: float | None) -> str:
    """Format a duration: 42 s, 3 min 05 s, 2 h 10 min."""
    special = _format_special(value)
    if value is None or special is not None:
        return special or MISSING
    seconds = round(value)
    if value < 10:
        return f"{value:.1f} s"
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600:,} h {seconds % 3600 // 60:02d} min"


def format_with_error(value: float | None, error: float | None) -> str:
    """Format a value ± its standard error, rounded to two significant digits of the error: 83.93 ± 0.50."""
    if error is None or not 0 < error < math.inf or value is None or not math.isfinite(value):
        return format_number(value)
    decimals = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}"


def _format_special(value: float | None) -> str | None:
    if value is None:
        return MISSING
    if math.isnan(value):
        return "NaN"
    return ("∞" if value > 0 else "−∞") if math.isinf(value) else None


def _scale(value: float, units: tuple[str, ...], space: str) -> str:
    power = 0
    while abs(value) >= 1000 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    number = f"{value:.0f}" if power == 0 else format_number(value, 3)
    return f"{number}{space if units[power] else ''}{units[power]}"


def name_range(entry: dict[str, Any]) -> str:
    """Format a range of distances in tokens, in multiples of 1024 where they are exact: 2k–4k, 128k+."""

    def short(tokens: int) -> str:
        return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else f"{tokens}"

    return f"{short(entry['start'])}+" if entry["end"] is None else f"{short(entry['start'])}–{short(entry['end'])}"
