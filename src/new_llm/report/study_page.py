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


def write_study_page(summary: Mapping[str, Any], found: Mapping[str, Sequence[Run]], folder: Path) -> None:
    """Write the page of a study's summary and finished runs into its folder, and each chart as SVG, PNG and CSV."""
    charts = list(name_apart(draw_study(summary, found)))
    page = render_study(summary, charts)
    write_text_atomically(folder / STUDY_PAGE, page.encode("utf-8", "replace").decode("utf-8"))
    write_charts(charts, folder / FIGURES_FOLDER)


def render_study(summary: Mapping[str, Any], charts: Sequence[Chart]) -> str:
    """The page's text. Charts of a table's columns are left out: the tables are there."""
    places = {name: place for place, name in enumerate(summary["variants"])}
    shown = [chart for chart in charts if chart.title not in summary["tables"]]
    return fill_template(
        STUDY_PAGE,
        with_figures=True,
        title=make_line(summary["name"]),
        question=make_line(summary["question"]),
        num_seeds=summary["num_seeds"],
        figures=list_shown(shown, places, set(), with_figures=True),
        tables=[(make_line(title), *list_cells(summary, title)) for title in summary["tables"]],
    )
