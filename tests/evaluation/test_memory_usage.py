import numpy as np
import pytest
import torch
from evaluation_stand_ins import VOCAB_SIZE, make_documents, make_split, make_tiny_model

from new_llm.config import EvalConfig
from new_llm.evaluation import MemoryUsage, Subject

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
