"""The page of a study: what is gained at which cost, the measures' charts, and all tables, in one HTML file."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup

from new_llm.charts import Chart
from new_llm.config.files import write_text_atomically
from new_llm.config.terminal import make_line
from new_llm.experiments.study_table import Run, list_cells
from new_llm.report.figures import draw_study
from new_llm.report.page import FIGURES_FOLDER, Figure, load_templates, make_figure
from new_llm.report.render import write_charts

STUDY_PAGE = "study.html"


def write_study_page(summary: Mapping[str, Any], found: Mapping[str, Sequence[Run]], folder: Path) -> None:
    """Write the page of a study\'s summary and finished runs into its folder, and each chart as SVG and CSV."""
    charts = draw_study(summary, found)
    page = render_study(summary, charts)
    write_text_atomically(folder / STUDY_PAGE, page.encode("utf-8", "replace").decode("utf-8"))
    write_charts(charts, folder / FIGURES_FOLDER)


def render_study(summary: Mapping[str, Any], charts: Sequence[Chart]) -> str:
    """The page's text. Charts of a table's columns are left out: the tables are there."""
    places = {name: place for place, name in enumerate(summary["variants"])}
    taken: set[str] = set()
    sections: list[tuple[str, list[Figure]]] = []
    for title, same in groupby(charts, lambda chart: chart.title):
        if title not in summary["tables"] and (figure := make_figure(list(same), places, taken)).views:
            sections.append((figure.title, [figure]))
    files, environment = load_templates()
    return environment.get_template(STUDY_PAGE).render(
        title=make_line(summary["name"]),
        question=make_line(summary["question"]),
        num_seeds=summary["num_seeds"],
        sections=sections,
        tables=[(make_line(title), *list_cells(summary, title)) for title in summary["tables"]],
        style=Markup(files["style.css"]),
    )
