"""Charts as data: what is drawn of hostile rows, and the CSV beside them."""

import csv
import io
import math
from typing import Any

import pytest

from new_llm.charts import Chart, bar_chart, heat_chart, line_chart, point_chart
from new_llm.report.figures import place_series


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
