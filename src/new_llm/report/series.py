"""The models of a report: those of which runs are one (trained with several seeds), and what measures say of them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from new_llm.charts import Chart, ComparedText, ShadedText
from new_llm.config.loading import flatten_settings
from new_llm.config.terminal import make_line
from new_llm.evaluation import MEASURES, Column, ModelResult
from new_llm.evaluation.statistics import compare_documents
from new_llm.formats import MISSING
from new_llm.report.results import VALIDATION, Measured, Run, get_finite, get_value, name_model

# Settings that make no other model.
INCIDENTAL = {"name", "models", "seed", "device", "runs_dir", "out", "data.cache_dir", "model.recipe"}
MAX_NAMED = 2  # settings that a name holds; more are in the table of differences


@dataclass(frozen=True)
class Member:
    """One trained model: its run, and its entry in the run's results."""

    run: Run
    entry: dict[str, Any]

    @property
    def seed(self) -> Any:
        """The seed it was trained with; None: unknown."""
        return get_value(self.run.results, "config", "seed")

    def list_measured(self) -> dict[tuple[str, str], Measured]:
        """What was measured of it, by measure and text; the newest of each."""
        return {(one.measure, one.text): one for one in self.run.find_measured(self.entry)}


@dataclass(frozen=True)
class Series:
    """One model of the report: its members differ by their seeds alone."""

    index: int
    name: str
    settings: dict[str, Any]
    members: tuple[Member, ...]

    def collect(self, *keys: str) -> list[float]:
        """The finite numbers at the keys of the members' entries."""
        found = [get_finite(member.entry, *keys) for member in self.members]
        return [value for value in found if value is not None]


def compute_mean(values: Sequence[float]) -> float:
    """The mean of at least one finite number; huge ones don't overflow."""
    return math.fsum(value / len(values) for value in values)


def compute_spread(values: Sequence[float]) -> float:
    """The standard deviation of at least two finite numbers; infinite where a float can't hold it."""
    mean = compute_mean(values)
    most = max(abs(value - mean) for value in values)
    if most in (0.0, math.inf):
        return most
    return most * math.sqrt(math.fsum(((value - mean) / most) ** 2 for value in values) / (len(values) - 1))


def is_seed(value: Any) -> bool:
    """Whether a value can tell one training from another."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def group_series(runs: Sequence[Run]) -> list[Series]:
    """The models of all runs, those that differ by their seed alone together, in the order they are met."""
    groups: list[tuple[str, dict[str, Any], list[Member]]] = []
    for run in runs:
        for entry in run.entries:
            name, settings, member = name_model(entry), describe_settings(run, entry), Member(run, entry)
            for other, known, members in groups:
                is_same = name == other and settings == known
                if is_same and is_seed(member.seed) and member.seed not in [one.seed for one in members]:
                    members.append(member)
                    break
            else:
                groups.append((name, settings, [member]))
    names = name_groups(groups)
    return [Series(i, names[i], settings, tuple(members)) for i, (_, settings, members) in enumerate(groups)]


def describe_settings(run: Run, entry: dict[str, Any]) -> dict[str, Any]:
    """The settings that make this model, by their dotted names; options of its run's other models are left out."""
    taken = flatten_settings({"model": entry.get("options")})
    all_options = {key for other in run.entries for key in flatten_settings({"model": other.get("options")})}
    settings = flatten_settings(run.results.get("config"))
    own = {key: value for key, value in settings.items() if key not in INCIDENTAL | all_options} | taken
    return {key: value for key, value in own.items() if value is not None}


def name_groups(groups: Sequence[tuple[str, dict[str, Any], list[Member]]]) -> list[str]:
    """A name of its own for each group: its type; where that is not enough, what is special about it."""
    names: list[str] = []
    num_runs = len({id(member.run) for _, _, members in groups for member in members})
    for model_type, settings, members in groups:
        same = [other for other_type, other, _ in groups if other_type == model_type]
        changed = [key for key in settings if any(other.get(key) != settings[key] for other in same)]
        name = model_type
        if len(same) > 1 and 0 < len(changed) <= MAX_NAMED:
            said = [f"{key.rsplit('.', 1)[-1]} {say_setting(settings[key])}" for key in changed]
            name = f"{model_type}, {', '.join(map(make_line, said))}"
        elif len(same) > 1 and num_runs > 1:
            name = f"{model_type}, {members[0].run.name}"
        number = 1
        while (name if number == 1 else f"{name} ({number})") in names:
            number += 1
        names.append(name if number == 1 else f"{name} ({number})")
    return names


def say_setting(value: Any) -> str:
    """A setting's value in a table or a name."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def list_differences(series: Sequence[Series]) -> list[tuple[str, list[str]]]:
    """(setting, its value for each model) of the settings in which models differ; a dash: it has none."""
    keys = list(dict.fromkeys(key for one in series for key in one.settings))
    rows = []
    for key in keys:
        values = [one.settings.get(key) for one in series]
        if any(value != values[0] for value in values):
            rows.append((key, [MISSING if value is None else say_setting(value) for value in values]))
    return rows


# What measures say of them


Place = tuple[str, str]
"""A measure's name, and the text that was measured."""

CONFIDENCE = 0.95

# Results are anyone's JSON, and a measure of a user's own may have bugs: neither may cost a finished run its report.
BROKEN = (Exception,)


def list_places(series: Sequence[Series]) -> list[Place]:
    """What was measured of at least one model: the run's own text first, then in the order of the fullest results."""
    measured = [member.list_measured() for one in series for member in one.members]
    found = dict.fromkeys(place for one in sorted(measured, key=len, reverse=True) for place in one)
    texts = sorted({text for _, text in found}, key=lambda text: (text != VALIDATION, text))
    return [place for text in texts for place in found if place[1] == text and place[0] in MEASURES]


def list_results(series: Sequence[Series], place: Place) -> list[ModelResult]:
    """What a measure found on a text: a result for each model and seed, those of one model under one name."""
    return [
        ModelResult(one.name, measured.result)
        for one in series
        for member in one.members
        if (measured := member.list_measured().get(place)) is not None
    ]


def list_columns(measured: Measured) -> list[Column]:
    """The measure's columns of one result; none where it can't read it."""
    try:
        return MEASURES[measured.measure].columns(measured.result)
    except BROKEN:
        return []


def describe(measured: Measured) -> str:
    """The result in a sentence; empty where there is none."""
    try:
        return make_line(MEASURES[measured.measure].describe(measured.result))
    except BROKEN:
        return ""


def draw_measure(results: Sequence[ModelResult], place: Place) -> list[Chart]:
    """The measure's charts, without the results that it can't draw."""
    measure = MEASURES[place[0]]

    def draw(some: Sequence[ModelResult]) -> list[Chart]:
        try:
            return measure.charts(some) if some else []
        except BROKEN:
            return []

    return draw(results) or draw([result for result in results if draw([result])])


def list_texts(results: Sequence[ModelResult], place: Place) -> list[ShadedText | ComparedText]:
    """The measure's passages."""
    try:
        return MEASURES[place[0]].texts(results)
    except BROKEN:
        return []


class Difference(NamedTuple):
    """A model's perplexity / another's − 1 on the same documents, with its interval, or None for too few."""

    value: float
    low: float | None
    high: float | None
    num_documents: int


def compare(one: Any, other: Any) -> Difference | None:
    """The paired difference of two results by document; None where they don't tell the same documents."""
    try:
        found = compare_documents(one["documents"], other["documents"], confidence=CONFIDENCE)
        num_documents = sum(count > 0 for count in one["documents"]["num_tokens"])
        return None if found is None else Difference(*found, num_documents)
    except BROKEN:
        return None


def sum_seeds(results: Sequence[Any]) -> dict[str, Any]:
    """Results of a model's seeds on the same documents as one: tokens and loss of each document, summed over seeds."""
    try:
        documents = [result["documents"] for result in results]
        if any(one["num_tokens"] != documents[0]["num_tokens"] for one in documents):
            return {}
        names = ("num_tokens", "total_nll")
        totals = {name: [sum(seeds) for seeds in zip(*(one[name] for one in documents), strict=True)] for name in names}
        return {"documents": totals}
    except BROKEN:
        return {}


def list_unknown(series: Sequence[Series]) -> list[str]:
    """Measures that results name and this program doesn't know."""
    names: Iterable[str] = (name for one in series for member in one.members for name, _ in member.list_measured())
    return sorted({make_line(name) for name in names if name not in MEASURES})
