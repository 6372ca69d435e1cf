"""Ranks, answer perplexities and bootstrap intervals of the reversal curse."""

import math

import numpy as np
import pytest
from reversal_stand_ins import PAIRS, KnownTexts, make_pair, make_tokenizer, total_loss

from new_llm.evaluation import evaluate_reversal_curse


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def naive_ranks(model, encode, pairs, direction):
    """1 + likelier answers of the relation + half of the equally likely ones, each distinct answer once."""
    ranks = []
    for pair in pairs:
        prompt, answer = getattr(pair, f"{direction}_prompt"), getattr(pair, f"{direction}_answer")
        others = {getattr(other, f"{direction}_answer") for other in pairs if other.relation == pair.relation}
        right = total_loss(model, encode(prompt + answer))
        rivals = [total_loss(model, encode(prompt + other)) for other in others - {answer}]
        # summed in another order, ties differ in the last digits
        ranks.append(1 + sum((r < right - 1e-9) + 0.5 * (abs(r - right) <= 1e-9) for r in rivals))
    return ranks


def naive_answer_perplexity(model, encode, pairs, direction):
    total = count = 0
    for pair in pairs:
        ids, prompt = encode(getattr(pair, direction)), encode(getattr(pair, f"{direction}_prompt"))
        assert ids[: len(prompt)] == prompt
        total += sum(model.token_loss(tuple(ids[:end]), ids[end]) for end in range(len(prompt), len(ids)))
        count += len(ids) - len(prompt)
    return math.exp(total / count)


def test_mean_ranks_and_answer_perplexities(tokenizer):
    def encode(text):
        return tokenizer.encode(text).ids

    model = KnownTexts([pair.forward for pair in PAIRS[::2]], encode)
    result = evaluate_reversal_curse(model, tokenizer, PAIRS)
    for direction in ("forward", "backward"):
        ranks = naive_ranks(model, encode, PAIRS, direction)
        assert getattr(result, f"{direction}_mean_rank") == pytest.approx(np.mean(ranks))
        found = getattr(result, f"{direction}_answer_perplexity")
        assert found == pytest.approx(naive_answer_perplexity(model, encode, PAIRS, direction), rel=1e-6)
        group = [pair for pair in PAIRS if pair.relation == "novel"]
        ranks = naive_ranks(model, encode, group, direction)
        assert getattr(result.per_relation["novel"], f"{direction}_mean_rank") == pytest.approx(np.mean(ranks))
    assert 1 < result.forward_mean_rank < result.chance_mean_rank
    sizes = [result.per_relation[pair.relation].num_pairs for pair in PAIRS]
    assert result.chance_mean_rank == pytest.approx(np.mean([(size + 1) / 2 for size in sizes]))
    assert result.answer_ratio == pytest.approx(result.forward_answer_perplexity / result.backward_answer_perplexity)


def test_a_model_without_preference_has_the_mean_rank_of_a_guess_and_one_without_numbers_the_last(tokenizer):
    model = KnownTexts([], lambda text: tokenizer.encode(text).ids)
    pairs = [make_pair("likes", name, thing) for name, thing in (("Ann", "X"), ("Bob", "Y"), ("Eve", "Z"))]
    for loss, rank in ((0.0, 2), (math.nan, 3)):
        model.token_loss = lambda prefix, token, loss=loss: loss
        result = evaluate_reversal_curse(model, tokenizer, pairs)
        assert (result.forward_mean_rank, result.chance_mean_rank, result.forward_accuracy) == (rank, 2, 0)


def test_intervals_are_those_of_a_naive_stratified_bootstrap(tokenizer):
    """Each pair's figures put together by hand; resamples drawn pair by pair within each relation."""

    def encode(text):
        return tokenizer.encode(text).ids

    model = KnownTexts([pair.forward for pair in PAIRS[::3]] + [PAIRS[1].backward], encode)
    result = evaluate_reversal_curse(model, tokenizer, PAIRS, num_resamples=3000, confidence=0.9, seed=1)
    assert [result.bootstrap[key] for key in ("num_resamples", "confidence", "seed")] == [3000, 0.9, 1]
    losses = {way: [total_loss(model, encode(getattr(p, way))) for p in PAIRS] for way in ("forward", "backward")}
    counts = {way: [len(encode(getattr(p, way))) - 1 for p in PAIRS] for way in ("forward", "backward")}
    ranks = naive_ranks(model, encode, PAIRS, "forward")
    rng = np.random.default_rng(0)
    for group, scores in ({"all": result} | result.per_relation | result.by_kind).items():
        members: dict[str, list[int]] = {}
        for index, pair in enumerate(PAIRS):
            if group in ("all", pair.relation, pair.kind):
                members.setdefault(pair.relation, []).append(index)
        drawn: dict[str, list[float]] = {"gap": [], "ratio": [], "forward_mean_rank": [], "forward_accuracy": []}
        for _ in range(3000):
            chosen = np.concatenate([rng.choice(indices, len(indices)) for indices in members.values()])
            forward, backward = (
                math.exp(np.array(losses[way])[chosen].sum() / np.array(counts[way])[chosen].sum())
                for way in ("forward", "backward")
            )
            drawn["gap"].append(backward - forward)
            drawn["ratio"].append(forward / backward)
            drawn["forward_mean_rank"].append(np.array(ranks)[chosen].mean())
            drawn["forward_accuracy"].append((np.array(ranks)[chosen] == 1).mean())
        for name, values in drawn.items():
            expected = np.quantile(values, [0.05, 0.95])
            spread = max(np.ptp(values), 1e-9)
            assert np.abs(np.array(scores.intervals[name]) - expected).max() <= 0.08 * spread, (group, name)
            assert scores.intervals[name].low <= getattr(scores, name) <= scores.intervals[name].high
