"""The report: one self-contained HTML page from the results of one run or several."""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from new_llm import formats
from new_llm.config.atomic import write_text_atomically
from new_llm.report import sections, tables
from new_llm.report.evaluation_plots import plot_distances
from new_llm.report.learning_plots import COUNTED, plot_costs, plot_training_loss, plot_validation
from new_llm.report.memory_plots import (
    list_final_alphas,
    plot_alphas,
    plot_final_gates,
    plot_gate_trajectories,
    plot_memory_usage,
)
from new_llm.report.outcome import describe_series
from new_llm.report.perplexity_plots import plot_overview, plot_positions
from new_llm.report.recall_plots import plot_recalls
from new_llm.report.results import get_value
from new_llm.report.reversal_plots import plot_reversal_accuracy, plot_reversal_perplexity
from new_llm.report.runs import Run, make_run
from new_llm.report.series import Series, group_series, list_differences
from new_llm.report.svg import Chart, color, marker_path

PAGE_FOLDER = "page"
TEMPLATES = ("page.html", "parts.html", "sections.html", "style.css", "script.js")
# How a verdict's badge looks; a level that is not here looks neutral.
BADGES = {
    "abnormal": "bad",
    "suspicious": "warn",
    "normal": "good",
    "undertrained": "info",
    "training": "info",
}


def write_report(results: dict[str, Any], path: Path) -> None:
    """Write the page of one run, with the evaluations that lie beside it; what the results lack is left out.

    The page loads nothing: style, script and pictures are inside it. The file appears whole or not at all.

    Args:
        results: as in results.json. NaN and infinite numbers may occur.
        path: the .html file in the run's folder; an older file is replaced.
    """
    write_page([make_run(results, path.parent)], path)


def write_page(runs: Sequence[Run], path: Path) -> None:
    """Write the page of some runs; the file's folder is made where it is missing."""
    # JSON may hold lone surrogates, which UTF-8 can't.
    write_text_atomically(path, render_page(runs).encode("utf-8", "replace").decode("utf-8"))


def render_report(results: dict[str, Any]) -> str:
    """The page's text for one run's results alone."""
    return render_page([Run(json.loads(json.dumps(results, default=str)))])


def render_page(runs: Sequence[Run]) -> str:
    """The page's text: the same runs give the same text."""
    series = group_series(runs)
    outcome = describe_series(series, runs)
    charts = draw_charts(series, runs)
    files = {name: _read(name) for name in TEMPLATES}
    environment = Environment(
        loader=DictLoader(files), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": formats.format_number,
        "count": formats.format_count,
        "short": formats.format_short,
        "bytes": formats.format_bytes,
        "percent": formats.format_percent,
        "seconds": formats.format_seconds,
    }
    script = files["script.js"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}",
        created=sections.format_time(runs[0].results.get("created")) if len(runs) == 1 else "",
        facts=sections.list_facts(runs),
        unfinished=[
            (run.name, status) for run in runs if (status := str(run.results.get("status") or "unknown")) != "complete"
        ],
        outcome=outcome,
        keys=[(one.name, color(one.index), marker_path(one.index)) for one in series],
        groups=[(group, len(list(members))) for group, members in groupby(tables.COLUMNS, lambda c: c.group)],
        columns=tables.COLUMNS,
        rows=tables.summarize_series(series, runs, mark_best=outcome.is_comparable),
        pairs=sections.list_pairs(series),
        badges=BADGES,
        verdicts=sections.list_verdicts(series),
        measured=sections.describe_measurement(series),
        charts={chart.name: chart for group in charts.values() for chart in group},
        chart_groups=charts,
        training=sections.list_training(series),
        counted=COUNTED,
        layers=sections.list_layers(series),
        alphas=list_final_alphas(series),
        reversal=sections.list_reversal(series),
        evaluations=sections.list_evaluations(runs),
        differences=list_differences(series),
        origins=[_describe_origin(run) for run in runs],
        svg=Markup,
        script=Markup(script),
        style=Markup(files["style.css"]),
        digest=digest,
        plots=Markup(_embed(charts)),
    )


def draw_charts(series: Sequence[Series], runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """Every picture that the results have numbers for, by the page's sections."""
    charts: dict[str, list[Chart | None]] = {
        "perplexity": [plot_overview(series, runs), plot_positions(series)],
        "learning": [plot_validation(series), plot_training_loss(series), plot_costs(series)],
        "documents": list(plot_distances(series)),
        "recall": list(plot_recalls(series)),
        "reversal": [plot_reversal_perplexity(series), plot_reversal_accuracy(series)],
        "memory": [
            plot_final_gates(series),
            plot_gate_trajectories(series),
            plot_alphas(series),
            *map(plot_memory_usage, series),
        ],
    }
    return {section: [chart for chart in found if chart is not None] for section, found in charts.items()}


def _read(name: str) -> str:
    return resources.files("new_llm.report").joinpath(PAGE_FOLDER, name).read_text("utf8")


def _embed(charts: dict[str, list[Chart]]) -> str:
    """Scales and points of the charts as JSON that can't end its element."""
    plots = {
        f"{chart.name}-{number}": view.plot
        for group in charts.values()
        for chart in group
        for number, view in enumerate(chart.views)
        if view.plot is not None
    }
    text = json.dumps(plots, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _describe_origin(run: Run) -> dict[str, Any]:
    """What it takes to make the run again."""
    results = run.results
    config = results.get("config")
    data = get_value(results, "data")
    notes = [get_value(results, "notes"), get_value(data, "notes"), list(run.notes)]
    return {
        "name": run.name,
        "command": str(results.get("command") or ""),
        "revision": sections.describe_revision(results),
        "data": [leaf for leaf in sections.flatten_facts(data) if leaf[0] != "notes"],
        "environment": sections.flatten_facts(get_value(results, "environment")),
        "notes": [str(note) for group in notes if isinstance(group, list) for note in group],
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
    }
