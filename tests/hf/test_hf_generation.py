"""`generate()` of Hugging Face against this project's own, and against itself without a cache."""

import copy
from typing import Any

import pytest
import torch

from model_cases import MIXED_STACKS, assert_states_equal, build_selective, get_model, text_ids
from new_llm.models.hf import NewLLMForCausalLM, StreamCache

STACKS = ("pythia", *MIXED_STACKS, "selective")
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}


def wrap(name: str, dtype: torch.dtype = torch.float64) -> NewLLMForCausalLM:
    model = build_selective("mixed", 2).to(dtype) if name == "selective" else get_model(name, dtype=dtype)
    return NewLLMForCausalLM.from_model(model).eval()


def padded(side: str, length: int = 13) -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 13, 9 and 4 tokens; a padded place holds another token than 0, which must not be read."""
    ids = text_ids(3, length)
    mask = torch.ones_like(ids)
    for row, missing in ((1, 4), (2, 9)):
        mask[row, slice(None, missing) if side == "left" else slice(-missing, None)] = 0
    return ids.masked_fill(mask == 0, 7), mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", STACKS)
def test_greedy_equals_our_own_token_for_token(name, side, dtype):
    """Segments of 5: prompts and what follows cross several segment ends, each row at its own place."""
    hf = wrap(name, dtype=dtype)
    ids, mask = padded(side)
    ours, _ = hf.model.generate(ids, mask, max_new_tokens=17)
    for use_cache in (True, False):
        theirs = hf.generate(input_ids=ids, attention_mask=mask, max_new_tokens=17, use_cache=use_cache, **GREEDY)
        assert torch.equal(theirs, ours), use_cache


def test_greedy_begins_from_the_held_memory_and_leaves_it():
    hf = wrap("mixed")
    ids = text_ids(1, 7)
    empty = hf.generate(input_ids=ids, max_new_tokens=12, **GREEDY)
    hf.model(text_ids(1, 40, start=9), update_memory=True)
    before = hf.model.get_memory_state()
    filled = hf.generate(input_ids=ids, max_new_tokens=12, **GREEDY)
    assert torch.equal(filled, hf.model.generate(ids, max_new_tokens=12)[0])
    assert not torch.equal(filled, empty)
    assert_states_equal(hf.model.get_memory_state(), before)
    hf(ids, update_memory=True)
    written = hf.model.get_memory_state()
    hf.model.set_memory_state(before)
    hf.model(ids, update_memory=True)
    assert_states_equal(written, hf.model.get_memory_state())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", STACKS)
def test_beams_with_the_cache_equal_beams_without(name, side):
    hf = wrap(name)
    ids, mask = padded(side)
    found = [
        hf.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=11, num_beams=4, num_return_sequences=2,
            use_cache=use_cache, **GREEDY,
        )
        for use_cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(*found)
    alone = hf.generate(input_ids=ids[1:2, mask[1] == 1], max_new_tokens=11, num_beams=4, **GREEDY)
    assert torch.equal(found[0][2, 13:], alone[0, 9:])


def test_a_cache_is_read_on_copied_and_selected():
    hf = wrap("mixed")
    ids = text_ids(3, 23)
    with torch.no_grad():
        whole = hf(ids, use_cache=False).logits
        first = hf(ids[:, :9])
        assert isinstance(first.past_key_values, StreamCache)
        copied = copy.deepcopy(first.past_key_values)
        rest = hf(ids[:, 9:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, atol=1e-9, rtol=1e-9)
        again = hf(ids[:, 9:], past_key_values=copy.deepcopy(copied)).logits  # as if nothing had been read meanwhile
        assert torch.equal(again, rest)
        copied.batch_select_indices(torch.tensor([2, 0]))
        copied.batch_repeat_interleave(2)
        assert copied.batch_size == 4
        chosen = hf(ids[[2, 2, 0, 0], 9:], past_key_values=copied).logits
        torch.testing.assert_close(chosen, rest[[2, 2, 0, 0]], atol=1e-9, rtol=1e-9)
        with pytest.raises(ValueError, match="can't be shortened"):
            copied.crop(3)
        copied.reset()
        assert copied.get_seq_length() == 0


def test_a_row_whose_next_columns_are_all_padding_goes_on_from_its_last_token():
    hf = wrap("mixed")
    ids, mask = padded("right", 12)
    with torch.no_grad():
        whole = hf(ids, attention_mask=mask, use_cache=False).logits[:, -1]
        cache = hf(ids[:, :6], attention_mask=mask[:, :6]).past_key_values
        order = torch.tensor([2, 0, 1])
        cache.reorder_cache(order)
        pieces = hf(ids[order, 6:], attention_mask=mask[order], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(pieces, whole[order], atol=1e-9, rtol=1e-9)
    row = hf.model(ids[2:, :3]).detach()[0, -1]
    torch.testing.assert_close(whole[2], row, atol=1e-9, rtol=1e-9)


def test_what_a_memory_can_not_do_is_refused():
    hf = wrap("mixed")
    ids = text_ids(1, 8)
    with pytest.raises(ValueError, match="stateful"):
        hf.generate(input_ids=ids, max_new_tokens=4, prompt_lookup_num_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="output_attentions: not supported"):
        hf(ids, output_attentions=True)
    with torch.no_grad(), pytest.raises(ValueError, match="leave past_key_values out"):
        hf(ids, past_key_values=StreamCache(hf.model, 1), update_memory=True)
