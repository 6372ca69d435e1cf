import itertools
import json
import math

import numpy as np
import pytest
import torch
from evaluation_stand_ins import make_documents, make_exact, read_naively

from model_cases import assert_states_equal
from new_llm import evaluation
from new_llm.config.evaluation import EvalConfig, LongDocumentsConfig
from new_llm.evaluation import Baseline, LongDocuments, Subject
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


def test_documents_are_chosen_and_cut():
    model = make_exact()
    result = measure(model, max_documents=3, max_tokens_per_document=60)
    assert [entry["index"] for entry in result["documents"]] == LONG[:3]
    assert result["overall"] == measure(model, make_split([DOCUMENTS[i][:60] for i in LONG[:3]]))["overall"]


def test_one_document_has_no_foreign_memory_and_no_interval():
    result = measure(make_exact(), min_tokens=100)
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
