import copy
import csv
import io
import math
import re
from typing import Any

import pytest
from report_runs import MODELS, make_record, make_seed, pick, read_page, write_run
from rich.console import Console

from new_llm import formats
from new_llm.charts import Chart, bar_chart, heat_chart, line_chart, point_chart
from new_llm.config import UserError
from new_llm.report import SummaryTable, load_results, read_runs
from new_llm.report.figures import place_series
from new_llm.report.results import group_series, list_differences, make_run
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
        (" ".join(map(formats.format_number, (None, float("nan"), float("inf")))), "— NaN ∞"),
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


def names(*runs: dict[str, Any]) -> list[str]:
    return [one.name for one in group_series([make_run(results) for results in runs])]


def test_models_that_differ_otherwise_are_named_by_their_runs(results):
    other = copy.deepcopy(results)
    other["models"][1]["options"]["gate_init"] = 1.5
    # Pythia has no gate: it is the same model trained again.
    assert names(results, other) == ["pythia, whole", "infini, whole", "pythia, whole (2)", "infini, whole (2)"]
    other["name"] = "other"
    assert names(results, other)[2:] == ["pythia, other", "infini, other"]


def test_differences_leave_out_what_a_model_does_not_take(four_models):
    three = pick(four_models, "pythia", "infini", "multi_memory")
    rows = dict(list_differences(group_series([make_run(three)])))
    assert rows["model.num_memories"] == ["—", "—", "4"]
    assert rows["model.num_memory_heads"] == ["—", "1", "—"]
    assert "train.learning_rate" not in rows
    assert "model.hidden_size" not in rows


def test_runs_are_read_with_their_evaluations(with_long, tmp_path):
    folder = write_run(tmp_path / "a", with_long, make_record(with_long, "infini"))
    (folder / "evaluations" / "broken.json").write_text("{")
    (folder / "evaluations" / "future.json").write_text('{"record_version": 9, "kind": "long", "result": {}}')
    (run,) = read_runs([folder])
    assert [(one.model, one.text) for one in run.evaluations] == [("infini", "war.txt")]
    assert ["broken.json" in note or "future.json" in note for note in run.notes] == [True, True]
    assert "could not be read and is left out" in read_page([run]).read()
    with pytest.raises(UserError, match="given twice"):
        read_runs([folder, folder / "results.json"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"{}", "no schema_version; this version of new-llm reads schema_version 1"),
        (b'{"schema_version": 2}', "schema_version 2; this version"),
        (b'{"schema_version": 1, "models": {}}', "models: expected a list, found dict"),
    ],
)
def test_a_bad_file_gets_one_line(content, message, tmp_path):
    file = tmp_path / "results.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_results(file)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def read_values(chart: Chart) -> list[dict[str, Any]]:
    return chart.spec["data"]["values"]


def make_lines(rows: list[dict[str, Any]], **options: Any) -> Chart:
    return line_chart("loss", "Loss", "Lower is better.", rows, x="step", y="loss", series="model", **options)


@pytest.mark.parametrize("value", [None, "text", math.nan, math.inf, True, 10**400, [1]])
def test_rows_that_can_t_be_drawn_are_left_out_and_stay_in_the_table(value):
    rows = [{"step": 1, "loss": 2.0, "model": "a"}, {"step": 2, "loss": value, "model": "a"}]
    for chart in (
        make_lines(rows),
        bar_chart("b", "B", "", rows, x="model", y="loss"),
        point_chart("p", "P", "", rows, x="step", y="loss", series="model", x_log=True),
        heat_chart("h", "H", "", rows, x="step", y="model", value="loss"),
    ):
        assert len(read_values(chart)) == 1
        assert chart.rows == rows


def test_a_logarithmic_axis_holds_positive_numbers_alone():
    rows = [{"step": step, "loss": loss, "model": "a"} for step, loss in enumerate((-1.0, 0, 3.0))]
    assert [point["y"] for point in read_values(make_lines(rows, y_log=True))] == [3.0]
    assert len(read_values(make_lines(rows))) == 3
    assert make_lines(rows).other is None
    linear, logarithmic = make_lines(rows[2:]), make_lines(rows[2:], y_log=True)
    assert (linear.other, logarithmic.other) == (logarithmic.spec, linear.spec)


def test_seeds_of_a_model_become_their_mean_and_a_band():
    rows = [{"step": step, "loss": loss, "model": "a"} for loss in (2.0, 4.0) for step in (1, 2)]
    rows.append({"step": 3, "loss": 5.0, "model": "a"})  # only one seed reached it
    drawn = [(point["x"], point["y"], point.get("low"), point.get("high")) for point in read_values(make_lines(rows))]
    assert drawn == [(1, 3, 2, 4), (2, 3, 2, 4), (3, 5, None, None)]


def test_csv_holds_every_column_of_any_row():
    chart = make_lines(
        [{"step": 1, "loss": 2.5, "model": 'a, "b"'}, {"step": 2, "loss": None, "model": "c", "seed": 3}]
    )
    assert list(csv.DictReader(io.StringIO(chart.to_csv()))) == [
        {"step": "1", "loss": "2.5", "model": 'a, "b"', "seed": ""},
        {"step": "2", "loss": "", "model": "c", "seed": "3"},
    ]


def test_a_variety_stands_beside_its_owner():
    rows = [{"m": "a", "x": 1, "y": 5}, {"m": "a + 9", "of": "a", "x": 10, "y": 4}, {"m": "b", "x": 0, "y": 3}]
    rows.append({"m": "b + 9", "of": "b", "x": 9, "y": 2})
    chart = point_chart("p", "P", "", rows, x="x", y="y", series="m", owner="of", x_log=True)
    drawn = [(point["series"], point.get("from_x"), point.get("from_y")) for point in read_values(chart)]
    assert drawn == [("1 a", None, None), ("1 a", 1, 5), ("2 b", None, None)]  # b has no place on the axis
    assert place_series(chart, {}) == {"1 a": 0, "2 b": 1}
    assert [point["number"] for point in read_values(chart)] == ["1", "9", "9"]
