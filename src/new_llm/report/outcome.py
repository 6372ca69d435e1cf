"""The sentence that sums a report up: which model won, by how much, and how far to trust it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from new_llm.report.points import MAX_VALUE
from new_llm.report.results import compute_mean, compute_spread, get_finite, get_value
from new_llm.report.runs import Run
from new_llm.report.series import Series, group_series

BASELINE = "pythia"  # what every other model is compared with
CONFIDENCE = 0.95
SAME_PERCENT = 0.05
# Where it stands what models were measured on, and what to say where it differs.
TOKENIZERS = "they were measured with different tokenizers"
SOURCE = (("data", "source_fingerprint"), "they were measured on different texts")
SPLIT = (
    (("data", "tokenizer", "fingerprint"), TOKENIZERS),
    (("data", "split_fingerprint"), "they were measured on different validation documents"),
)
WINDOW = ("num_tokens", "context", "stride")


@dataclass(frozen=True)
class Outcome:
    """What the results say, in words."""

    headline: str
    caveats: list[str]
    is_comparable: bool = True
    """Whether the models were measured on the same text."""


@dataclass(frozen=True)
class _Score:
    series: Series
    mean: float
    values: list[float]
    error: float | None


def describe_outcome(results: dict[str, Any]) -> Outcome:
    """`describe_series` of one run's results."""
    runs = [Run(results)]
    return describe_series(group_series(runs), runs)


def describe_series(series: Sequence[Series], runs: Sequence[Run]) -> Outcome:
    """Say which model has the lowest validation perplexity, by how much, and how far to trust it."""
    for protocol in ("sliding", "streaming"):
        scores = [score for one in series if (score := _score(one, protocol)) is not None]
        if scores:
            break
    else:
        return Outcome(f"No model has been evaluated in {'this run' if len(runs) < 2 else 'these runs'}.", [])
    scores.sort(key=lambda score: score.mean)
    best = scores[0]
    kind = "validation perplexity" if protocol == "sliding" else "streaming validation perplexity"
    missing = [one.name for one in series if one not in [score.series for score in scores]]
    caveats = [f"Not evaluated: {', '.join(missing)}."] if missing else []
    unlike = find_mismatch([score.series for score in scores], protocol)
    if unlike:
        headline = f"These models can't be ranked by perplexity: {unlike}."
        if unlike == TOKENIZERS:
            caveats.append("Bits per byte do not depend on the tokenizer, where the text is the same.")
        return Outcome(headline, caveats, is_comparable=False)
    unigram = mean_unigram(runs)
    if len(scores) == 1:
        floor = f", {100 * best.mean / unigram:.1f}% of the unigram's {say(unigram)}" if unigram else ""
        over = f", the mean of {len(best.values)} seeds" if len(best.values) > 1 else ""
        headline = f"{best.series.name} reaches a {kind} of {say(best.mean)}{over}{floor}."
        caveats.append(_describe_one(best))
    else:
        second = scores[1]
        percent = 100 * (second.mean - best.mean) / second.mean
        if percent < SAME_PERCENT:
            headline = (
                f"{best.series.name} and {second.series.name} have the same {kind}, {say(best.mean)}, to within "
                f"{SAME_PERCENT}%."
            )
        else:
            others = f"{percent:.1f}% below {second.series.name} ({say(second.mean)})"
            for score in scores[2:]:
                if score.series.name == BASELINE:
                    percent = 100 * (score.mean - best.mean) / score.mean
                    others += f" and {percent:.1f}% below {BASELINE} ({say(score.mean)})"
            headline = f"{best.series.name} has the lowest {kind}: {say(best.mean)}, {others}."
        caveats.append(describe_spread(best.series, second.series, protocol))
        seeds = sorted({len(score.values) for score in scores})
        if seeds[-1] > 1:
            many = f"{seeds[0]} to {seeds[-1]}" if seeds[0] < seeds[-1] else f"{seeds[0]}"
            caveats.append(f"Figures are means over {many} seeds a model.")
    if unigram and best.mean >= unigram:
        floor = f"No model beats the unigram perplexity of {say(unigram)}"
        caveats.insert(0, f"{floor}: none has learned more than how frequent tokens are.")
    return Outcome(headline, caveats)


def _score(series: Series, protocol: str) -> _Score | None:
    values = series.collect("evaluation", protocol, "perplexity")
    if not values:
        return None
    errors = series.collect("evaluation", protocol, "standard_error")
    return _Score(series, compute_mean(values), values, errors[0] if len(values) == len(errors) == 1 else None)


def _describe_one(score: _Score) -> str:
    if len(score.values) == 1:
        return "One model and one seed: nothing to compare with, and the spread between seeds is unmeasured."
    spread = compute_spread(score.values)
    return f"One model: nothing to compare with. Its seeds differ by a standard deviation of {say(spread)}."


def mean_unigram(runs: Sequence[Run]) -> float | None:
    """The unigram's perplexity, the mean over the runs that know it."""
    found = [get_finite(run.results, "unigram_perplexity") for run in runs]
    known = [value for value in found if value is not None]
    return compute_mean(known) if known else None


def describe_spread(best: Series, second: Series, protocol: str) -> str:
    """How the gap between two models compares with the spread between seeds; of one seed, with chance in the tokens."""
    keys = ("evaluation", protocol, "perplexity")
    one, two = best.collect(*keys), second.collect(*keys)
    gap = compute_mean(two) - compute_mean(one)
    if len(one) == len(two) == 1:
        errors = [series.mean("evaluation", protocol, "standard_error") for series in (best, second)]
        return _describe_error(gap, errors)
    if len(one) == 1 or len(two) == 1:
        single = best.name if len(one) == 1 else second.name
        return f"{single} was trained with one seed, so whether the gap exceeds the spread between seeds can't be told."
    if max(*one, *two) > MAX_VALUE:
        return "A perplexity is too large to compare seeds."
    from new_llm.evaluation.bootstrap import find_t_interval  # torch comes with it: only where it is needed

    paired = [(first, second.by_seed(*keys).get(seed)) for seed, first in best.by_seed(*keys).items()]
    differences = [b - a for a, b in paired if b is not None]
    how = f"{CONFIDENCE:.0%} interval, Student's t"
    if len(differences) > 1:
        low, high = find_t_interval(differences, CONFIDENCE)
        how = f"{how}, {len(differences)} seeds in pairs"
        gap = compute_mean(differences)
    else:
        halves = []
        for values in (one, two):
            lower, upper = find_t_interval(values, CONFIDENCE)
            halves.append(((upper or 0.0) - (lower or 0.0)) / 2)
        low, high = gap - math.hypot(*halves), gap + math.hypot(*halves)
        how = f"{how}, {len(one)} and {len(two)} seeds, not in pairs"
    said = f"The gap is {say(gap)} [{say(low or 0.0)}, {say(high or 0.0)}] ({how})"
    if (low or 0.0) > 0:
        return f"{said}: it exceeds the spread between seeds."
    return f"{said}: it does not exceed the spread between seeds, so read it as a tie."


def _describe_error(gap: float, errors: Sequence[float | None]) -> str:
    unmeasured = (
        "Each model was trained with one seed, so the spread between seeds is unmeasured, and whether the gap exceeds "
        "it can't be told."
    )
    if any(not error for error in errors):
        return unmeasured
    error = math.hypot(*(error or 0.0 for error in errors))
    if gap < 2 * error:
        return f"The gap is under two standard errors of the measurement, so read it as a tie. {unmeasured}"
    return f"The gap is {gap / error:.1f} standard errors of the measurement. {unmeasured}"


def find_mismatch(series: Sequence[Series], protocol: str) -> str:
    """What the models were measured on that differs between them, in words; nothing: ''.

    A seed also chooses the split, so models are compared seed by seed, or by their source where no seed is in common.
    """
    first = series[0]
    for other in series[1:]:
        pairs = [(a, b) for a in first.members for b in other.members if a.seed == b.seed]
        for one, two in pairs or [(first.members[0], other.members[0])]:
            for path, words in (SOURCE, *SPLIT) if pairs else (SOURCE,):
                if get_value(one.run.results, *path) != get_value(two.run.results, *path):
                    return words
            for key in WINDOW if pairs else WINDOW[1:]:
                a, b = (get_finite(member.entry, "evaluation", protocol, key) for member in (one, two))
                if a != b:
                    return f"their {key.replace('num_tokens', 'number of scored tokens')} differs"
    return ""


def say(value: float) -> str:
    """A perplexity in a sentence."""
    return (f"{value:,.2f}" if abs(value) < 100 else f"{value:,.1f}").replace("-", "−")
