"""Greedy generation equals recomputing the whole text at every step; text as it is made, draws, and what is refused."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from model_cases import MIXED_STACKS, assert_states_equal, assert_states_near, get_model, text_ids
from new_llm.config import UserError
from new_llm.config.model import CacheConfig, GenerationConfig
from new_llm.data.tokenizer import train_tokenizer
from new_llm.evaluation import CachedModel
from new_llm.models import sampling
from new_llm.models.generation import LOOK_EVERY
from new_llm.models.sampling import REPLACEMENT, StoppingText, TextDecoder, TokenSampler, invert_cumulative
from tiny import refused
from tokenizer_families import FAMILIES, TEXT, train_family

NEW_TOKENS = 14  # across two ends of segments of 5 at least


@pytest.mark.parametrize("prompt_length", [1, 13])
@pytest.mark.parametrize("name", ["pythia", *MIXED_STACKS])
def test_stream_equals_recomputing_token_for_token(name, prompt_length):
    model = get_model(name)
    with torch.no_grad():
        model(text_ids(1, 8, start=60), update_memory=True)
        prompt = expected = text_ids(2, prompt_length)
        for _ in range(NEW_TOKENS):
            expected = torch.cat((expected, model(expected)[:, -1].argmax(-1, keepdim=True)), dim=1)
    ids, statistics = model.generate(prompt, max_new_tokens=NEW_TOKENS)
    assert torch.equal(ids, expected)
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


# Text as it is made: whole characters, stop strings across tokens, draws, and what is refused


BYTES = train_tokenizer([], 257)  # a token a byte: characters are cut into as many tokens as they can be


@example("Grüße, 世界! A naïve café ☕ — 👩‍🚀 and 🦜🦜🦜 said: “no”.")
@given(st.one_of(st.text(max_size=50), st.lists(st.integers(1, 256), max_size=50)))
def test_any_bytes_decode_as_they_do_at_once(drawn):
    ids = BYTES.encode(drawn).ids if isinstance(drawn, str) else drawn
    decoder = TextDecoder(BYTES)
    pieces = [decoder.push(token) for token in ids]
    text = BYTES.decode(ids)
    assert "".join(pieces) + decoder.finish() == text
    assert REPLACEMENT in text or all(len(piece) <= 1 for piece in pieces)  # whole characters


@pytest.mark.parametrize("family", FAMILIES)
def test_text_after_a_prompt_is_that_of_all_tokens(family):
    """Spaces between prompt and text, characters of several tokens, and tokens that change those before them."""
    tokenizer = train_family(family)
    ids = tokenizer.encode(TEXT + " We do n't know; 世界世界世界 is n't ' ere .", add_special_tokens=False).ids
    ids += [(7 * number) % tokenizer.get_vocab_size() for number in range(200)]
    special = [token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special]
    for cut in range(1, len(ids), 5):
        prompt = ids[:cut] + 9 * special[:1]  # special tokens have no text, and hide none
        before, whole = tokenizer.decode(prompt), tokenizer.decode(ids)
        if not whole.startswith(before):  # the cut is inside a character
            continue
        decoder = TextDecoder(tokenizer, prompt)
        rest = [part for token in ids[cut:] for part in (token, *special[:1])]
        assert before + "".join(map(decoder.push, rest)) + decoder.finish() == whole


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_a_row_ends_before_the_first_stop_string(text, stops):
    row = StoppingText(BYTES, stops)
    found = read = ""
    for token in BYTES.encode(text).ids:
        read += BYTES.decode([token])
        found += row.push(token)
        whole = any(stop in read for stop in stops)
        assert row.is_stopped == whole
        if whole:
            break
    found += row.finish()
    begins = [read.find(stop) for stop in stops if stop in read]
    assert found == (read[: min(begins)] if begins else text)


def test_bad_settings_and_prompts_are_refused_in_one_line():
    model = get_model("mixed")
    for message, options in {
        "temperature": {"temperature": float("nan")},
        "top_p": {"top_p": 1.1},
        "at least 1 character": {"stop_strings": ("a", "")},
        "a tokenizer is needed to find": {"stop_strings": ("a",)},
        "a tokenizer is needed to decode": {"on_text": print},
        "eos_token_id": {"eos_token_id": (1, -1)},
        "pad_token_id: 128; the model's vocabulary is 0 to 127": {"pad_token_id": 128},
        "unknown key 'beams'": {"beams": 3},
    }.items():
        with refused(message, ValueError):
            model.generate(text_ids(1, 3), **options)
    for message, prompt in {
        "empty": (torch.zeros(0, 3, dtype=torch.int64),),
        "row 1 has no real token": (text_ids(2, 2), torch.tensor([[1, 0], [0, 0]])),
        "attention_mask has shape": (text_ids(2, 2), torch.ones(2, 3)),
        "attention_mask: must be 1 at real tokens": (text_ids(2, 2), torch.tensor([[0.0, 0.0], [-1e9, 0.0]])),
        "batch of 2 rows": (text_ids(2, 2),),
    }.items():
        model.reset_memory(3 if "rows" in message else None)
        with pytest.raises(ValueError, match=message):
            model.generate(*prompt)


DRAWS = 4000


def make_sampler(rows=1, vocab_size=6, **options) -> TokenSampler:
    ids = torch.zeros(rows, 1, dtype=torch.int64)
    config = GenerationConfig(**{"do_sample": True} | options)
    return TokenSampler(config, ids, torch.ones_like(ids, dtype=torch.bool), vocab_size)


LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.6, -30.0])
DRAWN = [{"temperature": 1e-3}, {"temperature": 0.5}, {}, {"temperature": 3.0}, {"top_k": 3}, {"top_k": 100}]
DRAWN += [{"top_p": 0.05}, {"top_p": 0.45}, {"top_p": 0.9}]


@pytest.mark.parametrize("first_candidates", [2, 1024])
@pytest.mark.parametrize("options", DRAWN, ids=str)
def test_draws_follow_the_softmax_of_the_likeliest(options, first_candidates, monkeypatch):
    """At a temperature, among the k likeliest, among the fewest that reach p: within 5 standard errors."""
    monkeypatch.setattr(sampling, "FIRST_CANDIDATES", first_candidates)
    probabilities = (LOGITS / options.get("temperature", 1.0)).softmax(-1)
    expected, total = torch.zeros_like(probabilities), 0.0
    for token in probabilities.argsort(descending=True).tolist()[: options.get("top_k")]:
        if total < options.get("top_p", 2.0):
            expected[token] = probabilities[token]
        total += float(probabilities[token])
    expected /= expected.sum()
    drawn = make_sampler(rows=DRAWS, vocab_size=len(LOGITS), **options).choose(LOGITS.expand(DRAWS, -1))
    found = drawn.bincount(minlength=len(LOGITS)) / DRAWS
    assert bool(((found - expected).abs() <= 5 * (expected * (1 - expected) / DRAWS).sqrt()).all()), (found, expected)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}])
@pytest.mark.parametrize("seed", range(20))
def test_the_narrowest_draw_is_greedy_also_among_equal_logits(options, seed):
    logits = torch.randint(0, 3, (2, 500), generator=torch.Generator().manual_seed(seed)).float()
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
    sampler = make_sampler(2, do_sample=do_sample)
    logits = LOGITS.repeat(2, 1)
    logits[0, 5] = -torch.inf  # a token that is excluded
    sampler.choose(logits)
    logits[1, 3] = value
    with pytest.raises(UserError, match=r"the logits are NaN or infinite"):
        sampler.choose(logits)
