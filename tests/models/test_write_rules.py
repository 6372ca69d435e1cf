"""What is known to go wrong in the present write rule, and the options that mend it."""

import pytest
import torch
import torch.nn.functional as F

from model_cases import assert_near
from new_llm.config import UserError
from new_llm.models.layers import HierarchicalLayer, InfiniLayer, MultiMemoryLayer
from new_llm.models.ops import feature_map, gated_delta_rule, read_memories, write_memory

EPSILON = 1e-6


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_with_z_in_the_divisor_a_pair_that_is_written_twice_reads_half() -> None:
    """The second write finds that nothing is missing and adds nothing to M, but z has grown; and so on for ever."""
    k, v = feature_map(draw(1, 1, 1, 8)), draw(1, 1, 1, 8, seed=1)
    memory, norm = torch.zeros(1, 1, 8, 8).double(), torch.zeros(1, 1, 8).double()
    found = []
    for _ in range(4):
        memory, norm = write_memory(k, v, memory, norm, use_delta_rule=True, epsilon=EPSILON)
        found.append(read_memories(k, memory.unsqueeze(1), norm.unsqueeze(1), epsilon=EPSILON) / v)
    for one, expected in zip(found, (1, 0.5, 0.5, 0.5), strict=True):
        assert_near(one, torch.full_like(one, expected), 1e-9)


def test_without_z_and_with_unit_keys_it_reads_what_was_written() -> None:
    k, v = F.normalize(draw(1, 1, 1, 8), dim=-1).expand(1, 1, 4, 8), draw(1, 1, 1, 8, seed=1).expand(1, 1, 4, 8)
    ones = torch.ones(1, 1, 4).double()
    reads, _ = gated_delta_rule(k, k, v, ones, 0 * ones, torch.zeros(1, 1, 8, 8).double())
    assert_near(reads, v, 1e-12)


@pytest.mark.parametrize(
    ("layer_type", "options", "message"),
    [
        (InfiniLayer, {"key_features": "unit"}, "unit keys are signed"),
        (
            InfiniLayer,
            {"key_features": "unit", "use_normalizer": False, "normalize_keys": True},
            "unit keys are signed",
        ),
        (MultiMemoryLayer, {"router": "top1", "use_token_decay": True}, "not router top1 or hierarchy fenwick"),
        (InfiniLayer, {"use_normalizer": False}, "diverges on keys longer than 1"),
        (
            HierarchicalLayer,
            {"hierarchy": "fenwick", "use_normalizer": False, "key_features": "softmax"},
            "not router top1 or hierarchy fenwick",
        ),
    ],
)
def test_rules_that_do_not_fit_are_refused(layer_type: type, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        layer_type(16, 2, 24, **options)


def test_memories_weighed_by_their_products_with_z_are_one_summed_memory() -> None:
    """Σ_m w_m A_m with w_m = q z_m / Σ q z is q (Σ M_m) / q (Σ z_m): to select so is not to select."""
    q, memories, norms = (
        feature_map(draw(2, 3, 5, 8)),
        draw(2, 4, 3, 8, 6, seed=1),
        feature_map(draw(2, 4, 3, 8, seed=2)),
    )
    products = torch.einsum("bhsk,bnhk->bnhs", q, norms)
    weights = products / products.sum(1, keepdim=True)
    selected = read_memories(q, memories, norms, epsilon=EPSILON, weights=weights)
    summed = read_memories(q, memories.sum(1, keepdim=True), norms.sum(1, keepdim=True), epsilon=EPSILON)
    assert_near(selected, summed, 1e-12)
