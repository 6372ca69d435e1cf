"""Which token each position predicts, and what a loss is measured on."""

import math

import pytest
import torch

from model_cases import assert_near, get_model, text_ids
from new_llm.models.loss import LossStatistics, align_labels


def test_position_t_predicts_token_t_plus_one():
    tokens = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    assert align_labels(tokens, 4).tolist() == [[1, 4, 1, -100], [9, 2, 6, -100]]
    assert align_labels(tokens, 3).tolist() == [[1, 4, 1], [9, 2, 6]]


@pytest.mark.parametrize("extra", [0, 1])
def test_token_losses_are_the_log_probabilities_of_the_next_tokens(extra):
    model = get_model("mixed", segment_length=4)
    text = text_ids(2, 10 + extra)
    ids = text[:, :10]
    with torch.no_grad():
        losses = model.token_losses(ids, text)
        probabilities = model(ids).log_softmax(-1)
    for row in range(2):
        for t in range(10):
            has_target = t + 1 < text.shape[1]
            expected = -probabilities[row, t, text[row, t + 1]] if has_target else torch.zeros(()).double()
            assert_near(losses[row, t], expected, 1e-12)


def test_masked_and_ignored_tokens_are_no_targets():
    model = get_model("mixed", segment_length=4)
    ids = text_ids(2, 9)
    labels = ids.clone()
    labels[0, 3] = -100
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, [0, 5]] = 0
    losses = model.token_losses(ids, labels, mask)
    expected = [[t not in (2, 8) for t in range(9)], [t not in (0, 4, 5, 8) for t in range(9)]]
    assert (losses != 0).tolist() == expected
    loss, statistics = model.compute_loss(ids, labels, mask)
    assert statistics.num_tokens == 7 + 5
    assert statistics.total_nll == pytest.approx(float(losses.sum().detach()))
    assert float(loss.detach()) == pytest.approx(statistics.total_nll / 12)
    assert statistics.perplexity == pytest.approx(math.exp(statistics.total_nll / 12), rel=1e-5)


def test_a_call_without_targets_has_no_mean_loss():
    model = get_model("mixed")
    ids = text_ids(1, 3)
    for labels in (torch.full_like(ids, -100), ids):
        mask = torch.tensor([[1, 0, 1]])
        with pytest.raises(ValueError, match="no token is predicted"):
            model.compute_loss(ids, labels, mask)
    assert math.isnan(LossStatistics(num_tokens=0, total_nll=0.0).perplexity)
