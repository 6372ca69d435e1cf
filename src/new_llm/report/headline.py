"""The sentence that sums a report up: which model is best, by how much, and how far to trust it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from new_llm.config.terminal import make_line
from new_llm.evaluation import MEASURES, Column
from new_llm.evaluation.statistics import Estimate, find_t_interval
from new_llm.formats import format_count, format_number, format_size
from new_llm.report.results import (
    BROKEN,
    CONFIDENCE,
    Difference,
    Member,
    Place,
    Series,
    as_number,
    compare,
    compute_mean,
    describe,
    get_number,
    get_value,
    list_columns,
    list_places,
    sum_seeds,
)

SAME_SHARE = 0.0005
MAX_VALUE = 1e12  # beyond it a model broke, and seeds can't be compared
TOKENIZERS = "they were measured with different tokenizers"
# Where it stands what models were measured on, and what to say where it differs.
SOURCE = (("data", "source_fingerprint"), "they were measured on different texts")
SPLIT = (
    (("data", "tokenizer", "fingerprint"), TOKENIZERS),
    (("data", "split_fingerprint"), "they were measured on different validation documents"),
)
SAME_PROTOCOL = ("num_tokens", "context", "stride")


@dataclass(frozen=True)
class Headline:
    """What the results say in one sentence, and caveats: how far to trust it.

    `is_comparable` is whether the models were measured on the same text.
    """

    text: str
    caveats: list[str]
    is_comparable: bool = True


@dataclass(frozen=True)
class Score:
    """A model's headline figure: its mean over seeds, and the measurement of each seed."""

    series: Series
    column: Column
    values: dict[Any, float]
    """By the member's place, its figure."""

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return compute_mean(list(self.values.values()))


def describe_outcome(series: Sequence[Series]) -> Headline:
    """Say whether memory helps where long documents tell it, which model is best, and how far to trust it."""
    answer, ranking = describe_memory(series), describe_ranking(series)
    if not answer:
        return ranking
    return Headline(answer, [ranking.text, *ranking.caveats], ranking.is_comparable)


def describe_memory(series: Sequence[Series]) -> str:
    """What the best memory is worth on long documents: against an empty one, a model without memory, and a cache on it.

    Empty where no model with memory has been measured on long documents.
    """
    try:
        return _describe_memory(series)
    except BROKEN:
        return ""


def _describe_memory(series: Sequence[Series]) -> str:
    found = {one.name: _list_results(one, series, "long") for one in series}
    measured = [one for one in series if found[one.name]]

    def get_mean(one: Series) -> float:
        return compute_mean([result["overall"]["perplexity"]["carried"]["value"] for _, result in found[one.name]])

    def has_memory(one: Series) -> bool:
        return bool(get_number(one.members[0].entry, "memory_info", "total_bytes"))

    def get_context(one: Series) -> float | None:
        return get_number(one.members[0].entry, "context_tokens")

    best = min((one for one in measured if has_memory(one)), key=get_mean, default=None)
    effects = {} if best is None else {way: _combine(found[best.name], way) for way in ("reset", "foreign")}
    if best is None or effects["reset"] is None:
        return ""
    num_documents = found[best.name][0][1]["num_documents"]
    documents = "document" if num_documents == 1 else "documents"
    text = f"On {num_documents} long held-out {documents}, {best.name}'s memory "
    text += f"{_say_effect(effects['reset'])} against an empty one"
    if (foreign := effects["foreign"]) is not None:
        is_alike = (foreign.value < 0) == (effects["reset"].value < 0)
        text += f" and {f'by {_say_share(foreign)}' if is_alike else _say_effect(foreign)} against another document's"
    text += "."
    without = [one for one in measured if not has_memory(one)]
    same = [one for one in without if get_context(one) == get_context(best)]
    baseline = min(same or without, key=get_mean, default=None)
    if baseline is None:
        return text
    reads = "the same segments" if same else f"{format_count(get_context(baseline))} tokens at once"
    if (effect := _pair(found[best.name], found[baseline.name], _sum_long)) is not None:
        text += f" Its perplexity is {_say_difference(effect)} that of {baseline.name}, which reads {reads}."
    caches = [_list_results(one, series, "caches") for one in (best, baseline)]
    if all(caches):
        names = [cache["name"] for cache in caches[1][0][1]["caches"]]
        strongest = min(names, key=lambda name: sum(_sum_cached(result, name)["total"] for _, result in caches[1]))
        effect = _pair(caches[0], caches[1], lambda result: _sum_cached(result, "bare"), strongest)
        if effect is not None and strongest != "bare":
            stored = "states and n-grams" if strongest == "+ all" else strongest.removeprefix("+ ")
            text += f" Against {baseline.name} with a cache of {stored}, which needs no training, "
            text += f"it is {_say_difference(effect)}."
    return text


Results = Sequence[tuple[Any, dict[str, Any]]]
"""(seed, what a measure found)."""


def _list_results(one: Series, series: Sequence[Series], measure: str) -> Results:
    """A measure's results for a model, on the first text that any model has."""
    place = next((place for place in list_places(series) if place[0] == measure), None)
    found = [(member.seed, member.list_measured().get(place)) for member in one.members] if place else []
    return [(seed, measured.result) for seed, measured in found if measured is not None]


def _combine(results: Results, way: str) -> Estimate | None:
    """What the memory is worth against another way: over documents for one seed, over seeds for several."""
    known = [result["overall"]["differences"][way]["relative"] for _, result in results
             if way in result["overall"]["differences"]]  # fmt: skip
    return _average([Estimate(one["value"], one["low"], one["high"]) for one in known])


def _average(effects: Sequence[Estimate]) -> Estimate | None:
    """The mean over seeds; its interval is the wider one, over seeds or over documents, and none for few documents."""
    if not effects:
        return None
    value = compute_mean([effect.value for effect in effects])
    lows, highs = (
        [end for effect in effects if (end := getattr(effect, name)) is not None] for name in ("low", "high")
    )
    if len(lows) < len(effects):
        return Estimate(value, None, None)
    low, high = compute_mean(lows), compute_mean(highs)
    if len(effects) > 1:
        over_seeds = find_t_interval([effect.value for effect in effects], CONFIDENCE)
        low, high = min(low, over_seeds[0] or low), max(high, over_seeds[1] or high)
    return Estimate(value, low, high)


def _pair(
    one: Results, other: Results, total: Callable[[dict[str, Any]], dict[str, Any]], cache: str = ""
) -> Estimate | None:
    """Two models on the same documents, paired by document and seed; the other one with a cache, where it is named."""
    pairs = [
        (total(a), _sum_cached(b, cache) if cache else total(b))
        for seed, a in one
        for other_seed, b in other
        if seed == other_seed
    ]
    found = [difference for a, b in pairs if (difference := compare({"documents": a}, {"documents": b})) is not None]
    return _average([Estimate(*difference[:3]) for difference in found])


def _sum_long(result: dict[str, Any]) -> dict[str, Any]:
    """Tokens and loss of each long document, the memory carried."""
    return {
        "num_tokens": [sum(document["num_tokens"]["carried"]) for document in result["documents"]],
        "total_nll": [sum(document["total_nll"]["carried"]) for document in result["documents"]],
    }


def _sum_cached(result: dict[str, Any], name: str) -> dict[str, Any]:
    """Tokens and loss of each long document with a cache."""
    losses = [sum(document["total_nll"][name]) for document in result["documents"]]
    num_tokens = [sum(document["num_tokens"]) for document in result["documents"]]
    return {"num_tokens": num_tokens, "total_nll": losses, "total": sum(losses)}


def _say_share(effect: Estimate) -> str:
    said = format_size(*effect)
    return said if effect.low is not None else f"{said} (no interval: too few documents or seeds)"


def _say_effect(effect: Estimate) -> str:
    return f"{'lowers' if effect.value < 0 else 'raises'} perplexity by {_say_share(effect)}"


def _say_difference(effect: Estimate) -> str:
    return f"{_say_share(effect)} {'below' if effect.value < 0 else 'above'}"


def describe_ranking(series: Sequence[Series]) -> Headline:
    """Say which model is best by the first figure of the summary for which lower or higher is better."""
    place, scores = find_scores(series)
    if place is None:
        found = [(one.name, measured) for one in series for m in one.members for measured in m.list_measured().values()]
        ranked = [measured for _, measured in found if any(column.better for column in list_columns(measured))]
        sentences = [f"{name}: {said}." for name, one in found if one not in ranked and (said := describe(one))]
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
        text = f"{best.series.name} reaches a {what} of {say(best)}."
        return Headline(text, [*caveats, "There is one model only: nothing to compare it with."])
    second, word = scores[1], "lowest" if column.better == "lower" else "highest"
    if abs(best.mean - second.mean) <= SAME_SHARE * abs(second.mean):
        text = f"{best.series.name} and {second.series.name} have the same {what}, {say(best)}, to within 0.05%."
    else:
        others = [second, *(score for score in scores[2:] if score.series is series[0])]
        said = " and ".join(f"{say_share(best, other)} {other.series.name} ({say(other)})" for other in others)
        text = f"{best.series.name} has the {word} {what}: {say(best)}, {said}."
    return Headline(text, [describe_difference(best, second, place), *caveats])


def find_scores(series: Sequence[Series]) -> tuple[Place | None, list[Score]]:
    """The first figure that says which way is better, and the models that have a finite one."""
    for place in list_places(series):
        scores = []
        for one in series:
            values: dict[Any, float] = {}
            shown: Column | None = None
            for index, member in enumerate(one.members):
                measured = member.list_measured().get(place)
                column = next((c for c in list_columns(measured) if c.better), None) if measured else None
                value = as_number(column.value) if column else None
                if value is not None and math.isfinite(value):
                    values[index], shown = value, shown or column
            if shown is not None:
                scores.append(Score(one, shown, values))
        if scores:
            return place, scores
    return None, []


def find_mismatch(scores: Sequence[Score], place: Place) -> str:
    """What the models were measured on that differs between them, in words; nothing: ''.

    A seed can also choose the split, so models are compared seed by seed, or by their source if none is shared.
    """
    first = scores[0].series
    for other in (score.series for score in scores[1:]):
        pairs = pair_members(first, other)
        for one, two in pairs or [(first.members[0], other.members[0])]:
            for path, words in (SOURCE, *SPLIT) if pairs else (SOURCE,):
                if get_value(one.run.results, *path) != get_value(two.run.results, *path):
                    return words
            results = [found.result if (found := m.list_measured().get(place)) else {} for m in (one, two)]
            for key in SAME_PROTOCOL if pairs else SAME_PROTOCOL[1:]:
                if results[0].get(key) != results[1].get(key):
                    return f"their {key.replace('num_tokens', 'number of scored tokens')} differs"
    return ""


def pair_members(one: Series, other: Series) -> list[tuple[Member, Member]]:
    """The trainings of two models that share a seed."""
    return [(a, b) for a in one.members for b in other.members if a.seed == b.seed]


def describe_difference(best: Score, second: Score, place: Place) -> str:
    """The paired difference of two models: over documents for one seed, over seeds for several."""
    pairs = pair_members(best.series, second.series)
    single = [score.series.name for score in (best, second) if len(score.values) == 1]
    if len(single) == 1 and len(pairs) < 2:
        return f"{single[0]} was trained with one seed, so the spread between seeds can't be told from the difference."
    if len(pairs) == 1 or len(single) == 2:
        return _describe_over_documents(pairs, place, second.series.name)
    if max(*best.values.values(), *second.values.values()) > MAX_VALUE:
        return "A figure is too large to compare seeds."
    values = [_read(pair, best, second) for pair in pairs]
    shares = [one / other - 1 for one, other in (pair for pair in values if pair is not None) if other]
    if len(shares) < 2:
        return (
            f"{best.series.name} and {second.series.name} share no seeds, so their difference has no paired interval."
        )
    estimate = _compare_over_documents(pairs, place)
    if estimate is not None and estimate.low is None:
        return f"{_say_too_few(estimate.num_documents)} Seeds: {len(shares)}, all on the same documents."
    low, high = find_t_interval(shares, CONFIDENCE)
    said = (
        f"The difference from {second.series.name} is {compute_mean(shares):+.1%} [{low:+.1%}, {high:+.1%}] "
        f"(95% interval over {len(shares)} seeds, paired by seed, Student's t)"
    )
    is_clear = _is_clear(low, high)
    if estimate is not None:
        said += f", [{estimate.low:+.1%}, {estimate.high:+.1%}] (over {estimate.num_documents} documents, paired by "
        said += "document and seed)"
        is_clear = is_clear and _is_clear(estimate.low, estimate.high)
    return f"{said}: {_judge(is_clear)}."


def _read(pair: tuple[Member, Member], best: Score, second: Score) -> tuple[float, float] | None:
    """The figures of two trainings."""
    found = []
    for member, score in zip(pair, (best, second), strict=True):
        found.append(score.values.get(score.series.members.index(member)))
    return (found[0], found[1]) if None not in found else None


def _compare_over_documents(pairs: Sequence[tuple[Member, Member]], place: Place) -> Difference | None:
    """Two models document by document, each document's loss summed over the seeds that both have."""
    results = [[found.result if (found := m.list_measured().get(place)) else {} for m in pair] for pair in pairs]
    return compare(*map(sum_seeds, zip(*results, strict=True))) if results else None


def _describe_over_documents(pairs: Sequence[tuple[Member, Member]], place: Place, name: str) -> str:
    unmeasured = "Each model was trained with one seed, so the spread between seeds is unmeasured."
    estimate = _compare_over_documents(pairs, place)
    if estimate is None:
        return unmeasured
    if estimate.low is None or estimate.high is None:
        return f"{_say_too_few(estimate.num_documents)} {unmeasured}"
    said = (
        f"The difference from {name} is {estimate.value:+.1%} [{estimate.low:+.1%}, {estimate.high:+.1%}] "
        f"(95% interval over {estimate.num_documents} documents, paired by document)"
    )
    return f"{said}: {_judge(_is_clear(estimate.low, estimate.high))}. {unmeasured}"


def _say_too_few(num_documents: int) -> str:
    were = "document was" if num_documents == 1 else "documents were"
    return f"Only {num_documents} {were} measured, too few for an interval of the difference."


def _is_clear(low: float | None, high: float | None) -> bool:
    return low is not None and high is not None and (low > 0 or high < 0)


def _judge(is_clear: bool) -> str:
    return "more than chance explains" if is_clear else "chance could explain it, so read it as a tie"


def say(score: Score) -> str:
    """The figure in a sentence."""
    try:
        return make_line(score.column.format(score.mean))
    except (ValueError, OverflowError):
        return format_number(score.mean)


def say_share(best: Score, other: Score) -> str:
    """How far apart two figures are: "5.0% below"."""
    if not other.mean:
        return "against"
    share = best.mean / other.mean - 1
    return f"{abs(share):.1%} {'below' if share < 0 else 'above'}"
