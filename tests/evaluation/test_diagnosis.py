import math

import pytest

from new_llm.evaluation import diagnose_perplexity


@pytest.mark.parametrize(
    ("perplexity", "level", "range_"),
    [
        (0.5, "abnormal", "< 5"),
        (1.0, "abnormal", "< 5"),
        (4.99, "abnormal", "< 5"),
        (5, "suspicious", "5–30"),
        (30, "normal", "30–100"),
        (100, "normal", "100–500"),
        (500, "training", "500–1000"),
        (1000, "training", "500–1000"),
        (1000.1, "undertrained", "> 1000"),
        (14204, "undertrained", "> 1000"),
        (math.inf, "abnormal", "not finite"),
        (math.nan, "abnormal", "not finite"),
    ],
)
def test_verdicts(perplexity, level, range_):
    verdict = diagnose_perplexity(perplexity)
    assert (verdict.level, verdict.range) == (level, range_)
    assert ":" in verdict.text  # what it means: what to do
    assert verdict.to_dict() == {"level": level, "range": range_, "text": verdict.text}
