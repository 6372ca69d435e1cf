"""Charts of the reversal curse."""

from collections.abc import Callable, Sequence
from typing import Any

from new_llm.formats import format_number, format_percent
from new_llm.report.bar_chart import Bar, BarRow, draw_bars
from new_llm.report.points import get_perplexity, get_share
from new_llm.report.results import compute_mean, get_value
from new_llm.report.series import Series
from new_llm.report.svg import Chart

DIRECTIONS = ("forward", "backward")
SIGNS = (("solid", "forward"), ("pale", "backward"))


def plot_reversal_perplexity(series: Sequence[Series]) -> Chart | None:
    """Perplexity of the sentences, forward against backward, a pair of bars a model."""
    rows = read_rows(series, "perplexity", get_perplexity)
    if not rows:
        return None
    results = series[0].members[0].run.results
    is_trained = get_value(results, "config", "data", "reversal_pairs") is not False
    trained = f"Training held {'the forward sentences only' if is_trained else 'neither direction'}."
    alt = f"Perplexity of the sentences. {say_rows(rows, _say_perplexity)}"
    # On a logarithmic axis bars grow from perplexity 1, which is certainty.
    view = draw_bars(rows, _say_perplexity, "perplexity", alt, base=1.0)
    return Chart(
        "reversal-perplexity",
        "Perplexity of the facts",
        (view,),
        f"{trained} The further backward exceeds forward, the stronger the reversal curse."
        + describe_lines(series, rows),
        tuple(row.series for row in rows),
        SIGNS,
    )


def plot_reversal_accuracy(series: Sequence[Series]) -> Chart | None:
    """Share of right answers that rank first, forward against backward, a pair of bars a model."""
    rows = read_rows(series, "accuracy", get_share)
    if not rows:
        return None
    shares = [
        get_share(member.entry, "evaluation", "reversal", "chance_accuracy") for one in series for member in one.members
    ]
    chance = next((share for share in shares if share is not None), None)
    alt = f"Share of facts whose right answer ranks first. {say_rows(rows, format_percent)}"
    view = draw_bars(rows, format_percent, "share of facts", alt, level=chance, ticks=lambda x: f"{100 * x:.3g}%")
    return Chart(
        "reversal-accuracy",
        "Right answer ranked first",
        (view,),
        "Share of facts whose right answer is likelier than every other answer of its relation."
        + describe_lines(series, rows),
        tuple(row.series for row in rows),
        (*SIGNS, *([("dash", f"chance, {format_percent(chance)}")] if chance is not None else [])),
    )


def read_rows(series: Sequence[Series], measure: str, get: Callable[..., float | None]) -> list[BarRow]:
    """The models that have a value in either direction."""
    rows: list[BarRow] = []
    for one in series:
        bars: list[Bar] = []
        for direction in DIRECTIONS:
            key = f"{direction}_{measure}"
            entries = [get_value(member.entry, "evaluation", "reversal") for member in one.members]
            values = [value for entry in entries if (value := get(entry, key)) is not None]
            if values:
                ends = _read_interval(entries[0], key, get) if len(values) == 1 else (min(values), max(values))
                bars.append(Bar(compute_mean(values), direction, ends, is_pale=direction == "backward"))
        if bars:
            rows.append(BarRow(one.index, one.name, tuple(bars)))
    return rows


def _read_interval(reversal: Any, key: str, get: Callable[..., float | None]) -> tuple[float, float] | None:
    """Both ends of a figure's interval; None where one is missing."""
    found = get_value(reversal, "intervals", key)
    if not isinstance(found, list) or len(found) != 2:
        return None
    low, high = (get({"end": end}, "end") for end in found)
    return None if low is None or high is None else (low, high)


def describe_lines(series: Sequence[Series], rows: Sequence[BarRow]) -> str:
    """What the thin lines are, where there are some."""
    if all(bar.interval is None for row in rows for bar in row.bars):
        return ""
    if any(len(one.members) > 1 for one in series):
        return " Thin lines reach from the lowest to the highest seed; of one seed, they are bootstrap intervals."
    return " Thin lines are bootstrap intervals over facts."


def say_rows(rows: Sequence[BarRow], words: Callable[[float | None], str]) -> str:
    """The same in words."""
    return " ".join(f"{row.name}: {', '.join(f'{bar.what} {words(bar.value)}' for bar in row.bars)}." for row in rows)


def _say_perplexity(value: float | None) -> str:
    return format_number(value, 3)
