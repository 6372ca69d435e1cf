"""The cache's vectorised components against loops that follow the module's equations word by word."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from new_llm.config import UserError
from new_llm.config.model import CacheConfig
from new_llm.models import cache
from new_llm.models.cache import Scored, TextCache, describe_cache, mix, score_match, score_ngrams, tune_weights

VOCAB_SIZE, NUM_TOKENS, HIDDEN_SIZE = 7, 61, 5
FEW_BITS = (7, 8, 9)  # so that a short text's matches reach every range


def make_text(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    tokens = torch.randint(VOCAB_SIZE, (NUM_TOKENS + 1,), generator=generator)
    model = torch.randn(NUM_TOKENS, VOCAB_SIZE, generator=generator, dtype=torch.float64).softmax(-1)
    return states, tokens, model


def mix_naively(config: CacheConfig, states: torch.Tensor, tokens: list[int], model: torch.Tensor) -> list[float]:
    """The distribution after the last token, one candidate after the other."""
    now = len(tokens) - 1
    distributions = {0: model.tolist()}
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
    length, bits = sum(component > 1 for component in distributions) - 1, 0.0
    if config.longest_match:
        shared = [next((n for n in range(32) if n > i or tokens[i - n] != tokens[now - n]), 32) for i in range(now)]
        length = max(shared, default=0)
        bits = sum(math.log2((i + 1) / (tokens[:i].count(tokens[i]) + 1)) for i in range(now + 1 - length, now + 1))
        if length:
            latest = max(i for i in range(now) if shared[i] == length)
            distributions[5] = [float(w == tokens[latest + 1]) for w in range(VOCAB_SIZE)]
    weights = config.weights[1 + min(length, 3) + (sum(bits >= least for least in FEW_BITS) if length >= 3 else 0)]
    total = sum(weights[component] for component in distributions)
    return [
        sum(weights[component] * found[w] for component, found in distributions.items()) / total
        for w in range(VOCAB_SIZE)
    ]


@pytest.mark.parametrize("cuts", [(NUM_TOKENS,), (1,) * NUM_TOKENS, (17, 1, 40, 3)])
@pytest.mark.parametrize(
    ("num_states", "ngram_order", "longest_match", "similarity"),
    [
        (0, 3, False, "cosine"),
        (9, 0, False, "dot"),
        (9, 2, False, "cosine"),
        (100, 1, True, "cosine"),
        (1, 3, True, "dot"),
        (0, 0, True, "dot"),
    ],
)
def test_every_distribution_equals_the_equations_however_the_text_is_cut(
    monkeypatch, cuts, num_states, ngram_order, longest_match, similarity
):
    monkeypatch.setattr(cache, "QUERY_ROWS", 8)
    monkeypatch.setattr(cache, "MATCH_BITS", FEW_BITS)
    config = CacheConfig(
        num_states=num_states, ngram_order=ngram_order, longest_match=longest_match, similarity=similarity, theta=1.5
    )
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
        scores.probabilities[:, 0] = model[piece].gather(1, targets[:, None])[:, 0]
        np.testing.assert_allclose(mix(scores, config.weights), found.gather(1, targets[:, None])[:, 0], rtol=1e-12)
        held.add(states[piece], tokens[piece])
        begin += length
    assert held.states is None or len(held.states) == min(num_states, NUM_TOKENS)


@pytest.mark.parametrize(
    "text", [[1, 2], [1, 1, 1], make_text()[1].tolist(), [3, *[1] * 80], [1, 2, 3] * 30 + [2, 3, 0] * 9]
)
def test_the_components_of_a_whole_text_are_those_of_its_stream(text):
    tokens = torch.tensor(text)
    states = torch.zeros(len(tokens) - 1, HIDDEN_SIZE)
    streamed = TextCache(CacheConfig(ngram_order=3, longest_match=True)).score(states, tokens[:-1], tokens[1:])
    matches, contexts = score_match(tokens.numpy())
    found = np.column_stack([score_ngrams(tokens.numpy(), 3), matches])
    np.testing.assert_array_equal(found, streamed.probabilities[:, 2:])
    np.testing.assert_array_equal(contexts, streamed.contexts)


def test_tuned_weights_are_the_best_on_a_grid():
    probabilities = np.random.default_rng(0).uniform(0.01, 1, (500, 6)) ** 2
    probabilities[:, 3:] = np.nan
    probabilities[0, 1] = np.nan
    scored = Scored(probabilities, np.zeros(500, np.int64))
    tuned = tune_weights(scored, CacheConfig().weights)
    assert tuned[3].tolist() == list(CacheConfig().weights[3])  # nothing was seen of it
    best = np.log(mix(scored, tuned)).mean()
    for a in np.linspace(0.01, 0.98, 30):
        for b in np.linspace(0, 1 - a, 20):
            assert np.log(mix(scored, [[a, b, 1 - a - b, 0, 0, 0]] * 8)).mean() <= best + 1e-4


def test_a_match_of_much_information_that_a_text_has_once_weighs_as_those_of_less():
    probabilities = np.full((301, 6), 0.5)
    probabilities[:, 5] = np.arange(301) % 3 > 0
    tuned = tune_weights(Scored(probabilities, np.array([*[6] * 300, 7])), CacheConfig().weights)
    assert tuned[6, 5] == pytest.approx(1 / 3, abs=0.1)  # 2/3 of the matches are right, where all others have one half
    np.testing.assert_allclose(tuned[7], tuned[6], atol=0.05)


def test_size_and_refusals():
    assert describe_cache(CacheConfig(num_states=254, ngram_order=2), 128, 4096) == {
        "state_numbers": 254 * 129,
        "state_bytes": 254 * 514,
        "bytes_per_token": 2,
    }
    assert describe_cache(CacheConfig(ngram_order=1), 128, 70_000)["bytes_per_token"] == 4
    with pytest.raises(UserError, match="the model's must be positive"):
        CacheConfig(weights=((0, 1, 0, 0, 0, 0),) * 8)
