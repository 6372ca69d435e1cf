"""The reversal curse of models that know some sentences by heart, against loops over pairs."""

import contextlib
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from new_llm.config import UserError
from new_llm.data.reversal_pairs import ReversalPair, get_reversal_pairs
from new_llm.data.tokenizer import train_tokenizer
from new_llm.evaluation import evaluate_reversal_curse
from new_llm.models.inputs import IGNORE_INDEX, align_labels

PAIRS = [pair for pair in get_reversal_pairs() if pair.relation in ("capital", "novel")][::3]
PAIRS += [pair for pair in get_reversal_pairs() if pair.kind == "invented"][:7]
TOKENIZER = train_tokenizer([text for pair in PAIRS for text in (pair.forward, pair.backward)] * 3, 700)


def encode(text):
    return TOKENIZER.encode(text).ids


def make_pair(subject, object_):
    forward, backward = f"{subject} likes", f"{object_} is liked by"
    answers = f" {object_}.", f" {subject}."
    sentences = forward + answers[0], backward + answers[1]
    return ReversalPair("likes", subject, object_, "real", *sentences, forward, answers[0], backward, answers[1])


class KnownTexts(nn.Module):
    """A token costs 0.1 nats where some known text goes on with it, else 4 nats and a little by its id."""

    segment_length = 64

    def __init__(self, texts):
        super().__init__()
        ids = [tuple(encode(text)) for text in texts]
        self.prefixes = {text[:end] for text in ids for end in range(1, len(text) + 1)}
        self.held = "untouched"

    def token_loss(self, prefix, token):
        return 0.1 if (*prefix, token) in self.prefixes else 4.0 + token / 1000

    def token_losses(self, input_ids, labels, attention_mask=None, *, update_memory=False):
        assert not update_memory
        assert self.held == "empty"
        targets = align_labels(labels, input_ids.shape[1])
        losses = torch.zeros(targets.shape)
        for row, position in (targets != IGNORE_INDEX).nonzero().tolist():
            prefix = input_ids[row, : position + 1].tolist()
            losses[row, position] = self.token_loss(tuple(prefix), int(targets[row, position]))
        return losses

    @contextlib.contextmanager
    def fresh_memory(self, batch_size=None):
        self.held = "empty"
        yield
        self.held = "untouched"


def total_loss(model, ids, begin=1):
    return sum(model.token_loss(tuple(ids[:end]), ids[end]) for end in range(begin, len(ids)))


def read_pairs(model, pairs, direction):
    """Each pair's loss and tokens, those of the answer alone, and the answer's rank in its relation: [5, pairs]."""
    rows = []
    for pair in pairs:
        prompt, answer = getattr(pair, f"{direction}_prompt"), getattr(pair, f"{direction}_answer")
        ids, begin = encode(prompt + answer), len(encode(prompt))
        assert ids[:begin] == encode(prompt)
        others = {getattr(other, f"{direction}_answer") for other in pairs if other.relation == pair.relation}
        right, rivals = total_loss(model, ids), [total_loss(model, encode(prompt + one)) for one in others - {answer}]
        # summed in another order, ties differ in the last digits
        rank = 1 + sum((rival < right - 1e-9) + 0.5 * (abs(rival - right) <= 1e-9) for rival in rivals)
        rows.append((right, len(ids) - 1, total_loss(model, ids, begin), len(ids) - begin, rank))
    return np.array(rows).T


@pytest.mark.parametrize(("known", "batch_size"), [(PAIRS, 3), (PAIRS[::2], 128)], ids=["all", "half"])
def test_figures_are_those_of_loops_over_pairs_and_relations(known, batch_size):
    model = KnownTexts([pair.forward for pair in known])
    result = evaluate_reversal_curse(model, TOKENIZER, PAIRS, "cpu", batch_size=batch_size)
    assert model.held == "untouched"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER)
    assert evaluate_reversal_curse(model, wrapped, PAIRS, batch_size=batch_size) == result
    sizes = {name: scores.num_pairs for name, scores in result.per_relation.items()}
    assert sum(sizes.values()) == result.num_pairs == len(PAIRS)
    assert result.chance_accuracy == pytest.approx(np.mean([1 / sizes[pair.relation] for pair in PAIRS]))
    assert result.chance_mean_rank == pytest.approx(np.mean([(sizes[pair.relation] + 1) / 2 for pair in PAIRS]))
    for name, scores in ({"": result} | result.per_relation | result.by_kind).items():
        group = [pair for pair in PAIRS if name in ("", pair.relation, pair.kind)]
        assert scores.num_pairs == len(group)
        for direction in ("forward", "backward"):
            total, count, answer, answer_count, ranks = read_pairs(model, group, direction)
            expected = {
                f"{direction}_perplexity": math.exp(total.sum() / count.sum()),
                f"{direction}_answer_perplexity": math.exp(answer.sum() / answer_count.sum()),
                f"{direction}_accuracy": (ranks == 1).mean(),
                f"{direction}_mean_rank": ranks.mean(),
            }
            assert {key: getattr(scores, key) for key in expected} == pytest.approx(expected, rel=1e-6)
        assert scores.ratio == pytest.approx(scores.forward_perplexity / scores.backward_perplexity)
        assert scores.gap == pytest.approx(scores.backward_perplexity - scores.forward_perplexity)
        assert scores.answer_ratio == pytest.approx(
            scores.forward_answer_perplexity / scores.backward_answer_perplexity
        )


def test_a_token_across_the_border_of_prompt_and_answer_is_counted_whole():
    # A merge joins the end of the prompt "ab" with the answer "c.", but not with the answer "d.".
    vocabulary = {token: index for index, token in enumerate(["a", "b", "c", "d", ".", "bc", "e"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c")]))
    assert tokenizer.encode("abc.").tokens == ["a", "bc", "."]
    assert tokenizer.encode("abd.").tokens == ["a", "b", "d", "."]
    pairs = [
        ReversalPair("r", "a", "c", "real", "abc.", "ea.", "ab", "c.", "e", "a."),
        ReversalPair("r", "e", "d", "real", "ebd.", "ed.", "eb", "d.", "e", "d."),
    ]
    model = KnownTexts([])
    names = {index: token for token, index in vocabulary.items()}
    costs = {"a": {"bc": 3.0, "b": 2.0, "d": 2.0}, "e": {"bc": 5.0, "b": 2.0, "d": 2.0}}
    model.token_loss = lambda prefix, token: costs[names[prefix[0]]].get(names[token], 0.0)
    # "bc" against "b" and "d": 3 < 4 puts "abc." first, 5 > 4 "ebd."; both are right. Were the answer to
    # begin after the straddling token, or after the prompt's own tokens, one of them would be wrong.
    assert evaluate_reversal_curse(model, tokenizer, pairs).forward_accuracy == 1


def test_equal_answers_count_once_and_another_right_answer_does_not_compete():
    pairs = [
        make_pair("Ann", "tea"),
        make_pair("Bob", "tea"),  # the same answer forward; two right answers to one prompt backward
        make_pair("Eve", "milk"),
    ]
    model = KnownTexts([text for pair in pairs for text in (pair.forward, pair.backward)])
    result = evaluate_reversal_curse(model, TOKENIZER, pairs)
    assert result.forward_accuracy == result.backward_accuracy == 1
    assert result.chance_accuracy == pytest.approx((3 * (1 / 2) + 2 * (1 / 2) + 1 / 3) / 6)


def test_pairs_without_preference_have_the_mean_rank_of_a_guess_without_numbers_the_last_and_bad_ones_are_refused():
    model = KnownTexts([])
    pairs = [make_pair(name, thing) for name, thing in (("Ann", "X"), ("Bob", "Y"), ("Eve", "Z"))]
    for loss, rank in ((0.0, 2), (math.nan, 3)):
        model.token_loss = lambda prefix, token, loss=loss: loss
        result = evaluate_reversal_curse(model, TOKENIZER, pairs)
        assert (result.forward_mean_rank, result.chance_mean_rank, result.forward_accuracy) == (rank, 2, 0)
    empty = ReversalPair("r", "a", "a", "real", "a", "a", "", "a", "", "a")
    for bad, message in (([], "no pairs"), ([empty], "two tokens")):
        with pytest.raises(UserError, match=message):
            evaluate_reversal_curse(model, TOKENIZER, bad)


def test_intervals_are_those_of_a_naive_stratified_bootstrap():
    model = KnownTexts([pair.forward for pair in PAIRS[::3]] + [PAIRS[1].backward])
    result = evaluate_reversal_curse(model, TOKENIZER, PAIRS, num_resamples=3000, confidence=0.9, seed=1)
    assert [result.bootstrap[key] for key in ("num_resamples", "confidence", "seed")] == [3000, 0.9, 1]
    readings = {way: read_pairs(model, PAIRS, way) for way in ("forward", "backward")}
    rng = np.random.default_rng(0)
    for group, scores in ({"all": result} | result.per_relation | result.by_kind).items():
        members: dict[str, list[int]] = {}
        for index, pair in enumerate(PAIRS):
            if group in ("all", pair.relation, pair.kind):
                members.setdefault(pair.relation, []).append(index)
        drawn = {"gap": [], "ratio": [], "forward_mean_rank": [], "forward_accuracy": []}
        for _ in range(3000):
            chosen = np.concatenate([rng.choice(indices, len(indices)) for indices in members.values()])
            forward, backward = (
                math.exp(total[chosen].sum() / count[chosen].sum()) for total, count, *_ in readings.values()
            )
            ranks = readings["forward"][4][chosen]
            figures = (backward - forward, forward / backward, ranks.mean(), (ranks == 1).mean())
            for values, figure in zip(drawn.values(), figures, strict=True):
                values.append(figure)
        for name, values in drawn.items():
            expected, spread = np.quantile(values, [0.05, 0.95]), max(np.ptp(values), 1e-9)
            assert np.abs(np.array(scores.intervals[name]) - expected).max() <= 0.08 * spread, (group, name)
            assert scores.intervals[name][0] <= getattr(scores, name) <= scores.intervals[name][1]
