import math
from collections import Counter

import numpy as np
import pytest
from reversal_stand_ins import PAIRS, KnownTexts, make_pair, make_tokenizer, total_loss
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from new_llm.config import UserError
from new_llm.data.reversal_pairs import ReversalPair
from new_llm.evaluation import evaluate_reversal_curse


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


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


def test_too_many_sentences_are_refused_before_any_is_read(tokenizer):
    model = KnownTexts([], lambda text: tokenizer.encode(text).ids)
    needed = 2 * (8**2 + 8**2) + sum(
        2 * count**2 for count in Counter(p.relation for p in PAIRS if p.kind == "invented").values()
    )
    evaluate_reversal_curse(model, tokenizer, PAIRS, max_sentences=needed)
    with pytest.raises(UserError, match=rf"{needed:,} prompts .* at most {needed - 1:,} .* --pairs-per-relation"):
        evaluate_reversal_curse(model, tokenizer, PAIRS, max_sentences=needed - 1)


def test_bad_pairs_are_refused_in_one_line(tokenizer):
    model = KnownTexts([], lambda text: tokenizer.encode(text).ids)
    with pytest.raises(UserError, match="no pairs"):
        evaluate_reversal_curse(model, tokenizer, [])
    empty = ReversalPair("r", "a", "a", "real", "a", "a", "", "a", "", "a")
    with pytest.raises(UserError, match="two tokens"):
        evaluate_reversal_curse(model, tokenizer, [empty])
