"""The cache's components against their equations, cached models in every measure, and the measure of caches itself."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from evaluation_stand_ins import TOKENIZER, make_documents, make_tiny_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from new_llm import evaluation
from new_llm.config import EvalConfig, UserError
from new_llm.config.evaluation import CacheMeasureConfig, LongDocumentsConfig
from new_llm.config.model import CacheConfig
from new_llm.evaluation.scoring import Scorer, join_scores
from new_llm.models import cache
from new_llm.models.cache import Scored, TextCache, describe_cache, mix, score_match, score_ngrams, tune_weights
from new_llm.models.hf.gpt_neox import load_pythia
from tiny import make_split, refused

NUM_WORDS, NUM_TOKENS, HIDDEN_SIZE = 7, 61, 5
FEW_BITS = (7, 8, 9)  # so that a short text's matches reach every range


def make_text(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    tokens = torch.randint(NUM_WORDS, (NUM_TOKENS + 1,), generator=generator)
    model = torch.randn(NUM_TOKENS, NUM_WORDS, generator=generator, dtype=torch.float64).softmax(-1)
    return states, tokens, model


def mix_naively(config: CacheConfig, states: torch.Tensor, tokens: list[int], model: torch.Tensor) -> list[float]:
    """The distribution after the last token, one candidate after the other."""
    now = len(tokens) - 1
    distributions = {0: model.tolist()}
    past = range(max(0, now - config.num_states), now)
    if past:
        scores = [0.0] * NUM_WORDS
        for i in past:
            similarity = float(states[now] @ states[i])
            if config.similarity == "cosine":
                similarity /= float(states[now].norm() * states[i].norm())
            scores[tokens[i + 1]] += math.exp(config.theta * similarity)
        distributions[1] = [score / sum(scores) for score in scores]
    for order in range(1, config.ngram_order + 1):
        context = tokens[now + 2 - order :]
        ends = [i for i in range(order - 1, len(tokens)) if tokens[i - order + 1 : i] == context]
        if len(tokens) >= order - 1 and ends:
            counts = Counter(tokens[i] for i in ends)
            distributions[1 + order] = [counts[w] / len(ends) for w in range(NUM_WORDS)]
    length, bits = sum(component > 1 for component in distributions) - 1, 0.0
    if config.longest_match:
        shared = [next((n for n in range(32) if n > i or tokens[i - n] != tokens[now - n]), 32) for i in range(now)]
        length = max(shared, default=0)
        bits = sum(math.log2((i + 1) / (tokens[:i].count(tokens[i]) + 1)) for i in range(now + 1 - length, now + 1))
        if length:
            latest = max(i for i in range(now) if shared[i] == length)
            distributions[5] = [float(w == tokens[latest + 1]) for w in range(NUM_WORDS)]
    weights = config.weights[1 + min(length, 3) + (sum(bits >= least for least in FEW_BITS) if length >= 3 else 0)]
    total = sum(weights[component] for component in distributions)
    return [
        sum(weights[component] * found[w] for component, found in distributions.items()) / total
        for w in range(NUM_WORDS)
    ]


@pytest.mark.parametrize("cuts", [(NUM_TOKENS,), (1,) * NUM_TOKENS, (17, 1, 40, 3)])
@pytest.mark.parametrize(
    ("num_states", "ngram_order", "longest_match", "similarity"),
    [
        (0, 3, False, "cosine"),
        (9, 0, False, "dot"),
        (9, 2, False, "cosine"),
        (100, 1, True, "cosine"),
        (1, 3, True, "dot"),
        (0, 0, True, "dot"),
    ],
)
def test_every_distribution_equals_the_equations_however_the_text_is_cut(
    monkeypatch, cuts, num_states, ngram_order, longest_match, similarity
):
    monkeypatch.setattr(cache, "QUERY_ROWS", 8)
    monkeypatch.setattr(cache, "MATCH_BITS", FEW_BITS)
    config = CacheConfig(
        num_states=num_states, ngram_order=ngram_order, longest_match=longest_match, similarity=similarity, theta=1.5
    )
    states, tokens, model = make_text()
    held = TextCache(config)
    begin = 0
    for length in cuts:
        piece = slice(begin, begin + length)
        targets = tokens[begin + 1 : begin + length + 1]
        expected = [
            mix_naively(config, states, tokens[: end + 1].tolist(), model[end]) for end in range(begin, begin + length)
        ]
        found = held.mix(states[piece], tokens[piece], model[piece])
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-12)
        scores = held.score(states[piece], tokens[piece], targets)
        scores.probabilities[:, 0] = model[piece].gather(1, targets[:, None])[:, 0]
        np.testing.assert_allclose(mix(scores, config.weights), found.gather(1, targets[:, None])[:, 0], rtol=1e-12)
        held.add(states[piece], tokens[piece])
        begin += length
    assert held.states is None or len(held.states) == min(num_states, NUM_TOKENS)


@pytest.mark.parametrize(
    "text", [[1, 2], [1, 1, 1], make_text()[1].tolist(), [3, *[1] * 80], [1, 2, 3] * 30 + [2, 3, 0] * 9]
)
def test_the_components_of_a_whole_text_are_those_of_its_stream(text):
    tokens = torch.tensor(text)
    states = torch.zeros(len(tokens) - 1, HIDDEN_SIZE)
    streamed = TextCache(CacheConfig(ngram_order=3, longest_match=True)).score(states, tokens[:-1], tokens[1:])
    matches, contexts = score_match(tokens.numpy())
    found = np.column_stack([score_ngrams(tokens.numpy(), 3), matches])
    np.testing.assert_array_equal(found, streamed.probabilities[:, 2:])
    np.testing.assert_array_equal(contexts, streamed.contexts)


def test_tuned_weights_are_the_best_on_a_grid():
    probabilities = np.random.default_rng(0).uniform(0.01, 1, (500, 6)) ** 2
    probabilities[:, 3:] = np.nan
    probabilities[0, 1] = np.nan
    scored = Scored(probabilities, np.zeros(500, np.int64))
    tuned = tune_weights(scored, CacheConfig().weights)
    assert tuned[3].tolist() == list(CacheConfig().weights[3])  # nothing was seen of it
    best = np.log(mix(scored, tuned)).mean()
    for a in np.linspace(0.01, 0.98, 30):
        for b in np.linspace(0, 1 - a, 20):
            assert np.log(mix(scored, [[a, b, 1 - a - b, 0, 0, 0]] * 8)).mean() <= best + 1e-4


def test_a_match_of_much_information_that_a_text_has_once_weighs_as_those_of_less():
    probabilities = np.full((301, 6), 0.5)
    probabilities[:, 5] = np.arange(301) % 3 > 0
    tuned = tune_weights(Scored(probabilities, np.array([*[6] * 300, 7])), CacheConfig().weights)
    assert tuned[6, 5] == pytest.approx(1 / 3, abs=0.1)  # 2/3 of the matches are right, where all others have one half
    np.testing.assert_allclose(tuned[7], tuned[6], atol=0.05)


def test_size_and_refusals():
    assert describe_cache(CacheConfig(num_states=254, ngram_order=2), 128, 4096) == {
        "state_numbers": 254 * 129,
        "state_bytes": 254 * 514,
        "bytes_per_token": 2,
    }
    assert describe_cache(CacheConfig(ngram_order=1), 128, 70_000)["bytes_per_token"] == 4
    with pytest.raises(UserError, match="the model's must be positive"):
        CacheConfig(weights=((0, 1, 0, 0, 0, 0),) * 8)


# Cached models against loops that use transformers alone


SEGMENT, VOCAB_SIZE = 8, 11
SHAPE = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DOCUMENTS = make_documents([70, 3, 41, 2, 64, 17])
SPLIT = make_split(DOCUMENTS)
WEIGHTS = (
    (0.7, 0.3, 0, 0, 0, 0),
    (0.6, 0.3, 0.1, 0, 0, 0),
    (0.4, 0.2, 0.1, 0.3, 0, 0.2),
    (0.1, 0.2, 0.3, 0.2, 0.2, 0.1),
    *((0.1, 0.2, 0.1, 0.1, 0.2, share) for share in (0.3, 0.5, 0.7, 0.9)),
)
CONFIG = CacheConfig(num_states=12, ngram_order=3, longest_match=True, theta=3.0, weights=WEIGHTS)


@pytest.fixture(scope="module")
def neox(tmp_path_factory):
    """A checkpoint, and by transformers alone the losses of each token but a document's first.

    Segments are read alone, the cache sees all.
    """
    torch.manual_seed(0)
    config = GPTNeoXConfig(**SHAPE, intermediate_size=32, max_position_embeddings=SEGMENT, initializer_range=0.5)
    model, losses, path = GPTNeoXForCausalLM(config).eval(), [], tmp_path_factory.mktemp("neox")
    model.save_pretrained(path)
    model.double()
    for tokens in DOCUMENTS:
        cache = TextCache(CONFIG)
        losses.append([])
        for begin in range(0, len(tokens) - 1, SEGMENT):
            piece = torch.tensor(tokens[begin : min(begin + SEGMENT, len(tokens) - 1)])
            with torch.no_grad():
                found = model(piece[None], output_hidden_states=True)
            states = found.hidden_states[-1][0]
            mixed = cache.mix(states, piece, found.logits[0].softmax(-1))
            losses[-1] += [-math.log(shares[token]) for shares, token in zip(mixed, tokens[begin + 1 :], strict=False)]
            cache.add(states, piece)
    return path, losses


@pytest.mark.parametrize(
    "wrap", [load_pythia, lambda path: evaluation.HuggingFaceLM(GPTNeoXForCausalLM.from_pretrained(path))]
)
@pytest.mark.parametrize(("batch_size", "segments_per_call"), [(4, 1), (9, 20)])
def test_streams_equal_a_loop_written_with_transformers_alone(neox, wrap, batch_size, segments_per_call):
    folder, expected_losses = neox
    model = evaluation.CachedModel(wrap(folder), CONFIG).double()
    scorer = Scorer(model, [np.array(tokens) for tokens in DOCUMENTS], {"batch_size": batch_size})
    found = join_scores(scorer.score_streams(segments_per_call))
    for index in range(len(DOCUMENTS)):
        chosen = found.documents == index
        order = np.argsort(found.positions[chosen])
        np.testing.assert_allclose(found.losses[chosen][order], expected_losses[index], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("row", "place"), [(0, 0), (1, 128)])
def test_a_model_whose_logits_are_not_just_its_head_s_output_is_refused(row, place, neox, monkeypatch):
    model = evaluation.HuggingFaceLM(GPTNeoXForCausalLM.from_pretrained(neox[0]), 150)
    ids = torch.arange(300).view(2, 150) % VOCAB_SIZE
    assert model.compute_hidden(ids).shape[:2] == ids.shape
    forward = model.model.forward

    def scale_some(**inputs):
        found = forward(**inputs)
        found.logits[row, place] *= 2
        return found

    monkeypatch.setattr(model.model, "forward", scale_some)
    with torch.no_grad(), refused("GPTNeoXForCausalLM can't use a cache: its logits are not just its head's output"):
        model.compute_hidden(ids)


@pytest.mark.parametrize("kind", ["pythia_segments", "infini", "token_memory"])
def test_distributions_sum_to_one_are_what_losses_say_and_of_an_empty_cache_those_of_the_bare_model_bit_for_bit(kind):
    bare = make_tiny_model(kind, VOCAB_SIZE, SEGMENT, spread=0.5)
    plain, cached = (
        [
            evaluation.evaluate_streaming(one, SPLIT, batch_size=3, segments_per_call=2).documents["total_nll"],
            evaluation.evaluate_sliding_window(one, SPLIT, context=12, stride=5, batch_size=3).documents["total_nll"],
        ]
        for one in (bare, evaluation.CachedModel(bare, CacheConfig()))
    )
    assert plain == cached
    model = evaluation.CachedModel(bare, CONFIG)
    ids = torch.tensor([DOCUMENTS[0][:30], DOCUMENTS[4][:30]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 11:] = False
    with torch.inference_mode(), model.fresh_memory(batch_size=2):
        for piece in (slice(0, 13), slice(13, 29)):
            logs = model(ids[:, piece], mask[:, piece])
            torch.testing.assert_close(logs.exp().sum(-1), torch.ones_like(logs[..., 0]), rtol=1e-12, atol=0)
            labels = ids[:, piece.start : piece.stop + 1].masked_fill(~mask[:, piece.start : piece.stop + 1], -100)
            losses = model.token_losses(ids[:, piece], labels, mask[:, piece], update_memory=True)
            wanted = labels[:, 1:] >= 0
            named = -logs.gather(2, labels[:, 1:].clamp_min(0)[..., None])[..., 0]
            torch.testing.assert_close(losses, torch.where(wanted, named, 0), rtol=1e-6, atol=1e-6)


def test_long_documents_carry_empty_and_lend_the_cache():
    model = evaluation.CachedModel(make_tiny_model("pythia_segments", VOCAB_SIZE, SEGMENT, spread=0.5), CONFIG)
    settings = EvalConfig(long_documents=LongDocumentsConfig(min_tokens=17, edges=(0,), batch_size=4))
    for one, num_different in ((model, 3), (model.model, 1)):  # a Pythia alone has three equal ways
        result = evaluation.LongDocuments().run(evaluation.Subject(one, None, SPLIT, settings))
        perplexity = result["overall"]["perplexity"].values()
        assert len({round(found["value"], 6) for found in perplexity}) == num_different
    assert model.held is None


# The measure of caches, against streams of cached models with the settings that it found


LONG = LongDocumentsConfig(min_tokens=30, edges=(0, 20))
SETTINGS = CacheMeasureConfig(sizes=(3, 20), ngram_orders=(1, 3), thetas=(1.0, 8.0), segments_per_call=2)


REPEATED = [text + text[3:] + text[5:20] for text in make_documents([40, 30, 5, 50, 44, 61])]


def measure(model, split, max_tokens=None, caches=SETTINGS, **hooks):
    settings = EvalConfig(caches=caches, long_documents=LONG, max_tokens=max_tokens)
    return evaluation.Caches().run(evaluation.Subject(model, TOKENIZER, split, settings, **hooks))


INFINI = make_tiny_model("infini", VOCAB_SIZE, SEGMENT, spread=0.02)


def test_each_half_is_measured_with_the_settings_of_the_other():
    split = make_split(REPEATED)
    result = measure(INFINI, split)
    assert [found["name"] for found in result["caches"]] == [
        "bare", "+ 3 states", "+ 20 states", "+ unigrams", "+ trigrams", "+ longest match", "+ all"
    ]  # fmt: skip
    assert [entry["index"] for entry in result["documents"]] == [0, 1, 3, 4, 5]
    plain = evaluation.evaluate_streaming(INFINI, split, batch_size=2).documents["total_nll"]
    for entry in result["documents"]:
        assert sum(entry["total_nll"]["bare"]) == pytest.approx(plain[entry["index"]], rel=1e-6)
    for found in result["caches"][1:]:
        for half in range(2):
            tuned = found["settings"][half]
            others = [REPEATED[entry["index"]] for entry in result["documents"] if entry["half"] != half]
            config = CacheConfig(**{key: found[key] for key in ("num_states", "ngram_order", "longest_match")})
            config = evaluation.tune_cache(INFINI, list(map(np.array, others)), config, SETTINGS)
            assert (config.theta, np.array(config.weights).tolist()) == (tuned["theta"], tuned["weights"])
            streamed = evaluation.evaluate_streaming(
                evaluation.CachedModel(INFINI, config), split, batch_size=3
            ).documents["total_nll"]
            for entry in result["documents"]:
                if entry["half"] == half:
                    losses = entry["total_nll"][found["name"]]
                    assert sum(losses) == pytest.approx(streamed[entry["index"]], rel=1e-6)
                    assert len(losses) == 2
    for entry in result["documents"]:  # a token is of the kind of the longest n-gram that stands before it, too
        text, kinds = REPEATED[entry["index"]], [0, 0, 0, 0]
        for end in range(1, len(text)):
            grams = [text[end - n : end + 1] for n in range(min(3, end + 1))]
            earlier = [[text[i - n : i + 1] for i in range(n, end)] for n in range(3)]
            kinds[sum(gram in known for gram, known in zip(grams, earlier, strict=False))] += 1
        assert entry["repetition"]["num_tokens"] == kinds
        assert sum(entry["repetition"]["total_nll"]["bare"]) == pytest.approx(sum(entry["total_nll"]["bare"]))
    assert "bytes per token" in evaluation.Caches().describe(result)
    assert set(evaluation.Caches().losses(result)) >= {"bare", "repeated trigrams", "new tokens, + longest match"}
    everything = result["caches"][-1]
    assert everything["relative"]["high"] < 0  # the documents repeat themselves
    ratio = everything["perplexity"]["value"] / result["caches"][0]["perplexity"]["value"]
    assert everything["relative"]["value"] == pytest.approx(ratio - 1)
    assert everything["size"] == {"state_numbers": 20 * 33, "state_bytes": 20 * 130, "bytes_per_token": 2}


def test_with_an_emptied_memory_each_segment_is_read_alone_and_the_caches_stay():
    split = make_split(REPEATED)
    result = measure(INFINI, split, caches=dataclasses.replace(SETTINGS, reset_memory=True))
    for entry in result["documents"]:
        tokens = torch.tensor(REPEATED[entry["index"]])[None]
        pieces = [tokens[:, begin : begin + SEGMENT + 1] for begin in range(0, tokens.shape[1] - 1, SEGMENT)]
        with torch.no_grad(), INFINI.fresh_memory():
            alone = sum(float(INFINI.token_losses(piece[:, :-1], piece).sum()) for piece in pieces)
        assert sum(entry["total_nll"]["bare"]) == pytest.approx(alone, rel=1e-6)
    assert result["caches"][-1]["relative"]["high"] < 0
    carried = measure(INFINI, split)
    assert carried["caches"][0]["perplexity"]["value"] != pytest.approx(result["caches"][0]["perplexity"]["value"])
    told = [evaluation.Caches().describe(one) for one in (carried, result)]
    assert ["emptied memory" in one for one in told] == [False, True]


def test_few_documents_have_no_interval_and_one_no_result():
    assert measure(INFINI, make_split(REPEATED[:3]))["caches"][-1]["relative"]["low"] is None
    assert measure(INFINI, make_split(REPEATED[1:3])) is None
    stopped = measure(INFINI, make_split(REPEATED), should_stop=iter([False, True]).__next__)
    assert (len(stopped["documents"]), stopped["is_complete"]) == (2, False)
