"""The rolling protocol, measurements that are stopped, and Hugging Face models read through the wrapper."""

import math

import numpy as np
import pytest
from evaluation_stand_ins import BigramModel, make_documents, make_split, read_naively
from hypothesis import given
from hypothesis import strategies as st

from new_llm.config import UserError
from new_llm.evaluation import (
    evaluate_independent,
    evaluate_rolling,
    evaluate_sliding_window,
    evaluate_streaming,
    plan_rolling_windows,
)

DOCUMENTS = make_documents([37, 1, 2, 64, 130, 16])
SPLIT = make_split(DOCUMENTS)
PREFIX = 4


def list_harness_windows(tokens, prefix, max_length):
    """(input, scored) of the harness's rolling windows: a context of one token, disjoint scores."""
    windows, predicted = [], 0
    while predicted < len(tokens):
        count = min(max_length, len(tokens) - predicted)
        end = predicted + count
        read = tokens[end - max_length - 1 : end - 1] if predicted else [prefix, *tokens[: count - 1]]
        windows.append((read, tokens[predicted:end]))
        predicted = end
    return windows


@given(st.integers(0, 200), st.integers(1, 40))
def test_rolling_windows_are_the_harness_s(length, context):
    tokens = list(range(100, 100 + length))
    prefixed = [PREFIX, *tokens]
    found = [
        (prefixed[window.begin : window.end - 1], prefixed[window.first_scored : window.end])
        for window in plan_rolling_windows(len(prefixed), context)
    ]
    assert found == list_harness_windows(tokens, PREFIX, context)
    assert [token for _, scored in found for token in scored] == tokens
    assert all(len(read) <= context for read, _ in found)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_rolling_scores_every_token(batch_size):
    model = BigramModel()
    losses = []
    for document in DOCUMENTS:
        for read, scored in list_harness_windows(document, PREFIX, 24):
            losses += read_naively(model, [*read, scored[-1]])[-len(scored) :]
    result = evaluate_rolling(model, SPLIT, context=24, prefix_token=PREFIX, batch_size=batch_size)
    assert result.num_tokens == result.num_planned == sum(map(len, DOCUMENTS))
    assert result.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-9)
    assert result.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / SPLIT.num_bytes.sum(), rel=1e-9)
    assert (result.protocol, result.context, result.prefix_token) == ("rolling", 24, PREFIX)


def test_rolling_cuts_whole_documents_and_needs_a_token():
    result = evaluate_rolling(BigramModel(), SPLIT, context=24, prefix_token=PREFIX, batch_size=2, max_tokens=45)
    assert result.num_tokens == 37 + 1 + 2
    with pytest.raises(UserError, match="nothing to score"):
        evaluate_rolling(BigramModel(), make_split([[]]), context=24, prefix_token=PREFIX, batch_size=2)
    with pytest.raises(ValueError, match="context: 0"):
        plan_rolling_windows(5, 0)


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda **options: evaluate_sliding_window(BigramModel(), SPLIT, context=16, stride=4, **options),
        lambda **options: evaluate_independent(BigramModel(), SPLIT, **options),
        lambda **options: evaluate_streaming(BigramModel(), SPLIT, segments_per_call=1, **options),
        lambda **options: evaluate_rolling(BigramModel(), SPLIT, context=8, prefix_token=PREFIX, **options),
    ],
    ids=["sliding", "independent", "streaming", "rolling"],
)
def test_a_stopped_measurement_is_partial_and_says_so(evaluate):
    whole = evaluate(batch_size=2)
    assert whole.is_complete
    assert whole.to_dict()["is_complete"]
    calls: list[int] = []

    def stop_at_third() -> bool:
        calls.append(1)
        return len(calls) >= 3

    partial = evaluate(batch_size=2, should_stop=stop_at_third)
    assert len(calls) == 3
    assert 0 < partial.num_tokens < partial.num_planned == whole.num_planned
    assert not partial.is_complete
    assert partial.num_bytes is partial.num_words is partial.bits_per_byte is partial.word_perplexity is None
    assert math.isfinite(partial.perplexity)
    # Asked to stop after the last batch, nothing is missing.
    late = evaluate(batch_size=10_000, should_stop=lambda: evaluate is None)
    assert late.is_complete
    assert late.num_bytes == whole.num_bytes
