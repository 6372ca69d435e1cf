import evaluation_stand_ins as stand_ins
import numpy as np
import pytest
import torch
from evaluation_stand_ins import VOCAB_SIZE, make_documents, make_tiny_model

from new_llm.config import EvalConfig
from new_llm.data.tokenizer import TokenSplit
from new_llm.evaluation import MemoryUsage, Subject

LENGTH = 8


def make_split(*lengths: int) -> TokenSplit:
    return stand_ins.make_split(make_documents(list(lengths)))


def make_model(kind: str, **options):
    return make_tiny_model(kind, VOCAB_SIZE, LENGTH, spread=0.02, **options)


def measure(model, split, num_segments):
    return MemoryUsage().run(Subject(model, None, split, EvalConfig(memory_usage_segments=num_segments)))


@pytest.fixture
def model():
    return make_model("multi_memory", num_memories=2, memory_layers=(0, 1))


def test_norms_are_those_of_the_memory_that_reading_leaves(model):
    split = make_split(5, 60)
    usage = measure(model, split, 4)
    assert usage is not None
    assert (usage["document"], usage["num_segments"], usage["segment_length"]) == (1, 4, LENGTH)
    assert [entry["layer"] for entry in usage["layers"]] == [0, 1]
    with model.fresh_memory(), torch.no_grad():
        for segment in range(4):
            ids = torch.from_numpy(split.document(1)[segment * LENGTH : (segment + 1) * LENGTH].astype(np.int64))
            model(ids[None], update_memory=True)
            for index, entry in enumerate(usage["layers"]):
                memories = model.get_memory_state()[index]["memories"]
                expected = [[float(memories[m, h].norm()) for h in range(2)] for m in range(2)]
                np.testing.assert_allclose(entry["norms"][segment], expected, rtol=1e-4)
    # Memories are written in turn: the second is empty after the first segment, and full after the second.
    first = usage["layers"][0]["norms"]
    assert set(first[0][1]) == {0.0}
    assert min(first[1][1]) > 0
    assert first[1][0] == first[0][0]


def test_a_model_without_memory_has_none():
    assert measure(make_model("pythia"), make_split(40), 2) is None


@pytest.mark.parametrize("kind", ["multi_memory", "hierarchical"])
def test_selection_entropy_is_low_at_a_low_temperature_and_one_where_all_weigh_the_same(kind):
    def find_entropy(**options):
        usage = measure(make_model(kind, num_memories=4, **options), make_split(80), 9)
        assert usage is not None
        (column,) = MemoryUsage().columns(usage)
        return column.value

    assert find_entropy(selection_temperature=1e6) == pytest.approx(1, abs=1e-6)
    assert find_entropy(selection_temperature=1e-6) < 0.05
    assert find_entropy(router="standardized", selection_temperature=0.01) < find_entropy(router="standardized")
    if kind == "hierarchical":
        assert 0 < find_entropy(hierarchy="fenwick") < 1
    else:
        assert 0 < find_entropy(router="top1") < 1
