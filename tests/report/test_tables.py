import io
import re
from typing import Any

import pytest
from report_runs import MODELS, make_seed
from rich.console import Console

from new_llm import formats
from new_llm.report import SummaryTable
from new_llm.report.results import group_series, make_run
from new_llm.report.tables import Summary, summarize


def show(results: dict[str, Any], width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(SummaryTable(results))
    return file.getvalue()


def find_summary(*runs: dict[str, Any], **options: Any) -> Summary:
    return summarize(group_series([make_run(results) for results in runs]), **options)


def find_column(summary: Summary, group: str, title: str) -> list[Any]:
    place = summary.headings.index((group, title))
    return [cells[place] for _, _, cells in summary.rows]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (formats.format_number(83.9271), "83.93"),
        (formats.format_number(2.5e12), "2.500e+12"),
        (formats.format_number(None), "—"),
        (formats.format_number(float("nan")), "NaN"),
        (formats.format_number(float("inf")), "∞"),
        (formats.format_with_error(83.9271, 0.5036), "83.93 ± 0.50"),
        (formats.format_with_error(83.9271, float("inf")), "83.93"),
        (formats.format_short(70426624), "70.4M"),
        (formats.format_bytes(1050624), "1.05 MB"),
        (formats.format_seconds(59.6), "1 min 00 s"),
        (formats.format_seconds(7800), "2 h 10 min"),
    ],
)
def test_numbers_and_names_read_well(written, expected):
    assert written == expected


@pytest.mark.parametrize("width", [60, 120])
def test_every_model_is_a_row_and_no_word_is_cut(four_models, width):
    text = show(four_models, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    entry = four_models["models"][1]
    sliding = entry["evaluation"]["sliding"]
    for word in (
        *("parameters", "sliding", "streaming", "backward", "tokens/s", sliding["verdict"]["level"]),
        formats.format_with_error(sliding["perplexity"], sliding["standard_error"]),
        *(formats.format_short(entry["cost"][key]) for key in ("state_numbers", "flops_per_token")),
        formats.format_bytes(entry["memory_info"]["total_bytes"]),
        formats.format_seconds(entry["training"]["cpu_seconds"]),
    ):
        assert re.search(rf"(?<!\S){re.escape(word)}(?!\S)", text), word
    rows = [line.split()[0] for line in lines if line.strip() and line.split()[0] in MODELS]
    assert tuple(rows[:4]) == MODELS
    assert rows.count("multi_memory") > {60: 4, 120: 2}[width]
    assert " has the lowest sliding-window perplexity: " in text


def test_only_the_best_of_a_figure_is_marked(results):
    for entry, share in zip(results["models"], (0.1, 0.2), strict=True):
        entry["evaluation"]["reversal"]["backward_accuracy"] = share
    summary = find_summary(results)
    assert [c.is_best for c in find_column(summary, "Validation perplexity", "sliding")] == [False, True]
    assert [c.is_best for c in find_column(summary, "Reversal curse", "backward first")] == [False, True]
    assert not any(cell.is_best for cell in find_column(summary, "Model", "parameters"))
    assert not any(cell.is_best for _, _, cells in find_summary(results, mark_best=False).rows for cell in cells)
    results["models"] = results["models"][:1]
    assert not any(cell.is_best for _, _, cells in find_summary(results).rows for cell in cells)


def test_seeds_are_a_mean_that_says_each(results):
    summary = find_summary(*(make_seed(results, seed, {"infini": 1.0 + seed}) for seed in (0, 1)))
    (cell,) = find_column(summary, "Validation perplexity", "sliding")
    assert cell.text == "114.0"
    assert cell.hint == "2 seeds: 76.00, 152.0; standard deviation 53.7"


def test_names_are_no_markup_and_drive_no_terminal(results):
    results["name"] = "[/red] run\x1b]0;title\x07"
    results["models"][0]["model_type"] = "[bold]pythia\x1b[2J\r"
    results["models"][0]["evaluation"]["sliding"]["verdict"] = {"level": "a\x1b[31m", "text": "b\x9b"}
    text = show(results, 300)
    assert "[bold]pythia" in text
    assert not set(text) & {"\x1b", "\x07", "\r", "\x9b"}
