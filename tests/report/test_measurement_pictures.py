import math
import re
from xml.etree import ElementTree

import pytest
from matplotlib.text import Text

from new_llm.config import UserError
from new_llm.report.distance_plot import name_range, plot_distance
from new_llm.report.heat_map import plot_recall
from new_llm.report.picture import save_picture


def estimate(value, spread=0.1):
    return {"value": value, "low": value - spread, "high": value + spread}


def make_range(start, end, carried, reset):
    return {
        "start": start,
        "end": end,
        "num_tokens": 5,
        "num_documents": 3,
        "perplexity": {"carried": estimate(carried), "reset": estimate(reset), "a$b$": estimate(9.0)},
        "differences": {"reset": {"nats": estimate(0.1), "relative": estimate(carried / reset - 1)}},
    }


def make_long(**changes):
    ranges = [make_range(0, 1024, 30.0, 31.0), make_range(1024, 2048, 28.0, 32.0), make_range(2048, None, 27.0, 33.0)]
    values = {"ranges": ranges, "overall": ranges[0], "num_documents": 3, "num_tokens": 15, "segment_length": 64}
    return values | {"confidence": 0.95, "is_complete": True} | changes


def words(figure):
    return " ".join(text.get_text() for text in figure.findobj(Text))


def test_ranges_are_named_in_thousands():
    names = [name_range({"start": a, "end": b}) for a, b in ((0, 1024), (2048, 4096), (100, 1500), (131072, None))]
    assert names == ["0–1k", "2k–4k", "100–1500", "128k+"]


def test_distance_plot_shows_each_way_and_the_changes():
    figure = plot_distance(make_long())
    upper, lower = figure.axes
    curves = {line.get_label(): list(line.get_ydata()) for line in upper.lines}
    assert curves == {"memory carried": [30, 28, 27], "memory reset": [31, 32, 33], "a$b$": [9, 9, 9]}
    assert list(lower.lines[0].get_ydata()) == pytest.approx(
        [100 * (c / r - 1) for c, r in ((30, 31), (28, 32), (27, 33))]
    )
    assert "1k–2k" in words(figure)
    assert "partial" not in words(figure)
    assert "partial" in words(plot_distance(make_long(is_complete=False)))


def test_distance_plot_leaves_out_what_is_not_finite():
    values = make_long()
    values["ranges"][1]["perplexity"]["reset"] = {"value": math.inf, "low": None, "high": None}
    values["ranges"][2]["perplexity"]["reset"] = {"value": None, "low": None, "high": None}  # JSON's infinity
    values["ranges"][0]["differences"] = {}
    upper = plot_distance(values).axes[0]
    assert list(upper.lines[1].get_xdata()) == [0]


def make_cell(task, length, depth, value):
    figures = {"exact": estimate(value), "first": estimate(value), "mean_rank": estimate(1 + 9 * (1 - value))}
    control = {"exact": estimate(0.0), "first": estimate(0.2), "mean_rank": estimate(5.5)}
    return {"task": task, "length": length, "depth": depth, "carried": figures, "reset": control}


def make_recall(cells, **changes):
    values = {"cells": cells, "num_candidates": 10, "chance_first": 0.1, "chance_rank": 5.5, "segment_length": 64}
    return values | {"num_trials": 8, "is_complete": True} | changes


def test_heat_map_has_a_number_for_each_cell_and_the_control():
    cells = [make_cell("passkey", length, depth, depth / length) for length in (1, 4) for depth in (0, 1)]
    figure = plot_recall(make_recall(cells[:-1], is_complete=False))
    exact, first, rank = figure.axes
    shown = {tuple(map(int, text.get_position())): text.get_text() for text in exact.texts}
    assert shown == {(0, 0): "0", (0, 1): "100", (1, 0): "0"}
    assert [text.get_text() for text in rank.texts] == ["10.0", "10.0", "1.0"]
    assert first.get_title() == "pass key: right answer ranked first (%)\nmemory reset 20 %; chance 10 %"
    assert "partial" in words(figure)
    assert len(plot_recall(make_recall([*cells, make_cell("facts", 1, 0, 1.0)])).axes) == 6
    plot_recall(make_recall([], num_trials=0))


@pytest.mark.parametrize(
    "figure", [plot_distance(make_long()), plot_recall(make_recall([make_cell("facts", 2, 0, 1)]))]
)
def test_pictures_stand_alone(figure, tmp_path):
    save_picture(figure, tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text()
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert not re.search(r"<text|<image|font-family|<script", svg)
    assert not re.search(r'href="(?!#)', svg)
    save_picture(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"ends with \.svg or \.png"):
        save_picture(figure, tmp_path / "a.gif")
    assert len(list(tmp_path.iterdir())) == 2
