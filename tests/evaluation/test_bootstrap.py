import numpy as np
import pytest

from new_llm.evaluation.bootstrap import draw_resamples, find_interval


def test_each_resample_draws_as_many_items_as_there_are():
    table = draw_resamples(7, 200, seed=3)
    assert table.shape == (200, 7)
    assert (table.sum(1) == 7).all()
    assert (table == draw_resamples(7, 200, seed=3)).all()
    assert (table != draw_resamples(7, 200, seed=4)).any()


def test_the_interval_of_a_mean_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        values = rng.exponential(size=60)
        means = draw_resamples(60, 400, seed=trial) @ values / 60
        low, high = find_interval(means, 0.9)
        covered += low <= 1.0 <= high
    assert 0.82 <= covered / 200 <= 0.96


def test_a_difference_is_paired_by_one_table():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=50) * 10
    table = draw_resamples(50, 500, seed=0)
    low, high = find_interval((table @ (hard + 0.1) - table @ hard) / 50, 0.95)
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.1)


def test_odd_values():
    low, high = find_interval(np.array([np.nan, 1.0, 2.0, np.inf]), 0.95)
    assert (low, high) == (1.0, np.inf)
    assert np.isnan(find_interval(np.array([np.nan]), 0.95)).all()
    for wrong in (0.0, 1.0):
        with pytest.raises(ValueError, match="confidence"):
            find_interval(np.ones(3), wrong)
    with pytest.raises(ValueError, match="positive"):
        draw_resamples(0, 10, seed=0)
