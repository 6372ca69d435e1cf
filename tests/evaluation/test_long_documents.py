"""Long documents with their memory carried, emptied and another's; what a memory holds, and what it knew."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from evaluation_stand_ins import (
    REAL,
    TOKENIZER,
    VOCAB_SIZE,
    make_documents,
    make_exact,
    make_reader,
    make_tiny_model,
    read_naively,
)

from model_cases import assert_states_equal
from new_llm import evaluation
from new_llm.config.evaluation import EvalConfig, LongDocumentsConfig, PassagesConfig
from new_llm.evaluation import MEASURES, Baseline, LongDocuments, MemoryUsage, ModelResult, Subject
from new_llm.evaluation.passages import continue_text, find_half_share, find_passages
from new_llm.evaluation.statistics import MIN_DOCUMENTS
from tiny import make_split

LENGTHS = [70, 3, 130, 65, 41, 17, 64, 16]
DOCUMENTS = make_documents(LENGTHS)
SPLIT = make_split(DOCUMENTS)
EDGES = (0, 16, 40, 100, 1000)
LONG = [index for index, length in enumerate(LENGTHS) if length >= 17]
WAYS = ("carried", "reset", "foreign")


def measure(model, split=SPLIT, *, hooks=None, **options):
    settings = LongDocumentsConfig(**({"min_tokens": 17, "edges": EDGES, "batch_size": 4} | options))
    return LongDocuments().run(Subject(model, None, split, EvalConfig(long_documents=settings), **(hooks or {})))


def read_with_foreign_memory(model, tokens, lender):
    """Each segment with the memory that the lender's stream holds after as many of its segments."""
    losses, length = [], model.segment_length
    with model.fresh_memory(), torch.no_grad():
        for begin in range(0, len(tokens) - 1, length):
            ids = torch.tensor([tokens[begin : begin + length + 1]])
            losses += model.token_losses(ids[:, :length], ids)[0].tolist()[: len(ids[0]) - 1]
            if lent := lender[begin : begin + length]:
                model(torch.tensor([lent]), update_memory=True)
    return losses


@pytest.mark.parametrize(
    ("kind", "segment_length", "batch_size"),
    [
        *itertools.product(["infini"], [8, 200], [1, 50]),
        ("infini", 3, 3),
        *((kind, 8, 3) for kind in ("pythia", "multi_memory", "hierarchical", "token_memory", "selective")),
    ],
)
def test_every_way_equals_a_naive_loop(kind, segment_length, batch_size):
    options = {"use_alibi": True, "num_memory_banks": 2, "segments_per_bank": 1} if kind == "infini" else {}
    model = make_exact(segment_length, kind, **options)
    held = model.get_memory_state()
    result = measure(model, batch_size=batch_size)
    assert [entry["index"] for entry in result["documents"]] == LONG
    for entry in result["documents"]:
        assert set(entry["total_nll"]) == (set(WAYS) if model.memory_layers else {"carried"})  # else one way to read
        tokens = DOCUMENTS[entry["index"]]
        pieces = [tokens[i : i + segment_length + 1] for i in range(0, len(tokens) - 1, segment_length)]
        expected = {
            "carried": read_naively(model, tokens),
            "reset": [loss for piece in pieces for loss in read_naively(model, piece)],
        }
        if model.memory_layers:
            lender = DOCUMENTS[entry["foreign_memory_of"]]
            assert lender is not tokens
            expected["foreign"] = read_with_foreign_memory(model, tokens, lender)
        for way, totals in entry["total_nll"].items():
            inside = [
                [loss for distance, loss in enumerate(expected[way], start=1) if start <= distance < end]
                for start, end in zip(EDGES, [*EDGES[1:], math.inf], strict=True)
            ]
            assert entry["num_tokens"][way] == list(map(len, inside))
            assert totals == pytest.approx(list(map(sum, inside)), rel=1e-9)
    lenders = [entry["foreign_memory_of"] for entry in result["documents"]]
    assert not model.memory_layers or len(set(lenders)) >= len(LONG) - 1
    assert_states_equal(model.get_memory_state(), held)


def test_figures_are_those_of_the_documents_with_paired_intervals():
    result = measure(make_exact())
    starts = [(found["start"], found["end"]) for found in result["ranges"]]
    assert starts == [(0, 16), (16, 40), (40, 100), (100, 1000)]  # no token is a thousand away
    for column, figures in [*enumerate(result["ranges"]), (slice(None), result["overall"])]:
        counts, totals = (
            {way: np.array([np.sum(np.array(one[key][way])[column]) for one in result["documents"]]) for way in WAYS}
            for key in ("num_tokens", "total_nll")
        )
        losses = {way: totals[way].sum() / counts[way].sum() for way in WAYS}
        assert figures["num_tokens"] == counts["carried"].sum()
        assert figures["num_documents"] == (counts["carried"] > 0).sum()
        for way in WAYS:
            assert figures["perplexity"][way]["value"] == pytest.approx(math.exp(losses[way]))
        for way in WAYS[1:]:
            difference = figures["differences"][way]
            assert difference["nats"]["value"] == pytest.approx(losses["carried"] - losses[way])
            assert difference["relative"]["value"] == pytest.approx(math.exp(losses["carried"] - losses[way]) - 1)
            assert (difference["nats"]["low"] is None) == (figures["num_documents"] < MIN_DOCUMENTS)
    assert result["num_tokens"] == result["overall"]["num_tokens"] == sum(LENGTHS[i] - 1 for i in LONG)
    for found in (result["overall"]["differences"]["reset"]["nats"], result["overall"]["perplexity"]["carried"]):
        assert found["low"] < found["value"] < found["high"]


def test_documents_are_chosen_and_cut_and_one_has_no_foreign_memory_and_no_interval():
    model = make_exact()
    result = measure(model, max_documents=3, max_tokens_per_document=60)
    assert [entry["index"] for entry in result["documents"]] == LONG[:3]
    assert result["overall"] == measure(model, make_split([DOCUMENTS[i][:60] for i in LONG[:3]]))["overall"]
    result = measure(model, min_tokens=100)
    assert set(result["overall"]["perplexity"]) == {"carried", "reset"}
    assert result["documents"][0]["foreign_memory_of"] is None
    estimate = result["overall"]["differences"]["reset"]["nats"]
    assert (estimate["low"], estimate["high"]) == (None, None)
    assert abs(estimate["value"]) > 1e-3
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("num_batches", [1, 8])
def test_a_stopped_measurement_is_labelled_and_still_paired(num_batches):
    others = [Baseline("plain", make_exact(seed=1))]
    answers = iter([*[False] * (num_batches - 1), True])
    result = measure(make_exact(), hooks={"baselines": others, "should_stop": answers.__next__})
    assert not result["is_complete"]
    assert 0 < result["num_tokens"] < result["num_planned"]
    assert result["overall"]["perplexity"].keys() == result["overall"]["differences"].keys() | {"carried"} == set(WAYS)
    for entry in result["documents"]:
        assert entry["num_tokens"]["carried"] == entry["num_tokens"]["reset"] == entry["num_tokens"]["foreign"]


def test_baselines_score_the_same_tokens():
    model = make_exact()
    other = make_exact(20, seed=1)
    baselines = [Baseline("stream", other), Baseline("windows", other, stride=7), Baseline("abreast", other, stride=20)]
    told = []
    result = measure(
        model, hooks={"baselines": baselines, "on_progress": lambda *x: told.append(x)}, segments_per_call=3
    )
    long = make_split([DOCUMENTS[i] for i in LONG])
    expected = {
        "stream": evaluation.evaluate_streaming(other, long, batch_size=2),
        "windows": evaluation.evaluate_sliding_window(other, long, context=20, stride=7, batch_size=2),
        "abreast": evaluation.evaluate_independent(other, long, batch_size=2),
        "carried": evaluation.evaluate_streaming(model, long, batch_size=2),
    }
    for name, found in expected.items():
        assert result["overall"]["perplexity"][name]["value"] == pytest.approx(found.perplexity, rel=1e-9)
    nats = result["overall"]["differences"]["windows"]["nats"]
    assert nats["value"] == pytest.approx(expected["carried"].loss - expected["windows"].loss)
    for entry in result["documents"]:
        assert len({tuple(counts) for counts in entry["num_tokens"].values()}) == 1
    assert result["baselines"]["windows"] == {"segment_length": 20, "stride": 7, "subject": {}}
    assert told == sorted(told)
    assert told[-1] == (4 * result["num_planned"], 4 * result["num_planned"])
    assert result["is_complete"]
    with pytest.raises(ValueError, match="names must be distinct"):
        measure(model, hooks={"baselines": [Baseline("reset", other)]})


# What a memory holds, and what it knew of the text that is read


LENGTH = 8
TWO = make_split(make_documents([5, 80]))


def measure_usage(kind, num_segments, **options):
    model = make_tiny_model(kind, VOCAB_SIZE, LENGTH, spread=0.02, **options)
    return model, MemoryUsage().run(Subject(model, None, TWO, EvalConfig(memory_usage_segments=num_segments)))


def test_norms_are_those_of_the_memory_that_reading_leaves():
    model, usage = measure_usage("multi_memory", 4, num_memories=2, memory_layers=(0, 1))
    assert (usage["document"], usage["num_segments"], usage["segment_length"]) == (1, 4, LENGTH)
    assert [entry["layer"] for entry in usage["layers"]] == [0, 1]
    with model.fresh_memory(), torch.no_grad():
        for segment in range(4):
            ids = torch.from_numpy(TWO.document(1)[segment * LENGTH : (segment + 1) * LENGTH].astype(np.int64))
            model(ids[None], update_memory=True)
            for index, entry in enumerate(usage["layers"]):
                expected = model.get_memory_state()[index]["memories"].flatten(2).norm(dim=-1)
                np.testing.assert_allclose(entry["norms"][segment], expected, rtol=1e-4)
    # Memories are written in turn: the second is empty after the first segment, and full after the second.
    first = usage["layers"][0]["norms"]
    assert set(first[0][1]) == {0.0}
    assert min(first[1][1]) > 0
    assert first[1][0] == first[0][0]
    assert measure_usage("pythia", 2)[1] is None


@pytest.mark.parametrize("kind", ["multi_memory", "hierarchical"])
def test_selection_entropy_is_low_at_a_low_temperature_and_one_where_all_weigh_the_same(kind):
    def find_entropy(**options):
        (column,) = MemoryUsage().columns(measure_usage(kind, 9, num_memories=4, **options)[1])
        return column.value

    assert find_entropy(selection_temperature=1e6) == pytest.approx(1, abs=1e-6)
    assert find_entropy(selection_temperature=1e-6) < 0.05
    assert find_entropy(router="standardized", selection_temperature=0.01) < find_entropy(router="standardized")
    other = {"hierarchy": "fenwick"} if kind == "hierarchical" else {"router": "top1"}
    assert 0 < find_entropy(**other) < 1


SETTINGS = EvalConfig(
    long_documents=LongDocumentsConfig(min_tokens=60, max_tokens_per_document=150, edges=(0, 32)),
    passages=PassagesConfig(max_documents=9, num_helped=99, num_harmed=99, num_candidates=3),
)


@pytest.mark.parametrize("kind", ["infini", "multi_memory", "hierarchical", "token_memory"])
def test_values_are_those_of_long_documents(kind):
    subject = Subject(make_reader(kind), TOKENIZER, REAL, SETTINGS)
    alone = MEASURES["passages"].run(subject)
    long, found = (MEASURES[name].run(subject) for name in ("long", "passages"))
    assert found["value_nats"] == pytest.approx(alone["value_nats"], abs=1e-6)
    for way, own in (("carried", "carried"), ("reset", "emptied")):
        expected = sum(sum(document["total_nll"][way]) for document in long["documents"])
        first = sum(document["total_nll"][way][0] for document in long["documents"])  # holds all first segments
        shown = sum(token[own] for passage in found["passages"] for token in passage["tokens"])
        assert expected - first < shown < expected  # every segment but the first ones is shown here
    worth = sum(sum(one["total_nll"]["reset"]) - sum(one["total_nll"]["carried"]) for one in long["documents"])
    assert found["value_nats"] * found["num_tokens"] == pytest.approx(worth, abs=1e-6)
    assert sum(passage["value_nats"] for passage in found["passages"]) == pytest.approx(worth, abs=1e-6)
    selects = kind in ("multi_memory", "hierarchical")
    for token in (token for passage in found["passages"] for token in passage["tokens"]):
        assert 0 < token["gate"] < 1 if kind == "token_memory" else token["gate"] is None
        assert (token["selection"] is not None) == selects
        assert all(sum(shares) == pytest.approx(1, abs=1e-3) for shares in token["selection"] or ())


def test_texts_are_the_documents_candidates_the_models_and_continuations_differ_by_the_memory_alone():
    ids = TOKENIZER.encode("a \u03c3(q) \U0001f600 b", add_special_tokens=False).ids
    pieces = [continue_text(TOKENIZER, ids[max(0, at - 16) : at], ids[at : at + 1]) for at in range(len(ids))]
    assert "".join(pieces) == TOKENIZER.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)  # a character of several tokens is the last one's
    subject = Subject(make_reader("token_memory"), TOKENIZER, REAL, SETTINGS)
    found = MEASURES["passages"].run(subject)
    texts = MEASURES["passages"].texts([ModelResult("model", found)])
    for passage, shaded in zip(found["passages"], texts, strict=False):
        whole = TOKENIZER.decode(REAL.document(passage["document"]).tolist(), skip_special_tokens=False)
        assert passage["before"][-20:] + "".join(token.text for token in shaded.tokens) in whole
        for token in passage["tokens"]:
            shares = [share for _, share in token["with_memory"]]
            assert shares == sorted(shares, reverse=True)
            right = [share for text, share in token["with_memory"] if text == token["text"]]
            assert all(share == pytest.approx(np.exp(-token["carried"]), abs=1e-3) for share in right)
    for one, text in zip(found["continuations"], texts[len(found["passages"]) :], strict=True):
        document = REAL.document(one["document"])[:150]
        begin = one["segment"] * subject.model.segment_length
        whole = TOKENIZER.decode(document[begin:].tolist(), skip_special_tokens=False)
        assert whole.startswith(one["prompt"] + one["true"])
        assert text.versions[2][1] == one["true"]
    assert any(one["carried"] != one["emptied"] for one in found["continuations"])
    assert "nats per token" in MEASURES["passages"].describe(found)
    assert MEASURES["passages"].run(Subject(make_reader("pythia"), TOKENIZER, REAL, SETTINGS)) is None


def test_passages_are_ranked_and_the_first_segment_is_never_one():
    values = [np.array([9.0, 9, 1, 1, -3, 0]), np.array([0.0, 0, 2, 2])]
    assert find_passages(values, 2, 2, 1) == [(1, 1), (0, 1), (0, 2)]
    assert find_half_share(np.array([3.0, 1, 1, 1, -5, 0])) == pytest.approx(1 / 6)
    assert find_half_share(np.array([-1.0])) is None
