"""The figures of a study: the measures' charts with a series per variant, and each figure with its interval."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from new_llm.charts import Chart, bar_chart
from new_llm.evaluation import MEASURES, ModelResult
from new_llm.experiments.study_table import Run, list_results
from new_llm.report.measures import draw_charts
from new_llm.report.render import write_charts

FIGURES_FOLDER = "figures"


def write_study_figures(summary: Mapping[str, Any], found: Mapping[str, Sequence[Run]], folder: Path) -> None:
    """Draw a study into `figures` in its folder, each chart as SVG and CSV.

    Args:
        summary: of `describe_study`.
        found: by variant, its finished runs.
        folder: the study's.
    """
    write_charts([*draw_figures(summary), *draw_measures(found)], folder / FIGURES_FOLDER)


def draw_figures(summary: Mapping[str, Any]) -> list[Chart]:
    """Each column of the study's tables: a dot per variant with its interval."""
    charts = []
    for table, metrics in summary["tables"].items():
        for metric in metrics:
            rows = [
                {"variant": name, **{end: figure[end] for end in ("mean", "low", "high", "num_seeds")}}
                for name, entry in summary["variants"].items()
                if (figure := entry["figures"].get(metric)) is not None
            ]
            caption = "The mean over seeds and its 95% interval (Student's t; of one seed, over documents)."
            axes = {"x": "variant", "y": "mean", "low": "low", "high": "high", "y_title": metric}
            charts.append(bar_chart(f"figure-{metric}", table, caption, rows, **axes, is_dotted=True, view=metric))
    return charts


def draw_measures(found: Mapping[str, Sequence[Run]]) -> list[Chart]:
    """The charts of each measure on each text, seeds of a variant averaged."""
    results: dict[tuple[str, str], list[ModelResult]] = {}
    for variant, runs in found.items():
        for run in runs:
            for what, measure, result in list_results(run):
                if measure in MEASURES:
                    results.setdefault((what, measure), []).append(ModelResult(variant, dict(result)))
    charts = []
    for (what, measure), some in results.items():
        for chart in draw_charts(some, (measure, what)):
            # Of several texts the charts of one measure have one name.
            name = chart.name if what == measure else f"{what}-{chart.name}"
            charts.append(Chart(name, chart.title, chart.caption, chart.spec, chart.rows, chart.view))
    return charts
