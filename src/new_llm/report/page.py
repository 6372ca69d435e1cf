"""The report: a self-contained HTML page for one or several runs, and its charts as separate files."""

import base64
import functools
import hashlib
import math
from collections.abc import Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from new_llm.charts import PALETTE, Chart, ShadedText
from new_llm.config.files import write_text_atomically
from new_llm.config.terminal import hide_home, make_line, make_printable, print_text
from new_llm.evaluation import MEASURES, ask_measure
from new_llm.report import figures
from new_llm.report.figures import draw_memory, draw_training
from new_llm.report.headline import describe_outcome
from new_llm.report.results import (
    Place,
    Run,
    Series,
    describe,
    draw_measure,
    get_value,
    group_series,
    list_differences,
    list_places,
    list_results,
    list_unknown,
    make_run,
    name_section,
)
from new_llm.report.tables import summarize

PAGE_FOLDER = "page"
FIGURES_FOLDER = "figures"
FULL_SHADE = 2.0
"""A token has full shade from this many nats on."""
# The colours of words in tables: the levels of a verdict.
BADGES = {"abnormal": "bad", "suspicious": "warn", "normal": "good", "undertrained": "info", "training": "info"}


def write_report(results: dict[str, Any], path: Path) -> None:
    """Write the page of one run, including later evaluations in its folder; missing results are left out."""
    is_done = results.get("status") == "complete"  # a run writes its page after each model, but figures only once
    write_page([make_run(results, path.parent)], path, with_figures=is_done)


def write_page(runs: Sequence[Run], path: Path, *, with_figures: bool = True) -> None:
    """Write the page of some runs and, into `figures` next to it, their charts as SVG, PNG and CSV.

    The page loads nothing: style, script and charts are embedded. Each file is written atomically.
    """
    series = group_series(runs)
    if obstacle := figures.find_obstacle():
        print_text(f"new-llm: {path}: {obstacle}", stderr=True)
    charts = {} if obstacle else draw_charts(series)
    write_text_atomically(path, render_page(runs, series, charts, with_figures=with_figures))
    if with_figures:
        figures.write_charts([chart for group in charts.values() for chart in group], path.parent / FIGURES_FOLDER)


def draw_charts(series: Sequence[Series]) -> dict[Place, list[Chart]]:
    """All charts for which there are results: of each measure and text, of training, and of the memory."""
    places = list_places(series)
    drawn = {place: draw_measure(list_results(series, place), place) for place in places}
    own = {("training", ""): draw_training(series), ("memory", ""): draw_memory(series)}
    apart = figures.name_apart(chart for charts in (drawn | own).values() for chart in charts)
    return {place: list(islice(apart, len(charts))) for place, charts in (drawn | own).items()}


def render_page(
    runs: Sequence[Run], series: Sequence[Series], charts: dict[Place, list[Chart]], *, with_figures: bool = True
) -> str:
    """The page's HTML, with links to its figures' files; deterministic."""
    outcome = describe_outcome(series)
    summary = summarize(series, mark_best=outcome.is_comparable)
    names = [make_line(run.name) for run in runs]
    return fill_template(
        "page.html",
        with_figures=with_figures,
        title=names[0] if len(runs) == 1 else f"{len(runs)} runs: {', '.join(names)}",
        facts=list_facts(runs),
        unfinished=[
            (run.name, make_line(status)) for run in runs if (status := run.results.get("status", "")) != "complete"
        ],
        outcome=outcome,
        keys=[(one.name, *_draw_mark(one.index)) for one in series],
        groups=[(group, len(list(some))) for group, some in groupby(summary.headings, lambda heading: heading[0])],
        summary=summary,
        badges=BADGES,
        sections=list_sections(series, charts, with_figures=with_figures),
        differences=list_differences(series),
        evaluations=[(run.name, one, describe(one.measure, one.result)) for run in runs for one in run.evaluations],
        origins=[describe_origin(run) for run in runs],
        unknown=list_unknown(series),
    )


def fill_template(name: str, **values: Any) -> str:
    """Render a template with values, style and script; home folders are hidden, so that the page can be shared."""
    environment, script, style = load_templates()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template(name).render(**values, script=script, style=style, digest=digest)
    # JSON allows lone surrogates, UTF-8 does not.
    return hide_home(page).encode("utf-8", "replace").decode("utf-8")


@functools.cache
def load_templates() -> tuple[Environment, Markup, Markup]:
    """The template environment, script and style; cached, because a run writes its page after each model."""
    loader = PackageLoader("new_llm.report", PAGE_FOLDER)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"text": make_line, "printable": make_printable, "shade": shade}
    script, style = (Markup(loader.get_source(environment, name)[0]) for name in ("script.js", "style.css"))
    return environment, script, style


def shade(value: float) -> str:
    """The CSS of a token at which the memory gains this many nats; the colour gets stronger up to `FULL_SHADE`."""
    share = min(abs(value) / FULL_SHADE, 1) if math.isfinite(value) else 0
    return f"--share:{share:.2f}"


def list_sections(
    series: Sequence[Series], charts: dict[Place, list[Chart]], *, with_figures: bool
) -> list[dict[str, Any]]:
    """The page's non-empty sections: one per measure and text, then training and memory.

    Each has a `name`, a `title`, `figures`, `sentences` (model, sentence), and `texts` (view, passages).
    """
    places = {one.name: one.index for one in series}
    sections: list[dict[str, Any]] = []
    for number, (place, drawn) in enumerate(charts.items()):
        known = MEASURES.get(place[0])
        title = name_section(make_line(known.title), place) if known else place[0].capitalize()
        results = list_results(series, place)
        sentences = [(name, sentence) for name, result in results if (sentence := describe(place[0], result))]
        shown = list_shown(drawn, places, with_figures=with_figures)
        found: list[ShadedText] = ask_measure(place[0], "texts", results, [])
        texts = [
            (view, [one for one in found if one.view == view]) for view in dict.fromkeys(one.view for one in found)
        ]
        if shown or sentences or texts:
            section = {"name": f"section_{number}", "title": title, "figures": shown}
            sections.append(section | {"sentences": sentences, "texts": texts})
    order = {"Training": 1, "Memory": 2}
    return sorted(sections, key=lambda section: order.get(section["title"], 0))


def list_shown(charts: Sequence[Chart], places: dict[str, int], *, with_figures: bool) -> list[dict[str, Any]]:
    """Group charts into figures: charts with the same title are views of a figure, between which the page switches.

    Each figure has a `name`, a `title`, a `caption`, and `views`. A view has a `label`; its `svg`; the `other` SVG with
    a linear instead of a logarithmic y-axis, or vice versa; its numbers as a data URL (`csv`); (kind, address) of its
    `files` next to the page; and as `key` the (name, colour, mark) of each series. Charts that can't be drawn are left
    out. `places` are the indices of the models.
    """
    found = []
    for title, same in groupby(charts, lambda chart: chart.title):
        first, *others = same
        views = [view for chart in (first, *others) if (view := _draw_view(chart, places, with_figures=with_figures))]
        if views:
            caption = make_line(first.caption)
            found.append({"name": first.name, "title": make_line(title), "caption": caption, "views": views})
    return found


def _draw_view(chart: Chart, places: dict[str, int], *, with_figures: bool) -> dict[str, Any] | None:
    try:  # may be a user's own specification
        svg, other = (spec and Markup(figures.draw_for_page(chart, spec, places)) for spec in (chart.spec, chart.other))
    except Exception:
        return None
    table = base64.b64encode(figures.write_table(chart).encode()).decode()
    files = [(kind, f"{FIGURES_FOLDER}/{chart.name}.{kind.lower()}") for kind in ("SVG", "PNG")] if with_figures else []
    return {
        "label": make_line(chart.view or chart.title),
        "svg": svg,
        "other": other,
        "is_log": chart.is_log,
        "csv": f"data:text/csv;charset=utf-8;base64,{table}",
        "name": chart.name,
        "files": files,
        "key": [(make_line(name), *_draw_mark(place)) for name, place in figures.place_series(chart, places).items()],
    }


# Marks in the keys, in a box of 10 by 10, in the order of `charts.SHAPES`.
_MARKS = (
    "M5 .5a4.5 4.5 0 1 0 .01 0Z",
    "M1 1h8v8h-8Z",
    "M5 .7 9.5 9h-9Z",
    "M5 0 10 5 5 10 0 5Z",
    "M5 9.3.5 1h9Z",
    "M3.5 0h3v3.5H10v3H6.5V10h-3V6.5H0v-3h3.5Z",
    "M0 4h10v2h-10Z",
)


def _draw_mark(place: int) -> tuple[str, Markup]:
    """The colour, as a CSS variable, and the mark of the series with this index."""
    color, path = f"var(--series-{place % len(PALETTE)})", _MARKS[place % len(_MARKS)]
    return color, Markup(f'<svg viewBox="0 0 10 10" aria-hidden="true"><path d="{path}" fill="currentColor"/></svg>')


def list_facts(runs: Sequence[Run]) -> list[str]:
    """The facts under the title: time, source of the text, device and precision, seeds."""

    def collect(*keys: str) -> str:
        found = [get_value(run.results, *keys) for run in runs]
        return ", ".join(dict.fromkeys(make_line(value) for value in found if value is not None and value != ""))

    created = collect("created") if len(runs) == 1 else ""
    seeds = collect("config", "seed")
    facts = [
        created[:16].replace("T", " "),
        f"{len(runs)} runs" if len(runs) > 1 else "",
        f"text: {source}" if (source := collect("data", "source")) else "",
        " ".join(filter(None, (collect("environment", "device"), collect("environment", "precision")))),
        f"seed{'s' if ',' in seeds else ''} {seeds}" if seeds else "",
    ]
    return [fact for fact in facts if fact]


def describe_origin(run: Run) -> dict[str, Any]:
    """What is needed to repeat the run: command, code, notes, data, environment and configuration."""
    results = run.results
    data = results.get("data") or {}
    known = {key: value for key, value in data.items() if key != "notes"}
    records = {"Data and its fingerprints": known, "Environment": results.get("environment")}
    records |= {"Configuration": results.get("config")}
    version, revision = (get_value(results, "code", key) for key in ("version", "git_revision"))
    code = ", ".join(filter(None, (version and f"new-llm {version}", revision and f"commit {revision[:12]}")))
    is_dirty = bool(code and get_value(results, "code", "git_dirty"))
    return {
        "name": run.name,
        "command": make_line(results.get("command") or ""),
        "code": make_line(f"{code}, with uncommitted changes" if is_dirty else code),
        "notes": [make_line(note) for note in (*results.get("notes", ()), *data.get("notes", ()), *run.notes)],
        "records": {
            title: make_printable(yaml.safe_dump(record, sort_keys=False, allow_unicode=True))
            for title, record in records.items()
            if record
        },
    }
