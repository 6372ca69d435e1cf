"""Asking measures about results from files: what a result lacks or has wrong costs its own part of the page alone."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from new_llm.charts import Chart
from new_llm.config.terminal import make_line
from new_llm.evaluation import MEASURES, Column, ModelResult
from new_llm.evaluation.statistics import compare_documents
from new_llm.report.results import VALIDATION, Measured
from new_llm.report.series import Series

Place = tuple[str, str]
"""A measure's name, and the text that was measured."""

CONFIDENCE = 0.95

# Results are anyone's JSON, and a measure of a user's own may have bugs: neither may cost a finished run its report.
BROKEN = (Exception,)


def list_places(series: Sequence[Series]) -> list[Place]:
    """What was measured of at least one model: the run's own text first, measures in their order."""
    found = dict.fromkeys(place for one in series for member in one.members for place in member.list_measured())
    texts = sorted({text for _, text in found}, key=lambda text: (text != VALIDATION, text))
    return [(measure, text) for text in texts for measure in MEASURES if (measure, text) in found]


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


def draw_charts(results: Sequence[ModelResult], place: Place) -> list[Chart]:
    """The measure's charts, without the results that it can't draw."""
    measure = MEASURES[place[0]]

    def draw(some: Sequence[ModelResult]) -> list[Chart]:
        try:
            return measure.charts(some) if some else []
        except BROKEN:
            return []

    return draw(results) or draw([result for result in results if draw([result])])


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


def list_unknown(series: Sequence[Series]) -> list[str]:
    """Measures that results name and this program doesn't know."""
    names: Iterable[str] = (name for one in series for member in one.members for name, _ in member.list_measured())
    return sorted({make_line(name) for name in names if name not in MEASURES})
