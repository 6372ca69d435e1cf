import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from new_llm.report.points import Point, average, smooth, thin
from new_llm.report.scale import format_power, format_tick, list_log_ticks, make_scale, thin_labels

VALUES = st.lists(st.floats(min_value=-1e12, max_value=1e12), min_size=1, max_size=5)


@given(VALUES)
def test_every_value_has_a_place_between_the_ends_and_ticks_are_few(values: list[float]):
    scale = make_scale(values, 300.0, 20.0)
    assert all(20.0 <= scale(value) <= 300.0 for value in values)
    assert len(scale.ticks) <= 12
    assert all(scale.low <= tick <= scale.high * (1 + 1e-9) + 1e-9 for tick, _ in scale.ticks)


@given(st.lists(st.floats(min_value=1e-9, max_value=1e40), min_size=1, max_size=5))
def test_a_logarithmic_scale_keeps_ratios(values: list[float]):
    scale = make_scale(values, 0.0, 100.0, log=True)
    middle = math.exp((math.log(scale.low) + math.log(scale.high)) / 2)
    assert scale(middle) == pytest.approx(50.0)
    assert len(scale.ticks) <= 12


def test_an_axis_is_logarithmic_where_values_differ_much():
    assert make_scale([1.0, 9.0], 0, 1, log=None).is_log
    assert not make_scale([2.0, 9.0], 0, 1, log=None).is_log
    assert not make_scale([0.0, 9.0], 0, 1, log=None).is_log


def test_ticks_read_well():
    assert [words for _, words in make_scale([0, 300_000], 0, 1, low=0.0).ticks] == ["0", "100k", "200k", "300k"]
    assert list_log_ticks(1, 150) == [1, 2, 5, 10, 20, 50, 100]
    assert [format_power(value) for value in (0, 4e12, 2.5e18)] == ["0", "4e12", "2.5e18"]
    assert [format_tick(value) for value in (-0.5, 1_200_000)] == ["−0.5", "1.2M"]
    assert thin_labels(["aaaa"] * 6, 160) == ["aaaa", "", "aaaa", "", "aaaa", ""]


def test_seeds_become_a_mean_and_a_band():
    assert average(1.0, [2.0]) == Point(1.0, 2.0)
    assert average(1.0, [2.0, 6.0]) == Point(1.0, 4.0, 2.0, 6.0)


def test_smoothing_keeps_a_straight_line_and_thinning_its_ends():
    line = [Point(float(i), 3.0 * i, 2.0 * i, 4.0 * i) for i in range(1000)]
    assert smooth(line)[0] == line[0]
    assert [point.y for point in smooth(line)] == pytest.approx([point.y for point in line])
    thinned = thin(line)
    assert len(thinned) <= 301
    assert (thinned[0], thinned[-1]) == (line[0], line[-1])
