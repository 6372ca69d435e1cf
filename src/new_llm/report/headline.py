"""The sentences that sum up a report: which model is best, by how much, and how far to trust this."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from new_llm.config.terminal import make_line
from new_llm.evaluation import MEASURES, Column, ask_measure
from new_llm.evaluation.scoring import exp_or_inf
from new_llm.evaluation.statistics import MIN_CLAIM_SEEDS, Comparison
from new_llm.formats import format_count, format_plural, format_size
from new_llm.report.results import (
    Place,
    Series,
    compare,
    compute_mean,
    describe,
    get_value,
    list_places,
    write_value,
)

SAME_SHARE = 0.0005
TOKENIZERS = "they were measured with different tokenizers"
# Where the results say on what models were measured, and the words to use if this differs.
SOURCE = (("data", "source_fingerprint"), "they were measured on different texts")
SPLIT = (
    (("data", "tokenizer", "fingerprint"), TOKENIZERS),
    (("data", "split_fingerprint"), "they were measured on different validation documents"),
)
SAME_PROTOCOL = ("num_tokens", "context", "stride")


@dataclass(frozen=True)
class Headline:
    """What the results show, in a sentence, and caveats to it.

    `is_comparable`: all models were measured on the same text.
    """

    text: str
    caveats: list[str]
    is_comparable: bool = True


@dataclass(frozen=True)
class Score:
    """A model's main figure, with a value per seed."""

    series: Series
    column: Column
    values: list[float]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return compute_mean(self.values)

    def __str__(self) -> str:
        return write_value(self.column, self.mean)


def describe_outcome(series: Sequence[Series]) -> Headline:
    """Say whether memory helps, if long documents were measured, which model is best, and how far to trust this."""
    ranking = describe_ranking(series)
    try:
        answer = describe_memory(series)
    except Exception:  # of results in an unknown form
        answer = ""
    return Headline(answer, [ranking.text, *ranking.caveats], ranking.is_comparable) if answer else ranking


def describe_memory(series: Sequence[Series]) -> str:
    """How much the best memory helps on long documents, compared with an empty one, a model without memory, and the
    latter with a cache. Empty if no model with memory was measured on long documents.
    """

    def find_results(measure: str, one: Series) -> dict[Any, dict[str, Any]]:
        """Results by seed, on the first text on which any model was measured."""
        place = next((place for place in list_places(series) if place[0] == measure), ("", ""))
        return one.find_results(place)

    found = {one.name: find_results("long", one) for one in series}
    measured = [one for one in series if found[one.name]]

    def get_mean(one: Series) -> float:
        results = found[one.name].values()
        return compute_mean([result["overall"]["perplexity"]["carried"]["value"] for result in results])

    def has_memory(one: Series) -> bool:
        return bool(get_value(one.members[0].entry, "memory_info", "total_bytes"))

    def get_context(one: Series) -> float | None:
        return one.members[0].entry.get("context_tokens")

    best = min((one for one in measured if has_memory(one)), key=get_mean, default=None)
    if best is None:
        return ""
    own = found[best.name]
    effects = {way: compare(own, own, ("long", "carried"), ("long", way)) for way in ("reset", "foreign")}
    if effects["reset"] is None:
        return ""
    text = f"On {format_plural(effects['reset'].num_documents, 'long held-out document')}, {best.name}'s memory "
    text += f"{_say_effect(effects['reset'])} against an empty one"
    if (foreign := effects["foreign"]) is not None:
        is_alike = (foreign.nats < 0) == (effects["reset"].nats < 0)
        text += f" and {f'by {_say_share(foreign)}' if is_alike else _say_effect(foreign)} against another document's"
    text += "."
    without = [one for one in measured if not has_memory(one)]
    same = [one for one in without if get_context(one) == get_context(best)]
    baseline = min(same or without, key=get_mean, default=None)
    if baseline is None:
        return text
    reads = "the same segments" if same else f"{format_count(get_context(baseline))} tokens at once"
    if (effect := compare(own, found[baseline.name], ("long", "carried"))) is not None:
        text += f" Its perplexity is {_say_difference(effect)} that of {baseline.name}, which reads {reads}."
    caches = [find_results("caches", one) for one in (best, baseline)]
    if all(caches):
        ways = [MEASURES["caches"].losses(result) for result in caches[1].values()]
        names = [cache["name"] for cache in next(iter(caches[1].values()))["caches"]]
        strongest = min(names, key=lambda name: sum(float(way[name].total_nll.sum()) for way in ways))
        effect = compare(caches[0], caches[1], ("caches", "bare"), ("caches", strongest))
        if effect is not None and strongest != "bare":
            stored = "states and of the text" if strongest == "+ all" else strongest.removeprefix("+ ")
            text += f" Against {baseline.name} with a cache of {stored}, which needs no training, "
            text += f"it is {_say_difference(effect)}."
    return text


def _say_share(effect: Comparison) -> str:
    said = format_size(*effect.relative)
    return said if effect.low is not None else f"{said} (no interval: too few documents or seeds)"


def _say_effect(effect: Comparison) -> str:
    return f"{'lowers' if effect.nats < 0 else 'raises'} perplexity by {_say_share(effect)}"


def _say_difference(effect: Comparison) -> str:
    return f"{_say_share(effect)} {'below' if effect.nats < 0 else 'above'}"


def describe_ranking(series: Sequence[Series]) -> Headline:
    """Say which model is best by the first figure of the summary that has a better direction."""
    place, scores = find_scores(series)
    if place is None:
        found = [(one.name, measured) for one in series for m in one.members for measured in m.measured.values()]
        sentences: list[str] = []
        for name, measured in found:
            if any(column.better for column in ask_measure(measured.measure, "columns", measured.result, [])):
                title = make_line(MEASURES[measured.measure].title)
                return Headline(f"No model has a finite figure for {title}.", [])
            if sentence := describe(measured.measure, measured.result):
                sentences.append(f"{name}: {sentence}.")
        return Headline(sentences[0] if sentences else "No model has been evaluated yet.", [])
    column = scores[0].column
    what = make_line(MEASURES[place[0]].title)
    scores.sort(key=lambda score: score.mean, reverse=column.better == "higher")
    missing = [one.name for one in series if one.name not in [score.series.name for score in scores]]
    caveats = [f"Not evaluated: {', '.join(missing)}."] if missing else []
    if unlike := find_mismatch(scores, place):
        bits = "Figures per byte do not depend on the tokenizer where the text is the same."
        caveats += [bits] if unlike == TOKENIZERS else []
        return Headline(f"These models can't be ranked by {what}: {unlike}.", caveats, is_comparable=False)
    best = scores[0]
    seeds = sorted({len(score.values) for score in scores})
    if seeds[-1] > 1:
        many = f"{seeds[0]} to {seeds[-1]}" if seeds[0] < seeds[-1] else f"{seeds[0]}"
        caveats.append(f"Figures are means over {many} seeds per model.")
    if len(scores) == 1:
        text = f"{best.series.name} reaches a {what} of {best}."
        return Headline(text, [*caveats, "There is only one model, and nothing to compare it with."])
    second, word = scores[1], "lowest" if column.better == "lower" else "highest"
    if abs(best.mean - second.mean) <= SAME_SHARE * abs(second.mean):
        text = f"{best.series.name} and {second.series.name} have the same {what}, {best}, to within 0.05%."
    else:
        others = [second, *(score for score in scores[2:] if score.series is series[0])]
        said = " and ".join(f"{say_share(best, other)} {other.series.name} ({other})" for other in others)
        text = f"{best.series.name} has the {word} {what}: {best}, {said}."
    return Headline(text, [describe_difference(best, second, place), *caveats])


def find_scores(series: Sequence[Series]) -> tuple[Place | None, list[Score]]:
    """The first measure with a column that has a better direction, and its finite values by model."""
    for place in list_places(series):
        scores = []
        for one in series:
            ranked = [
                next((column for column in ask_measure(place[0], "columns", result, []) if column.better), None)
                for result in one.find_results(place).values()
            ]
            known = [c for c in ranked if c and isinstance(c.value, int | float) and math.isfinite(c.value)]
            if known:
                scores.append(Score(one, known[0], [column.value for column in known]))
        if scores:
            return place, scores
    return None, []


def find_mismatch(scores: Sequence[Score], place: Place) -> str:
    """How the conditions of measurement differ between models, in words; empty: they do not.

    A seed can also determine the split, so models are compared seed by seed; without shared seeds, by their source.
    """
    first = scores[0].series
    for other in (score.series for score in scores[1:]):
        pairs = [(a, b) for a in first.members for b in other.members if a.seed == b.seed]
        for one, two in pairs or [(first.members[0], other.members[0])]:
            for path, words in (SOURCE, *SPLIT) if pairs else (SOURCE,):
                if get_value(one.run.results, *path) != get_value(two.run.results, *path):
                    return words
            results = [found.result if (found := m.measured.get(place)) else {} for m in (one, two)]
            for key in SAME_PROTOCOL if pairs else SAME_PROTOCOL[1:]:
                if results[0].get(key) != results[1].get(key):
                    return f"their {key.replace('num_tokens', 'number of scored tokens')} differs"
    return ""


def describe_difference(best: Score, second: Score, place: Place) -> str:
    """The difference between two models, paired by seed and document."""
    found = compare(best.series.find_results(place), second.series.find_results(place), (place[0], ""))
    if found is None:
        return "The difference has no interval: the models share no seed, or were measured on different documents."
    value, low, high = found.relative
    said = f"The difference from {second.series.name} is {value:+.1%}"
    many, by = format_plural(found.num_documents, "document"), "document"
    if found.num_seeds > 1:
        many, by = f"{found.num_seeds} seeds and {many}", "seed and document"
    unmeasured = " There is only one seed, so the spread between seeds is unknown." if found.num_seeds == 1 else ""
    if low is None or high is None:
        return f"{said}; {many}: too few for an interval.{unmeasured}"
    return f"{said} [{low:+.1%}, {high:+.1%}] (95% interval over {many}, paired by {by}): {_judge(found)}.{unmeasured}"


def _judge(found: Comparison) -> str:
    if not found.is_clear:
        seen = exp_or_inf(found.smallest_visible or 0) - 1
        return f"chance could explain it, so read it as a tie (a difference of {seen:.1%} would have been detected)"
    if 1 < found.num_seeds < MIN_CLAIM_SEEDS:
        return f"more than chance explains, but only an indication: a claim needs {MIN_CLAIM_SEEDS} seeds"
    return "more than chance explains"


def say_share(best: Score, other: Score) -> str:
    """How far apart two figures are: "5.0% below"."""
    share = best.mean / other.mean - 1 if other.mean else None
    return "against" if share is None else f"{abs(share):.1%} {'below' if share < 0 else 'above'}"
