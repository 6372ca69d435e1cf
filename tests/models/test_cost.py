"""What models cost, parameters made equal, and models larger than the machine."""

import dataclasses
import resource

import pytest
import torch

from new_llm import create_model
from new_llm.config import UserError
from new_llm.models.cost import count_flops, count_memory, count_state, read_memory_limit
from new_llm.models.factory import MODEL_KINDS, match_parameters
from tiny import make_shape, refused

L, D, H, S, Z = 2, 32, 2, 8, 64
SHAPE = make_shape(vocab_size=Z, hidden_size=D, num_hidden_layers=L, num_attention_heads=H, intermediate_size=48)
K = D // H
MEMORY = H * K * (K + 1)  # M and z
OPEN = H * K * (2 * K + 1) + D  # both sums of products, that of keys, the last key


@pytest.mark.parametrize(
    ("kind", "options", "length", "memory", "opened"),
    [
        ("pythia", {}, 32, 0, L * 2 * D * 32),
        ("pythia_segments", {}, S, 0, L * 2 * D * S),
        ("selective", {"skip_interval": 2}, S, 0, 3 * L * 2 * D * S),
        ("transformer_xl", {"memory_tokens": 12}, S, L * 2 * D * 12, L * 2 * D * S),
        ("infini", {"num_memory_heads": H}, S, MEMORY, 2 * D * S + OPEN),
        ("multi_memory", {"num_memories": 3}, S, 3 * MEMORY, 2 * D * S + OPEN),
        ("multi_memory", {"router": "top1", "num_memories": 3}, S, 4 * MEMORY, 2 * D * S + D * S),
        ("hierarchical", {"num_memories": 3}, S, 3 * MEMORY, 2 * D * S + OPEN),
        ("hierarchical", {"hierarchy": "fenwick", "num_memories": 5}, S, 5 * MEMORY, 2 * D * S + OPEN),
        ("infini", {"num_memory_heads": H, "local_attention": "softmax"}, S, MEMORY, 4 * D * S + H * K * (K + 3)),
        ("gated_delta", {}, S, H * K * K + 3 * 3 * D, 2 * D * S),  # an open segment is the memory
        ("token_memory", {"num_memory_heads": 3}, S, 3 * D // 2 * (D + 1), L * 2 * D * S + 3 * D // 2 * (D + 2)),
        ("rmt", {"num_memory_tokens": 3}, S, 3 * D, D * S),
    ],
)
def test_the_state_is_what_a_stream_keeps(kind, options, length, memory, opened):
    model = create_model(kind, SHAPE, segment_length=length, **options)
    assert count_memory(model) == memory
    assert count_state(model) == memory + opened
    assert model.memory_rows is None


def test_operations_are_those_of_the_products():
    model = create_model("pythia_segments", SHAPE, segment_length=S).eval()
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    attention = L * 2 * 2 * D * S  # q kᵀ and its product with v, of S tokens each
    assert count_flops(model, 4 * S) == 2 * weights + attention


@pytest.mark.parametrize("kind", sorted(set(MODEL_KINDS) - {"deep_pythia"}))
def test_parameters_match_to_a_percent_by_the_width_of_the_mlps(kind):
    shape = dataclasses.replace(SHAPE, num_hidden_layers=4, intermediate_size=256)
    before = torch.get_rng_state()
    matched = match_parameters(kind, shape)
    assert torch.equal(torch.get_rng_state(), before)
    assert dataclasses.replace(matched, intermediate_size=256) == shape
    wanted, found, as_given = (
        create_model(*of).num_parameters()["total"] for of in (("pythia", shape), (kind, matched), (kind, shape))
    )
    assert found == pytest.approx(wanted, rel=0.01)
    assert (matched == shape) == (abs(as_given / wanted - 1) <= 0.01)


def test_what_can_not_be_matched():
    assert match_parameters("deep_pythia", SHAPE) == SHAPE
    with pytest.raises(UserError, match=r"token_memory has .* parameters more than a Pythia"):
        match_parameters("token_memory", dataclasses.replace(SHAPE, intermediate_size=2))


OUT_OF_RANGE = "less than or equal to|at most"
SIZES = {
    "wide": ({"hidden_size": 10**9}, 1, OUT_OF_RANGE),
    "deep and wide": ({"num_hidden_layers": 64, "hidden_size": 1 << 14}, 1, "too large"),
    "a vocabulary": ({"vocab_size": 10**30}, 1, OUT_OF_RANGE),
    "a vocabulary in range": ({"vocab_size": 1 << 24, "hidden_size": 1 << 14}, 1, "too large"),
    "memories in range": ({"hidden_size": 1 << 8}, 1 << 24, "too large"),
}


@pytest.mark.parametrize(("sizes", "banks", "message"), SIZES.values(), ids=SIZES)
def test_a_model_too_large_is_rejected_before_it_is_allocated(sizes, banks, message, monkeypatch):
    """Folders whose files ask for one are in tests/fuzz/hostile.py."""
    before = torch.get_rng_state()
    with refused(message):
        create_model("infini", make_shape(**sizes), num_memory_banks=banks)
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1 << 20, resource.RLIM_INFINITY))
    assert read_memory_limit() == 1 << 20  # a limit of the process counts
