"""What a memory holds, and what it knew of the text that is read."""

import numpy as np
import pytest
import torch
from evaluation_stand_ins import REAL, TOKENIZER, VOCAB_SIZE, make_documents, make_reader, make_tiny_model

from new_llm.config import EvalConfig
from new_llm.config.evaluation import LongDocumentsConfig, PassagesConfig
from new_llm.evaluation import MEASURES, MemoryUsage, ModelResult, Subject
from new_llm.evaluation.passages import continue_text, find_half_share, find_passages
from tiny import make_split

LENGTH = 8
SPLIT = make_split(make_documents([5, 80]))


def measure(kind, num_segments, **options):
    model = make_tiny_model(kind, VOCAB_SIZE, LENGTH, spread=0.02, **options)
    return model, MemoryUsage().run(Subject(model, None, SPLIT, EvalConfig(memory_usage_segments=num_segments)))


def test_norms_are_those_of_the_memory_that_reading_leaves():
    model, usage = measure("multi_memory", 4, num_memories=2, memory_layers=(0, 1))
    assert (usage["document"], usage["num_segments"], usage["segment_length"]) == (1, 4, LENGTH)
    assert [entry["layer"] for entry in usage["layers"]] == [0, 1]
    with model.fresh_memory(), torch.no_grad():
        for segment in range(4):
            ids = torch.from_numpy(SPLIT.document(1)[segment * LENGTH : (segment + 1) * LENGTH].astype(np.int64))
            model(ids[None], update_memory=True)
            for index, entry in enumerate(usage["layers"]):
                expected = model.get_memory_state()[index]["memories"].flatten(2).norm(dim=-1)
                np.testing.assert_allclose(entry["norms"][segment], expected, rtol=1e-4)
    # Memories are written in turn: the second is empty after the first segment, and full after the second.
    first = usage["layers"][0]["norms"]
    assert set(first[0][1]) == {0.0}
    assert min(first[1][1]) > 0
    assert first[1][0] == first[0][0]
    assert measure("pythia", 2)[1] is None


@pytest.mark.parametrize("kind", ["multi_memory", "hierarchical"])
def test_selection_entropy_is_low_at_a_low_temperature_and_one_where_all_weigh_the_same(kind):
    def find_entropy(**options):
        (column,) = MemoryUsage().columns(measure(kind, 9, num_memories=4, **options)[1])
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


def test_a_character_of_several_tokens_is_the_last_ones():
    ids = TOKENIZER.encode("a \u03c3(q) \U0001f600 b", add_special_tokens=False).ids
    texts = [continue_text(TOKENIZER, ids[max(0, at - 16) : at], ids[at : at + 1]) for at in range(len(ids))]
    assert "".join(texts) == TOKENIZER.decode(ids)
    assert not any("\ufffd" in text for text in texts)


def test_passages_are_ranked_and_the_first_segment_is_never_one():
    values = [np.array([9.0, 9, 1, 1, -3, 0]), np.array([0.0, 0, 2, 2])]
    assert find_passages(values, 2, 2, 1) == [(1, 1), (0, 1), (0, 2)]
    assert find_half_share(np.array([3.0, 1, 1, 1, -5, 0])) == pytest.approx(1 / 6)
    assert find_half_share(np.array([-1.0])) is None
