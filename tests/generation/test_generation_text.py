"""Text as it is made: whole characters, stop strings across tokens, and what is refused."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor

from model_cases import get_model, text_ids
from new_llm.config import UserError
from new_llm.config.model import GenerationConfig
from new_llm.data.tokenizer import train_tokenizer
from new_llm.models import sampling
from new_llm.models.generation import generate
from new_llm.models.sampling import REPLACEMENT, StoppingText, TextDecoder, TokenSampler, invert_cumulative
from tiny import make_model, refused
from tokenizer_families import FAMILIES, TEXT, train_family


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """A token a byte: characters are cut into as many tokens as they can be."""
    return train_tokenizer([], 257)


@settings(deadline=None, max_examples=25)
@example("Grüße, 世界! A naïve café ☕ — 👩‍🚀 and 🦜🦜🦜 said: “no”.")
@given(st.one_of(st.text(max_size=50), st.lists(st.integers(1, 256), max_size=50)))
def test_any_bytes_decode_as_they_do_at_once(byte_tokenizer, drawn):
    ids = byte_tokenizer.encode(drawn).ids if isinstance(drawn, str) else drawn
    decoder = TextDecoder(byte_tokenizer)
    pieces = [decoder.push(token) for token in ids]
    text = byte_tokenizer.decode(ids)
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


@settings(deadline=None, max_examples=80)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_a_row_ends_before_the_first_stop_string(byte_tokenizer, text, stops):
    row = StoppingText(byte_tokenizer, stops)
    found = read = ""
    for token in byte_tokenizer.encode(text).ids:
        read += byte_tokenizer.decode([token])
        found += row.push(token)
        whole = any(stop in read for stop in stops)
        assert row.is_stopped == whole
        if whole:
            break
    found += row.finish()
    begins = [read.find(stop) for stop in stops if stop in read]
    assert found == (read[: min(begins)] if begins else text)


def test_a_stop_string_that_spans_tokens_ends_the_row(tokenizer, monkeypatch):
    said = tokenizer.encode("the cat sat on the mat").ids
    stop = "t on"
    assert not any(stop in tokenizer.decode([token]) for token in said)
    script = iter(torch.tensor([said, said]).t())  # the choice is scripted, all else runs
    monkeypatch.setattr(TokenSampler, "choose", lambda self, logits: next(script))
    model = make_model(segment_length=5)
    prompts = tokenizer.encode("and").ids
    pieces: list[tuple[int, str]] = []
    ids, statistics = generate(
        model,
        torch.tensor([prompts, prompts]),
        max_new_tokens=len(said),
        stop_strings=("dog", stop),
        tokenizer=tokenizer,
        on_text=lambda row, piece: pieces.append((row, piece)),
    )
    assert statistics.texts == ("the cat sa",) * 2
    assert statistics.finish_reasons == ("stop", "stop")
    assert "".join(piece for row, piece in pieces if row == 1) == "the cat sa"
    new = ids[0, len(prompts) :].tolist()
    assert tokenizer.decode(new).startswith("the cat sat on")
    assert new == said[: len(new)]
    assert statistics.row_tokens == (len(new),) * 2


BAD_SETTINGS = {
    "temperature": {"temperature": float("nan")},
    "top_p": {"top_p": 1.1},
    "at least 1 character": {"stop_strings": ("a", "")},
    "a tokenizer is needed to find": {"stop_strings": ("a",)},
    "a tokenizer is needed to make": {"on_text": print},
    "eos_token_id": {"eos_token_id": (1, -1)},
    "eos_token_id: 128; the model knows 0 to 127": {"eos_token_id": 128},
    "pad_token_id: 128; the model knows 0 to 127": {"pad_token_id": 128},
    "unknown key 'beams'": {"beams": 3},
}
BAD_PROMPTS = {
    "empty": (torch.zeros(0, 3, dtype=torch.int64),),
    "the model knows 0 to 127": (torch.tensor([[1, 128]]),),
    "shape": (torch.tensor([1, 2]),),
    "row 1 has no real token": (text_ids(2, 2), torch.tensor([[1, 0], [0, 0]])),
    "attention_mask has shape": (text_ids(2, 2), torch.ones(2, 3)),
    "attention_mask: real tokens are marked by 1": (text_ids(2, 2), torch.tensor([[0.0, 0.0], [-1e9, 0.0]])),
    "batch of 2 rows": (text_ids(2, 2),),
}


def test_bad_settings_and_prompts_are_refused_in_one_line():
    model = get_model("mixed")
    for message, options in BAD_SETTINGS.items():
        with refused(message, ValueError):
            model.generate(text_ids(1, 3), **options)
    for message, prompt in BAD_PROMPTS.items():
        model.reset_memory(3 if "rows" in message else None)
        with pytest.raises(ValueError, match=message):
            model.generate(*prompt)


DRAWS = 4000


def make_sampler(rows: int = 1, vocab_size: int = 6, prompt: Tensor | None = None, **options) -> TokenSampler:
    ids = torch.zeros(rows, 1, dtype=torch.int64) if prompt is None else prompt
    config = GenerationConfig(do_sample=True, **options)
    return TokenSampler(config, ids, torch.ones_like(ids, dtype=torch.bool), vocab_size)


LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.6, -30.0])
DRAWN = [{"temperature": 0.5}, {}, {"temperature": 3.0}, {"top_k": 3}, {"top_k": 100}]
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
