import json
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
from new_llm.models.loss import IGNORE_INDEX, align_labels

PAIRS = [pair for pair in get_reversal_pairs() if pair.relation in ("capital", "novel")][::3]
PAIRS += [pair for pair in get_reversal_pairs() if pair.kind == "invented"][:7]


def make_pair(relation, subject, object_, kind="real", verb=" likes"):
    forward_prompt, backward_prompt = f"{subject}{verb}", f"{object_} is liked by"
    return ReversalPair(
        relation=relation,
        subject=subject,
        object=object_,
        kind=kind,
        forward=f"{forward_prompt} {object_}.",
        backward=f"{backward_prompt} {subject}.",
        forward_prompt=forward_prompt,
        forward_answer=f" {object_}.",
        backward_prompt=backward_prompt,
        backward_answer=f" {subject}.",
    )


class KnownTexts(nn.Module):
    """A token costs 0.1 nats where some known text goes on with it, else 4 nats and a little by its id."""

    segment_length = 64

    def __init__(self, texts, encode):
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

    def fresh_memory(self, batch_size=None):
        model = self

        class Fresh:
            def __enter__(self):
                model.held = "empty"

            def __exit__(self, *error):
                model.held = "untouched"

        return Fresh()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([text for pair in PAIRS for text in (pair.forward, pair.backward)] * 3, 700)


def total_loss(model, ids):
    return sum(model.token_loss(tuple(ids[:end]), ids[end]) for end in range(1, len(ids)))


def naive_figures(model, encode, pairs, direction):
    """Perplexity and first-place accuracy of whole sentences, with no thought for where the answer begins."""
    total = count = first = 0
    for pair in pairs:
        prompt, answer = getattr(pair, f"{direction}_prompt"), getattr(pair, f"{direction}_answer")
        ids = encode(prompt + answer)
        total, count = total + total_loss(model, ids), count + len(ids) - 1
        others = {getattr(other, f"{direction}_answer") for other in pairs if other.relation == pair.relation}
        rivals = [total_loss(model, encode(prompt + other)) for other in others - {answer}]
        first += total_loss(model, ids) < min(rivals)
    return math.exp(total / count), first / len(pairs)


@pytest.mark.parametrize("batch_size", [3, 128])
def test_a_model_that_knows_the_forward_sentences_has_the_curse(tokenizer, batch_size):
    def encode(text):
        return tokenizer.encode(text).ids

    model = KnownTexts([pair.forward for pair in PAIRS], encode)
    result = evaluate_reversal_curse(model, tokenizer, PAIRS, "cpu", batch_size=batch_size)
    forward, backward = (naive_figures(model, encode, PAIRS, way) for way in ("forward", "backward"))
    assert (result.forward_perplexity, result.forward_accuracy) == pytest.approx(forward, rel=1e-6)
    assert (result.backward_perplexity, result.backward_accuracy) == pytest.approx(backward, rel=1e-6)
    assert result.forward_perplexity == pytest.approx(math.exp(0.1), rel=1e-6)
    assert result.forward_accuracy == 1
    assert result.backward_accuracy <= 1 / 3
    assert result.ratio == pytest.approx(result.forward_perplexity / result.backward_perplexity)
    assert result.gap == pytest.approx(result.backward_perplexity - result.forward_perplexity)
    assert result.ratio < 0.2
    assert model.held == "untouched"
    sizes = {name: scores.num_pairs for name, scores in result.per_relation.items()}
    assert sizes["capital"] == sizes["novel"] == 8
    assert sum(sizes.values()) == result.num_pairs == len(PAIRS)
    chance = np.mean([1 / sizes[pair.relation] for pair in PAIRS])
    assert result.chance_accuracy == pytest.approx(chance)
    for name, scores in result.per_relation.items():
        group = [pair for pair in PAIRS if pair.relation == name]
        figures = naive_figures(model, encode, group, "backward")
        assert (scores.backward_perplexity, scores.backward_accuracy) == pytest.approx(figures, rel=1e-6)
    assert result.by_kind["invented"].num_pairs == 7
    assert result.by_kind["real"].num_pairs == len(PAIRS) - 7


def test_a_model_that_knows_both_directions_has_ratio_one(tokenizer):
    texts = [text for pair in PAIRS for text in (pair.forward, pair.backward)]
    model = KnownTexts(texts, lambda text: tokenizer.encode(text).ids)
    result = evaluate_reversal_curse(model, tokenizer, PAIRS)
    assert (result.ratio, result.gap) == pytest.approx((1, 0), abs=1e-6)
    assert result.forward_accuracy == result.backward_accuracy == 1


def test_an_ignorant_model_ties_or_prefers_one_answer_and_stays_at_chance(tokenizer):
    model = KnownTexts([], lambda text: tokenizer.encode(text).ids)
    result = evaluate_reversal_curse(model, tokenizer, PAIRS)
    assert result.forward_accuracy <= result.chance_accuracy + 1e-9
    assert result.backward_accuracy <= result.chance_accuracy + 1e-9
    model.token_loss = lambda prefix, token: 2.0  # the first of equals is not first
    pairs = [make_pair("likes", "Ann", "X"), make_pair("likes", "Bob", "Y")]
    result = evaluate_reversal_curse(model, tokenizer, pairs)
    assert (result.forward_accuracy, result.chance_accuracy) == (0, 0.5)
    assert result.forward_perplexity == pytest.approx(math.exp(2))


def test_a_transformers_tokenizer_gives_the_same(tokenizer):
    model = KnownTexts([pair.forward for pair in PAIRS[:8]], lambda text: tokenizer.encode(text).ids)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert evaluate_reversal_curse(model, wrapped, PAIRS[:8]) == evaluate_reversal_curse(model, tokenizer, PAIRS[:8])


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
    model = KnownTexts([], tokenizer.encode)
    names = {index: token for token, index in vocabulary.items()}
    costs = {"a": {"bc": 3.0, "b": 2.0, "d": 2.0}, "e": {"bc": 5.0, "b": 2.0, "d": 2.0}}
    model.token_loss = lambda prefix, token: costs[names[prefix[0]]].get(names[token], 0.0)
    # "bc" against "b" and "d": 3 < 4 puts "abc." first, 5 > 4 "ebd."; both are right. Were the answer to
    # begin after the straddling token, or after the prompt's own tokens, one of them would be wrong.
    assert evaluate_reversal_curse(model, tokenizer, pairs).forward_accuracy == 1


def test_equal_answers_count_once_and_another_right_answer_does_not_compete(tokenizer):
    def encode(text):
        return tokenizer.encode(text).ids

    pairs = [
        make_pair("likes", "Ann", "tea"),
        make_pair("likes", "Bob", "tea"),  # the same answer forward; two right answers to one prompt backward
        make_pair("likes", "Eve", "milk"),
    ]
    model = KnownTexts([text for pair in pairs for text in (pair.forward, pair.backward)], encode)
    result = evaluate_reversal_curse(model, tokenizer, pairs)
    assert result.forward_accuracy == result.backward_accuracy == 1
    assert result.chance_accuracy == pytest.approx((3 * (1 / 2) + 2 * (1 / 2) + 1 / 3) / 6)


def test_results_are_plain_json(tokenizer):
    model = KnownTexts([], lambda text: tokenizer.encode(text).ids)
    values = json.loads(json.dumps(evaluate_reversal_curse(model, tokenizer, PAIRS).to_dict(), allow_nan=False))
    figures = {
        "num_pairs",
        "forward_perplexity",
        "backward_perplexity",
        "forward_accuracy",
        "backward_accuracy",
    }
    figures |= {"chance_accuracy", "ratio", "gap"}
    assert set(values) == figures | {"per_relation", "by_kind"}
    assert set(values["by_kind"]) == {"real", "invented"}
    assert set(values["by_kind"]["real"]) == figures
    assert set(values["per_relation"][0]) == figures | {"relation"}


def test_bad_pairs_are_refused_in_one_line(tokenizer):
    model = KnownTexts([], lambda text: tokenizer.encode(text).ids)
    with pytest.raises(UserError, match="no pairs"):
        evaluate_reversal_curse(model, tokenizer, [])
    empty = ReversalPair("r", "a", "a", "real", "a", "a", "", "a", "", "a")
    with pytest.raises(UserError, match="two tokens"):
        evaluate_reversal_curse(model, tokenizer, [empty])
