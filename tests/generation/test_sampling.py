"""Draws: the distribution, the limits, the seeds and the penalty."""

import pytest
import torch
from torch import Tensor

from model_cases import get_model, text_ids
from new_llm.config import UserError
from new_llm.config.model import GenerationConfig
from new_llm.models import sampling
from new_llm.models.sampling import TokenSampler, invert_cumulative

DRAWS = 4000


def make_sampler(rows: int = 1, vocab_size: int = 6, prompt: Tensor | None = None, **options) -> TokenSampler:
    ids = torch.zeros(rows, 1, dtype=torch.int64) if prompt is None else prompt
    config = GenerationConfig(do_sample=True, **options)
    return TokenSampler(config, ids, torch.ones_like(ids, dtype=torch.bool), vocab_size)


def count_draws(logits: Tensor, **options) -> Tensor:
    """The share of each token in many draws from one row's logits."""
    sampler = make_sampler(rows=DRAWS, vocab_size=len(logits), **options)
    return sampler.choose(logits.expand(DRAWS, -1)).bincount(minlength=len(logits)) / DRAWS


def assert_shares(found: Tensor, expected: Tensor) -> None:
    """Within 5 standard errors; what must not be drawn is not drawn at all."""
    bound = 5 * (expected * (1 - expected) / DRAWS).sqrt()
    assert bool(((found - expected).abs() <= bound).all()), (found, expected)


LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.6, -30.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax_at_a_temperature(temperature):
    assert_shares(count_draws(LOGITS, temperature=temperature), (LOGITS / temperature).softmax(-1))


def test_top_k_draws_among_the_k_likeliest():
    expected = torch.where(LOGITS >= 1.0, LOGITS, -torch.inf).softmax(-1)
    assert_shares(count_draws(LOGITS, top_k=3), expected)
    assert_shares(count_draws(LOGITS, top_k=100), LOGITS.softmax(-1))


@pytest.mark.parametrize("first_candidates", [2, 1024])
@pytest.mark.parametrize("top_p", [0.05, 0.45, 0.9])
def test_top_p_draws_among_the_fewest_that_reach_it(top_p, first_candidates, monkeypatch):
    monkeypatch.setattr(sampling, "FIRST_CANDIDATES", first_candidates)
    probabilities = LOGITS.softmax(-1)
    kept, total = torch.zeros_like(probabilities), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if total < top_p:
            kept[token] = probabilities[token]
        total += float(probabilities[token])
    assert_shares(count_draws(LOGITS, top_p=top_p), kept / kept.sum())


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}])
@pytest.mark.parametrize("name", ["pythia", "mixed"])
def test_the_narrowest_draw_is_greedy(name, options):
    model = get_model(name)
    prompt = text_ids(2, 7)
    greedy, _ = model.generate(prompt, max_new_tokens=12)
    drawn, _ = model.generate(prompt, max_new_tokens=12, do_sample=True, **options)
    assert torch.equal(drawn, greedy)
    for seed in range(20 if name == "pythia" else 0):  # also among equal logits
        logits = torch.randint(0, 3, (2, 500), generator=torch.Generator().manual_seed(seed)).float()
        if "temperature" not in options:
            assert torch.equal(make_sampler(2, 500, **options).choose(logits), logits.argmax(-1))


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.9, "repetition_penalty": 1.3}])
def test_a_rows_draws_do_not_depend_on_its_batch(options):
    """Row r draws by seed + r, so that equal prompts differ in one batch and a row alone can be had again."""
    model = get_model("mixed")
    prompts = text_ids(1, 7).expand(3, -1)
    together, _ = model.generate(prompts, max_new_tokens=12, do_sample=True, seed=5, **options)
    assert len({tuple(row) for row in together.tolist()}) == 3  # by three seeds
    for row in range(3):
        alone, _ = model.generate(prompts[:1], max_new_tokens=12, do_sample=True, seed=5 + row, **options)
        assert torch.equal(alone[0], together[row])


def test_a_share_of_the_whole_never_falls_on_probability_0():
    probabilities = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]] * 3)
    uniform = torch.tensor([[0.0], [0.5], [1 - 2**-53]], dtype=torch.float64)
    assert invert_cumulative(probabilities, uniform).tolist() == [1, 3, 3]
    assert invert_cumulative(probabilities[:1], torch.ones(1, 1, dtype=torch.float64)).tolist() == [3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("do_sample", [False, True])
def test_logits_that_are_not_finite_stop_in_one_line(value, do_sample):
    ids = torch.zeros(2, 1, dtype=torch.int64)
    sampler = TokenSampler(GenerationConfig(do_sample=do_sample), ids, torch.ones_like(ids, dtype=torch.bool), 6)
    logits = LOGITS.repeat(2, 1)
    logits[0, 5] = -torch.inf  # a token that is excluded
    sampler.choose(logits)
    logits[1, 3] = value
    with pytest.raises(UserError, match=r"the logits are NaN or infinite"):
        sampler.choose(logits)
