import numpy as np
import pytest

from new_llm.evaluation.statistics import (
    compare_documents,
    draw_resamples,
    find_clustered_error,
    find_interval,
    find_share_interval,
    find_t_interval,
)


def test_the_interval_of_a_mean_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        values = rng.exponential(size=60)
        means = draw_resamples(60, 400, seed=trial) @ values / 60
        low, high = find_interval(means, 0.9)
        covered += low <= 1.0 <= high
    assert 0.82 <= covered / 200 <= 0.96


def test_odd_values():
    low, high = find_interval(np.array([np.nan, 1.0, 2.0, np.inf]), 0.95)
    assert (low, high) == (1.0, np.inf)
    assert np.isnan(find_interval(np.array([np.nan]), 0.95)).all()
    for wrong in (0.0, 1.0):
        with pytest.raises(ValueError, match="confidence"):
            find_interval(np.ones(3), wrong)
    with pytest.raises(ValueError, match="positive"):
        draw_resamples(0, 10, seed=0)


# Quantiles of Student's distribution from printed tables: degrees of freedom, confidence, t.
@pytest.mark.parametrize(
    ("freedom", "confidence", "quantile"),
    [(1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (4, 0.95, 2.776), (4, 0.99, 4.604), (9, 0.95, 2.262),
     (10, 0.9, 1.812), (29, 0.95, 2.045), (120, 0.95, 1.980)],
)  # fmt: skip
def test_the_t_interval_has_the_printed_quantiles(freedom, confidence, quantile):
    values = np.random.default_rng(freedom).normal(size=freedom + 1)
    low, high = find_t_interval(values, confidence)
    half = quantile * values.std(ddof=1) / np.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(half, rel=4e-4)
    assert (high + low) / 2 == pytest.approx(values.mean())


def test_one_seed_has_no_interval():
    assert find_t_interval([3.0], 0.95) == (None, None)
    with pytest.raises(ValueError, match="confidence"):
        find_t_interval([1.0, 2.0], 1.0)


def test_wilson_interval():
    assert find_share_interval(10, 20, 0.95) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    assert find_share_interval(0, 20, 0.95) == pytest.approx((0, 0.1611), abs=1e-4)
    low, high = find_share_interval(20, 20, 0.95)
    assert (low, high) == pytest.approx((0.8389, 1), abs=1e-4)
    for hits, trials, confidence in ((1, 0, 0.9), (3, 2, 0.9), (1, 2, 1.0)):
        with pytest.raises(ValueError, match=r"no interval|confidence"):
            find_share_interval(hits, trials, confidence)


def test_tokens_of_one_document_are_not_independent():
    """Losses that are the same within each document: the error is that of the documents, not of the tokens."""
    rng = np.random.default_rng(0)
    counts = np.full(40, 100)
    means = rng.normal(5.0, 1.0, size=40)
    error = find_clustered_error(means * counts, counts)
    assert error == pytest.approx(means.std(ddof=1) / np.sqrt(40))
    assert error > 9 * means.std() / np.sqrt(40 * 100)  # what independent tokens would give
    assert find_clustered_error((means * counts)[:4], counts[:4]) is None


def test_models_are_compared_document_by_document():
    rng = np.random.default_rng(0)
    counts = rng.integers(50, 200, size=30)
    hard = rng.normal(5.0, 1.0, size=30)

    def documents(losses, num=30):
        return {"num_tokens": counts[:num].tolist(), "total_nll": (losses * counts)[:num].tolist()}

    found = compare_documents(documents(hard - 0.05 + rng.normal(0, 0.01, size=30)), documents(hard))
    assert found.value == pytest.approx(np.expm1(-0.05), abs=0.005)
    assert -0.06 < found.low < found.value < found.high < -0.04  # though documents differ by a whole nat
    few = compare_documents(documents(hard - 0.05, 4), documents(hard, 4))
    assert few == (pytest.approx(np.expm1(-0.05)), None, None)
    assert compare_documents(documents(hard, 29), documents(hard)) is None
