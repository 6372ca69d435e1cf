"""Greedy generation by the stream equals greedy generation that computes the whole text anew at every step."""

import pytest
import torch
from torch import Tensor

from model_cases import (
    MIXED_STACKS,
    assert_states_equal,
    assert_states_near,
    build_selective,
    get_model,
    text_ids,
)
from new_llm import TransformerLM
from new_llm.config.model import CacheConfig
from new_llm.evaluation import CachedModel
from new_llm.models.generation import LOOK_EVERY

NEW_TOKENS = 14  # across two ends of segments of 5 at least


def recompute(model: TransformerLM, ids: Tensor, num_tokens: int) -> Tensor:
    with torch.no_grad():
        for _ in range(num_tokens):
            ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids


@pytest.mark.parametrize("prompt_length", [1, 13])
@pytest.mark.parametrize("name", ["pythia", *MIXED_STACKS])
def test_stream_equals_recomputing_token_for_token(name, prompt_length):
    model = get_model(name)
    with torch.no_grad():
        model(text_ids(1, 8, start=60), update_memory=True)
    prompt = text_ids(2, prompt_length)
    ids, statistics = model.generate(prompt, max_new_tokens=NEW_TOKENS)
    assert torch.equal(ids, recompute(model, prompt, NEW_TOKENS))
    assert ids.shape == (2, prompt_length + NEW_TOKENS)
    assert (statistics.num_tokens, statistics.num_prompt_tokens) == (2 * NEW_TOKENS, 2 * prompt_length)
    assert (statistics.passes, statistics.row_tokens) == (1, (NEW_TOKENS, NEW_TOKENS))
    assert statistics.finish_reasons == ("length", "length")
    assert 0 < statistics.prompt_seconds < statistics.seconds
    assert statistics.tokens_per_second == pytest.approx(2 * NEW_TOKENS / statistics.seconds)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cached_row_continues_as_the_cached_model_says_token_by_token(side):
    model, lengths = get_model("mixed"), (3, 11)
    config = CacheConfig(num_states=6, ngram_order=3, theta=2.0)
    whole = text_ids(2, 11)
    mask = torch.stack([torch.arange(11) < n if side == "right" else torch.arange(11) >= 11 - n for n in lengths])
    ids, _ = model.generate(whole, mask, max_new_tokens=NEW_TOKENS, cache=config)
    plain, _ = model.generate(whole, mask, max_new_tokens=NEW_TOKENS)
    assert not torch.equal(ids, plain)
    for row in range(2):
        text = whole[row : row + 1, mask[row]]
        with torch.inference_mode():
            for _ in range(NEW_TOKENS):
                text = torch.cat((text, CachedModel(model, config)(text)[:, -1].argmax(-1, keepdim=True)), dim=1)
        assert torch.equal(ids[row, 11:], text[0, lengths[row] :])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["mixed", "infini-tokens", "selective"])
def test_each_row_of_unequal_prompts_goes_on_as_it_would_alone(name, side):
    model = build_selective("mixed", 1) if name == "selective" else get_model(name)
    lengths = (3, 11, 5)
    whole = text_ids(3, 11)
    mask = torch.arange(11) < torch.tensor(lengths).unsqueeze(1)
    ids = whole.clone()
    if side == "left":
        mask = mask.flip(1)
        for row, length in enumerate(lengths):
            ids[row] = whole[row].roll(11 - length)
    together, _ = model.generate(ids, mask.long(), max_new_tokens=NEW_TOKENS)
    assert torch.equal(together[:, :11], ids)
    for row, length in enumerate(lengths):
        alone = recompute(model, whole[row : row + 1, :length], NEW_TOKENS)
        assert together[row, 11:].tolist() == alone[0, length:].tolist()


@pytest.mark.parametrize(("name", "look_every"), [("mixed", 1), ("infini-tokens", 1), ("mixed", 5)])
def test_rows_that_end_early_are_padded_and_leave_the_others_alone(name, look_every, monkeypatch):
    monkeypatch.setitem(LOOK_EVERY, "cpu", look_every)
    model = get_model(name)
    prompt = text_ids(3, 7)
    free, _ = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=True)
    new = free[:, 7:].tolist()
    ends = (new[0][3], new[1][8])
    options = {"do_sample": True, "eos_token_id": ends, "pad_token_id": 1}
    found, statistics = model.generate(prompt, max_new_tokens=NEW_TOKENS, **options)
    counts = [next((n + 1 for n, token in enumerate(row) if token in ends), NEW_TOKENS) for row in new]
    assert len(set(counts)) > 1
    assert statistics.row_tokens == tuple(counts)
    assert statistics.num_tokens == sum(counts)
    assert statistics.finish_reasons == tuple("stop" if set(ends) & set(row) else "length" for row in new)
    assert found.shape[1] == 7 + max(counts)
    for row, count in enumerate(counts):
        assert found[row, 7:].tolist() == new[row][:count] + [1] * (max(counts) - count)


@pytest.mark.parametrize("name", ["mixed", "infini-tokens"])
@pytest.mark.parametrize("rows", [None, 2])
def test_held_memory_changes_only_when_asked(name, rows):
    """Then it holds all tokens of the rows, also of one that ended early, and no padding."""
    model = get_model(name)
    model.reset_memory(rows)
    with torch.no_grad():
        model(text_ids(2, 8, start=60), update_memory=True)
    held = model.get_memory_state()
    prompt, mask = text_ids(2, 9), torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    free, _ = model.generate(prompt, mask, max_new_tokens=NEW_TOKENS, do_sample=True)
    assert_states_equal(model.get_memory_state(), held)
    options = {"do_sample": True, "eos_token_id": int(free[0, 13]), "update_memory": True}
    ids, statistics = model.generate(prompt, mask, max_new_tokens=NEW_TOKENS, **options)
    found = model.get_memory_state()
    assert min(statistics.row_tokens) < NEW_TOKENS
    model.set_memory_state(held)
    made = torch.arange(ids.shape[1] - 9) < torch.tensor(statistics.row_tokens).unsqueeze(1)
    with torch.no_grad():
        model(ids, torch.cat((mask.bool(), made), 1), update_memory=True)
    assert_states_near(found, model.get_memory_state(), 1e-9)
