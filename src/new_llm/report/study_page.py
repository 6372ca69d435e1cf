"""The page of a study: what is gained at which cost, the measures' charts, and all tables, in one HTML file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from new_llm.charts import Chart
from new_llm.config.files import write_text_atomically
from new_llm.config.terminal import make_line
from new_llm.experiments.study_table import Run, list_cells
from new_llm.report.figures import draw_study
from new_llm.report.page import FIGURES_FOLDER, fill_template, list_shown
from new_llm.report.render import name_apart, write_charts

STUDY_PAGE = "study.html"


def write_study_page(
    summary: Mapping[str, Any], found: Mapping[str, Sequence[Run]], folder: Path, *, with_figures: bool = True
) -> None:
    """Write the page of a study's summary and finished runs into its folder.

    Args:
        summary: what `study.json` holds.
        found: the finished runs by variant.
        folder: the study's folder.
        with_figures: write each chart as SVG, PNG and CSV as well, which takes longer than the page.
    """
    charts = list(name_apart(draw_study(summary, found)))
    write_text_atomically(folder / STUDY_PAGE, render_study(summary, charts, with_figures=with_figures))
    if with_figures:
        write_charts(charts, folder / FIGURES_FOLDER)


def render_study(summary: Mapping[str, Any], charts: Sequence[Chart], *, with_figures: bool) -> str:
    """The page's text. Charts of a table's columns are left out: the tables are there."""
    places = {name: place for place, name in enumerate(summary["variants"])}
    shown = [chart for chart in charts if chart.title not in summary["tables"]]
    return fill_template(
        STUDY_PAGE,
        with_figures=with_figures,
        title=make_line(summary["name"]),
        question=make_line(summary["question"]),
        num_seeds=summary["num_seeds"],
        figures=list_shown(shown, places, set(), with_figures=with_figures),
        tables=[(make_line(title), *list_cells(summary, title)) for title in summary["tables"]],
    )
