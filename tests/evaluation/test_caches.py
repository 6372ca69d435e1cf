"""The measure of caches against streams of cached models with the settings that it found."""

import numpy as np
import pytest
from evaluation_stand_ins import VOCAB_SIZE, make_documents, make_tiny_model

from new_llm.config.evaluation import CacheMeasureConfig, EvalConfig, LongDocumentsConfig
from new_llm.config.model import CacheConfig
from new_llm.evaluation import CachedModel, Caches, Subject, evaluate_streaming, tune_cache
from tiny import make_split

LONG = LongDocumentsConfig(min_tokens=30, edges=(0, 20))
SETTINGS = CacheMeasureConfig(sizes=(3, 20), ngram_orders=(1, 3), thetas=(1.0, 8.0), segments_per_call=2)


def repeat(document: list[int]) -> list[int]:
    return document + document[3:] + document[5:20]


DOCUMENTS = [repeat(document) for document in make_documents([40, 30, 5, 50, 44, 61])]


def measure(model, split, max_tokens=None, **hooks):
    settings = EvalConfig(caches=SETTINGS, long_documents=LONG, max_tokens=max_tokens)
    return Caches().run(Subject(model, None, split, settings, **hooks))


@pytest.fixture(scope="module")
def model():
    return make_tiny_model("infini", VOCAB_SIZE, 8, spread=0.02)


def test_each_half_is_measured_with_the_settings_of_the_other(model):
    split = make_split(DOCUMENTS)
    result = measure(model, split)
    assert [found["name"] for found in result["caches"]] == [
        "bare", "+ 3 states", "+ 20 states", "+ unigrams", "+ trigrams", "+ longest match", "+ all"
    ]  # fmt: skip
    assert [entry["index"] for entry in result["documents"]] == [0, 1, 3, 4, 5]
    plain = evaluate_streaming(model, split, batch_size=2).documents["total_nll"]
    for entry in result["documents"]:
        assert sum(entry["total_nll"]["bare"]) == pytest.approx(plain[entry["index"]], rel=1e-6)
    for found in result["caches"][1:]:
        for half in range(2):
            tuned = found["settings"][half]
            others = [DOCUMENTS[entry["index"]] for entry in result["documents"] if entry["half"] != half]
            config = CacheConfig(**{key: found[key] for key in ("num_states", "ngram_order", "longest_match")})
            config = tune_cache(model, list(map(np.array, others)), config, SETTINGS)
            assert (config.theta, np.array(config.weights).tolist()) == (tuned["theta"], tuned["weights"])
            streamed = evaluate_streaming(CachedModel(model, config), split, batch_size=3).documents["total_nll"]
            for entry in result["documents"]:
                if entry["half"] == half:
                    losses = entry["total_nll"][found["name"]]
                    assert sum(losses) == pytest.approx(streamed[entry["index"]], rel=1e-6)
                    assert len(losses) == 2
    for entry in result["documents"]:  # a token is of the kind of the longest n-gram that stands before it, too
        text, kinds = DOCUMENTS[entry["index"]], [0, 0, 0, 0]
        for end in range(1, len(text)):
            grams = [text[end - n : end + 1] for n in range(min(3, end + 1))]
            earlier = [[text[i - n : i + 1] for i in range(n, end)] for n in range(3)]
            kinds[sum(gram in known for gram, known in zip(grams, earlier, strict=False))] += 1
        assert entry["repetition"]["num_tokens"] == kinds
        bare = entry["repetition"]["total_nll"]["bare"]
        assert sum(bare) == pytest.approx(sum(entry["total_nll"]["bare"]))
    assert "bytes per token" in Caches().describe(result)
    assert set(Caches().losses(result)) >= {"bare", "repeated trigrams", "new tokens, + longest match"}
    everything = result["caches"][-1]
    assert everything["relative"]["high"] < 0  # the documents repeat themselves
    ratio = everything["perplexity"]["value"] / result["caches"][0]["perplexity"]["value"]
    assert everything["relative"]["value"] == pytest.approx(ratio - 1)
    assert everything["size"] == {"state_numbers": 20 * 33, "state_bytes": 20 * 130, "bytes_per_token": 2}


def test_few_documents_have_no_interval_and_one_no_result(model):
    assert measure(model, make_split(DOCUMENTS[:3]))["caches"][-1]["relative"]["low"] is None
    assert measure(model, make_split(DOCUMENTS[1:3])) is None
    stopped = measure(model, make_split(DOCUMENTS), should_stop=iter([False, True]).__next__)
    assert (len(stopped["documents"]), stopped["is_complete"]) == (2, False)
