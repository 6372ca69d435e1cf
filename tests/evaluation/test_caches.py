"""Cached models in every measure, against loops that use transformers alone, and the measure of caches itself."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from evaluation_stand_ins import TOKENIZER, make_documents, make_tiny_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from new_llm import evaluation
from new_llm.config import EvalConfig
from new_llm.config.evaluation import CacheMeasureConfig, LongDocumentsConfig
from new_llm.config.model import CacheConfig
from new_llm.evaluation.scoring import Scorer, join_scores
from new_llm.models.cache import TextCache
from new_llm.models.hf.gpt_neox import load_pythia
from tiny import make_split, refused

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
def test_an_empty_cache_is_the_bare_model_bit_for_bit(kind):
    model = make_tiny_model(kind, VOCAB_SIZE, SEGMENT, spread=0.5)
    plain, cached = (
        [
            evaluation.evaluate_streaming(one, SPLIT, batch_size=3, segments_per_call=2).documents["total_nll"],
            evaluation.evaluate_sliding_window(one, SPLIT, context=12, stride=5, batch_size=3).documents["total_nll"],
        ]
        for one in (model, evaluation.CachedModel(model, CacheConfig()))
    )
    assert plain == cached


@pytest.mark.parametrize("kind", ["pythia_segments", "token_memory"])
def test_its_distributions_sum_to_one_and_are_what_its_losses_say(kind):
    model = evaluation.CachedModel(make_tiny_model(kind, VOCAB_SIZE, SEGMENT, spread=0.5), CONFIG)
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


def repeat(document: list[int]) -> list[int]:
    return document + document[3:] + document[5:20]


REPEATED = [repeat(document) for document in make_documents([40, 30, 5, 50, 44, 61])]


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
