"""The cache's vectorised components against loops that follow the module's equations word by word."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from new_llm.config import UserError
from new_llm.config.model import CacheConfig
from new_llm.models import cache
from new_llm.models.cache import TextCache, describe_cache, mix, score_ngrams, tune_weights

VOCAB_SIZE, NUM_TOKENS, HIDDEN_SIZE = 7, 61, 5


def make_text(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    tokens = torch.randint(VOCAB_SIZE, (NUM_TOKENS + 1,), generator=generator)
    model = torch.randn(NUM_TOKENS, VOCAB_SIZE, generator=generator, dtype=torch.float64).softmax(-1)
    return states, tokens, model


def mix_naively(config: CacheConfig, states: torch.Tensor, tokens: list[int], model: torch.Tensor) -> list[float]:
    """The distribution after the last token, one candidate after the other."""
    now = len(tokens) - 1
    distributions: dict[int, list[float]] = {0: model.tolist()}
    past = range(max(0, now - config.num_states), now)
    if past:
        scores = [0.0] * VOCAB_SIZE
        for i in past:
            similarity = float(states[now] @ states[i])
            if config.similarity == "cosine":
                similarity /= float(states[now].norm() * states[i].norm())
            scores[tokens[i + 1]] += math.exp(config.theta * similarity)
        distributions[1] = [score / sum(scores) for score in scores]
    for order in range(1, config.ngram_order + 1):
        context = tokens[now + 2 - order :]
        ends = [i for i in range(order - 1, len(tokens)) if tokens[i - order + 1 : i] == context]
        if len(tokens) >= order - 1 and ends:
            counts = Counter(tokens[i] for i in ends)
            distributions[1 + order] = [counts[w] / len(ends) for w in range(VOCAB_SIZE)]
    weights = config.weights[sum(component > 1 for component in distributions)]
    total = sum(weights[component] for component in distributions)
    return [
        sum(weights[component] * found[w] for component, found in distributions.items()) / total
        for w in range(VOCAB_SIZE)
    ]


@pytest.mark.parametrize("cuts", [(NUM_TOKENS,), (1,) * NUM_TOKENS, (17, 1, 40, 3)])
@pytest.mark.parametrize(
    ("num_states", "ngram_order", "similarity"),
    [(0, 3, "cosine"), (9, 0, "dot"), (9, 2, "cosine"), (100, 1, "cosine"), (1, 3, "dot")],
)
def test_every_distribution_equals_the_equations_however_the_text_is_cut(
    monkeypatch, cuts, num_states, ngram_order, similarity
):
    monkeypatch.setattr(cache, "QUERY_ROWS", 8)
    config = CacheConfig(num_states=num_states, ngram_order=ngram_order, similarity=similarity, theta=1.5)
    states, tokens, model = make_text()
    held = TextCache(config)
    begin = 0
    for length in cuts:
        piece = slice(begin, begin + length)
        targets = tokens[begin + 1 : begin + length + 1]
        expected = [
            mix_naively(config, states, tokens[: end + 1].tolist(), model[end]) for end in range(begin, begin + length)
        ]
        found = held.mix(states[piece], tokens[piece], model[piece])
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-12)
        scores = held.score(states[piece], tokens[piece], targets)
        scores[:, 0] = model[piece].gather(1, targets[:, None])[:, 0]
        np.testing.assert_allclose(mix(scores, config.weights), found.gather(1, targets[:, None])[:, 0], rtol=1e-12)
        held.add(states[piece], tokens[piece])
        begin += length
    assert held.states is None or len(held.states) == min(num_states, NUM_TOKENS)


@pytest.mark.parametrize("length", [2, 3, NUM_TOKENS])
def test_the_ngrams_of_a_whole_text_are_those_of_its_stream(length):
    states, tokens, _ = make_text()
    tokens, states = tokens[:length], states[: length - 1]
    streamed = TextCache(CacheConfig(ngram_order=3)).score(states, tokens[:-1], tokens[1:])
    np.testing.assert_array_equal(score_ngrams(tokens.numpy(), 3), streamed[:, 2:])


def test_reading_ahead_leaves_no_trace():
    states, tokens, model = make_text()
    held, untouched = TextCache(CacheConfig(num_states=5, ngram_order=3)), TextCache(CacheConfig(ngram_order=3))
    for one in (held, untouched):
        one.add(states[:20], tokens[:20])
    held.score(states[20:], tokens[20:-1], tokens[21:])
    held.mix(states[20:], tokens[20:-1], model[20:])
    assert held.counts is not None
    assert untouched.counts is not None
    assert vars(held.counts) == vars(untouched.counts)
    assert torch.equal(held.tokens, tokens[15:20])


def test_tuned_weights_are_the_best_on_a_grid():
    generator = np.random.default_rng(0)
    probabilities = generator.uniform(0.01, 1, (500, 5)) ** 2
    probabilities[:, 3:] = np.nan
    probabilities[0, 1] = np.nan
    tuned = tune_weights(probabilities, CacheConfig().weights)
    assert tuned[3].tolist() == list(CacheConfig().weights[3])  # nothing was seen of it
    best = np.log(mix(probabilities, tuned)).mean()
    for a in np.linspace(0.01, 0.98, 30):
        for b in np.linspace(0, 1 - a, 20):
            assert np.log(mix(probabilities, [[a, b, 1 - a - b, 0, 0]] * 4)).mean() <= best + 1e-4


def test_size_and_refusals():
    config = CacheConfig(num_states=254, ngram_order=2)
    assert describe_cache(config, 128, 4096) == {
        "state_numbers": 254 * 129,
        "state_bytes": 254 * 514,
        "bytes_per_token": 2,
    }
    assert describe_cache(CacheConfig(ngram_order=1), 128, 70_000)["bytes_per_token"] == 4
    with pytest.raises(UserError, match="the model's must be positive"):
        CacheConfig(weights=((0, 1, 0, 0, 0),) * 4)
