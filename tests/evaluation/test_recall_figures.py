import numpy as np
import pytest

from new_llm.evaluation.estimate import find_share_interval
from new_llm.evaluation.recall_result import summarize_answers
from new_llm.evaluation.recall_scoring import Answer


def test_figures_of_known_answers():
    answers = [Answer(True, 1.0, True), Answer(False, 3.0, False), Answer(False, 1.0, True), Answer(False, 5.0, False)]
    figures = summarize_answers(answers, 0.95, 4000, 0)
    assert (figures.exact.value, figures.first.value, figures.mean_rank.value) == (0.25, 0.5, 2.5)
    rng = np.random.default_rng(1)
    means = rng.choice([1, 3, 1, 5], size=(20000, 4)).mean(1)
    assert figures.mean_rank[1:] == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.26)
    assert summarize_answers(answers[:1], 0.95, 10, 0).mean_rank == (1.0, None, None)


def test_wilson_interval():
    assert find_share_interval(10, 20, 0.95) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    assert find_share_interval(0, 20, 0.95) == pytest.approx((0, 0.1611), abs=1e-4)
    low, high = find_share_interval(20, 20, 0.95)
    assert (low, high) == pytest.approx((0.8389, 1), abs=1e-4)
    for hits, trials, confidence in ((1, 0, 0.9), (3, 2, 0.9), (1, 2, 1.0)):
        with pytest.raises(ValueError, match="no interval"):
            find_share_interval(hits, trials, confidence)
