"""The page of a study: results by cost, the measures' charts, and all tables, in one HTML file."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from new_llm.charts import Chart, line_chart, point_chart
from new_llm.config.files import write_text_atomically
from new_llm.config.terminal import make_line
from new_llm.evaluation import MEASURES, ModelResult
from new_llm.experiments.study_table import (
    BITS_PER_BYTE,
    COST,
    CPU_SECONDS,
    MEMORY,
    STATE,
    STREAMING_BITS,
    Run,
    list_cells,
    list_measured,
)
from new_llm.report.figures import name_apart, write_charts
from new_llm.report.page import FIGURES_FOLDER, fill_template, list_shown
from new_llm.report.results import draw_measure

STUDY_PAGE = "study.html"


def write_study_page(
    summary: Mapping[str, Any], found: Mapping[str, Sequence[Run]], folder: Path, *, with_figures: bool = True
) -> None:
    """Write a study's page into its folder, from its summary and finished runs.

    Args:
        with_figures: also write each chart as SVG, PNG and CSV, which takes longer than the page.
    """
    charts = list(name_apart([*draw_against_cost(summary), *draw_checkpoints(summary), *draw_measures(found)]))
    write_text_atomically(folder / STUDY_PAGE, render_study(summary, charts, with_figures=with_figures))
    if with_figures:
        write_charts(charts, folder / FIGURES_FOLDER)


def render_study(summary: Mapping[str, Any], charts: Sequence[Chart], *, with_figures: bool) -> str:
    """The page's HTML."""
    places = {name: place for place, name in enumerate(summary["variants"])}
    return fill_template(
        STUDY_PAGE,
        with_figures=with_figures,
        title=make_line(summary["name"]),
        question=make_line(summary["question"]),
        num_seeds=summary["num_seeds"],
        figures=list_shown(charts, places, with_figures=with_figures),
        tables=[(make_line(title), *list_cells(summary, title)) for title in summary["tables"]],
    )


ENDS = ("mean", "low", "high")


def draw_against_cost(summary: Mapping[str, Any]) -> list[Chart]:
    """Bits per byte over cost (state, memory, processor seconds), one point per variant, with its interval.

    Caches that were added to a model are shown as well, with the bytes that they store: a memory has to beat them.
    Caches of n-grams are shown only for the reference and the baselines.
    """
    metrics = [metric for some in summary["tables"].values() for metric in some if metric.endswith(BITS_PER_BYTE)]
    caption = (
        "A point is the mean over a variant's seeds, a line its 95% interval (Student's t; none for two seeds). State "
        "is the most that a stream of one row has to keep in order to continue; memory is what it carries from segment "
        "to segment (models without memory are left out); processor seconds are those of training, without evaluation."
    )
    with_caches = (
        " Small points are models with an untrained cache: the cache's gain on long documents, subtracted from the "
        "model's own figure (for one seed, with its interval over documents). A cache adds what it stores to state and "
        "memory: N states and the tokens after them, and for n-grams the tokens of the longest document."
    )
    charts, with_points = [], {summary["reference"], *summary["baselines"]}
    for cost in (STATE, MEMORY, CPU_SECONDS):
        for metric in metrics:
            rows: list[dict[str, Any]] = []
            for name, entry in summary["variants"].items():
                figure, place = (entry["figures"].get(one) for one in (metric, f"{COST}: {cost}"))
                if not figure or not place:
                    continue
                rows.append({"variant": name, cost: place["mean"], **{end: figure[end] for end in ENDS}})
                for cache, found in entry["caches"].items() if metric.endswith(STREAMING_BITS) else ():
                    if not cache.endswith("states") and name not in with_points:
                        continue
                    spent = place["mean"] + (found["bytes"] if cost != CPU_SECONDS else 0)
                    rows.append({"variant": f"{name} {cache}", cost: spent, **{end: found[end] for end in ENDS}})
                    rows[-1]["around"] = name
            axes: dict[str, Any] = {"x": cost, "y": "mean", "series": "variant", "owner": "around"}
            axes |= {"low": "low", "high": "high", "x_title": cost, "y_title": metric, "x_log": cost != CPU_SECONDS}
            said = caption + with_caches if any("around" in row for row in rows) else caption
            charts.append(
                point_chart(f"{metric} by {cost}", f"Bits per byte by {cost}", said, rows, **axes, view=metric)
            )
    return [chart for chart in charts if chart.spec["data"]["values"]]


def draw_checkpoints(summary: Mapping[str, Any]) -> list[Chart]:
    """Each difference from the reference during training, one view each."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, stages in summary["checkpoints"].items():
        for stage in stages:
            for key, found in stage["comparisons"].items():
                if " from " in key:  # a range of distance, which only study.json shows
                    continue
                ends = {end: found[end] for end in ("nats", "low", "high")}
                rows.setdefault(key, []).append({"variant": name, "tokens": stage["tokens"], **ends})
    caption = (
        f"Nats per token below (better) or above {summary['reference']} after equal training, paired by seed and "
        "document."
    )
    axes: dict[str, Any] = {"x": "tokens", "y": "nats", "series": "variant", "low": "low", "high": "high"}
    axes |= {"x_title": "training tokens", "y_title": "nats per token", "reference": 0.0}
    title = "Differences during training"
    return [line_chart(f"along-{key}", title, caption, some, **axes, view=key) for key, some in rows.items()]


def draw_measures(found: Mapping[str, Sequence[Run]]) -> list[Chart]:
    """The charts of each measure on each text; a variant's seeds are averaged."""
    results: dict[tuple[str, str], list[ModelResult]] = {}
    for variant, runs in found.items():
        for run in runs:
            for what, measure, result in list_measured(run):
                if measure in MEASURES:
                    results.setdefault((what, measure), []).append(ModelResult(variant, dict(result)))
    charts = []
    for (what, measure), some in results.items():
        for chart in draw_measure(some, (measure, what)):
            # Charts of one measure on several texts have the same name.
            name = chart.name if what == measure else f"{what}-{chart.name}"
            charts.append(dataclasses.replace(chart, name=name))
    return charts
