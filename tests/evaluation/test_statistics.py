"""Statistics of measurements, and the windows of the sliding protocol."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from new_llm.evaluation.scoring import choose_rows, plan_windows
from new_llm.evaluation.statistics import (
    DocumentLosses,
    compare_models,
    find_interval,
    find_share_interval,
    find_t_interval,
)


def test_odd_values():
    low, high = find_interval(np.array([np.nan, 1.0, 2.0, np.inf]), 0.95)
    assert (low, high) == (1.0, np.inf)
    assert np.isnan(find_interval(np.array([np.nan]), 0.95)).all()


# Quantiles of Student's distribution from printed tables: degrees of freedom, confidence, t.
@pytest.mark.parametrize(
    ("freedom", "confidence", "quantile"),
    [(2, 0.95, 4.303), (4, 0.99, 4.604), (10, 0.9, 1.812), (120, 0.95, 1.980)],
)
def test_the_t_interval_has_the_printed_quantiles(freedom, confidence, quantile):
    values = np.random.default_rng(freedom).normal(size=freedom + 1)
    low, high = find_t_interval(values, confidence)
    half = quantile * values.std(ddof=1) / np.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(half, rel=4e-4)
    assert (high + low) / 2 == pytest.approx(values.mean())
    assert find_t_interval([3.0], 0.95) == find_t_interval([3.0, 4.0], 0.95) == (None, None)


def test_wilson_interval():
    assert find_share_interval(10, 20, 0.95) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    assert find_share_interval(0, 20, 0.95) == pytest.approx((0, 0.1611), abs=1e-4)
    low, high = find_share_interval(20, 20, 0.95)
    assert (low, high) == pytest.approx((0.8389, 1), abs=1e-4)


def make_losses(
    seed_spread: float, document_spread: float, effect: float, draw: int, seeds: int = 5, documents: int = 8
):
    """Two models' losses by seed, whose differences vary by seed and by document, and documents by a whole nat."""
    rng = np.random.default_rng(draw)
    counts = rng.integers(50, 200, size=documents)
    hard = rng.normal(5, 1, size=documents)
    worth = rng.normal(0, document_spread, documents) + rng.normal(0, seed_spread, seeds)[:, None] + effect
    one, other = (
        {seed: DocumentLosses.read(counts, (hard + own) * counts) for seed, own in enumerate(differences)}
        for differences in (worth, np.zeros((seeds, documents)))
    )
    return one, other


@pytest.mark.parametrize(("seed_spread", "document_spread"), [(0.02, 0.001), (0.001, 0.05), (0.02, 0.05)])
def test_an_interval_covers_and_an_effect_is_seen_as_often_as_said(seed_spread, document_spread):
    covered, seen, visible = 0, 0, []
    for draw in range(300):
        found = compare_models(*make_losses(seed_spread, document_spread, 0.0, draw))
        covered += found.low <= 0 <= found.high
        visible.append(found.smallest_visible)
    for draw in range(300):
        seen += compare_models(*make_losses(seed_spread, document_spread, float(np.mean(visible)), draw)).is_clear
    assert covered / 300 == pytest.approx(0.95, abs=0.035)
    assert seen / 300 == pytest.approx(0.8, abs=0.12)


def test_too_few_seeds_or_documents_and_other_splits_give_no_interval():
    def read(**numbers):
        return compare_models(*make_losses(0.01, 0.01, -0.05, 0, **numbers))

    assert read().relative.value == pytest.approx(np.expm1(read().nats))
    assert read(seeds=1).high < 0  # over documents alone
    assert read(seeds=2)[1:4] == read(documents=4)[1:4] == (None, None, None)
    one, other = make_losses(0.01, 0.01, -0.05, 0)
    assert compare_models(one, {7: other[0]}) is None
    moved = DocumentLosses.read(other[1].num_tokens[:, 0] + 1, other[1].total_nll[:, 0])
    assert compare_models(one, other | {1: moved}) is None


# windows


settings = st.integers(2, 40).flatmap(lambda context: st.tuples(st.just(context), st.integers(1, context)))


@given(st.integers(0, 200), settings)
def test_every_token_but_the_first_is_scored_once_with_context(length, setting):
    context, stride = setting
    windows = plan_windows(length, context, stride)
    scored = [index for window in windows for index in range(window.first_scored, window.end)]
    assert scored == list(range(1, length))
    for window in windows:
        assert 0 <= window.begin < window.first_scored < window.end <= length
        assert window.end - 1 - window.begin <= context  # what the model reads
        assert window.begin % stride == 0
        assert window.first_scored - window.begin >= min(window.first_scored, context - stride)


@pytest.mark.parametrize("stride", [0, 5])
def test_a_stride_that_would_skip_tokens_is_refused(stride):
    with pytest.raises(ValueError, match="stride"):
        plan_windows(10, context=4, stride=stride)


def test_rows_of_a_batch_are_as_many_as_idle_least_on_a_cpu_and_all_on_a_gpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_rows([8000] * 4, 512, 16, cpu) == 4
    assert choose_rows([8000, *[1000] * 8], 512, 16, cpu) == 2  # eight short ones beside the long one
    assert choose_rows([8000, *[1000] * 8], 512, 16, gpu) == 9
    assert choose_rows([8000] * 4, 512, 3, gpu) == 3
    assert choose_rows([], 512, 16, cpu) == 0
