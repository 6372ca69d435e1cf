"""Laws of the ops, whatever the numbers."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from new_llm.models.ops import (
    feature_map,
    local_linear_attention,
    read_memories,
    sum_outer_products,
    write_memory,
)

EPSILON = 1e-6
TINY = 1e-10
often = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 10_000)
lengths = st.integers(1, 12)
chunk_lengths = st.integers(1, 13)


def draw_features(seed: int, *shape: int) -> Tensor:
    return feature_map(2 * draw(seed, *shape))


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_segment(seed: int, length: int, rows: int = 2, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q, k = (draw_features(seed + part, rows, heads, length, 3) for part in (0, 1))
    return q, k, draw(seed + 2, rows, heads, length, 4)


def write(k: Tensor, v: Tensor, state: tuple[Tensor, Tensor], *, delta: bool) -> tuple[Tensor, Tensor]:
    return write_memory(k, v, *state, use_delta_rule=delta, epsilon=EPSILON)


def make_empty(rows: int = 2, heads: int = 2) -> tuple[Tensor, Tensor]:
    return torch.zeros(rows, heads, 3, 4).double(), torch.zeros(rows, heads, 3).double()


@often
@given(seeds, st.integers(2, 12), chunk_lengths, st.data())
def test_initial_sums_stand_for_earlier_tokens(seed: int, length: int, chunk_length: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, length - 1))
    q, k, v = draw_segment(seed, length)
    whole = local_linear_attention(q, k, v, epsilon=EPSILON, chunk_length=chunk_length)
    sums = sum_outer_products(k[..., :cut, :], v[..., :cut, :], torch.float64), k[..., :cut, :].sum(-2)
    rest = (t[..., cut:, :] for t in (q, k, v))
    continued = local_linear_attention(*rest, epsilon=EPSILON, chunk_length=chunk_length, initial_sums=sums)
    torch.testing.assert_close(continued, whole[..., cut:, :], atol=TINY, rtol=TINY)


@often
@given(seeds, lengths)
def test_reading_is_a_mean_of_the_written_values(seed: int, length: int) -> None:
    """Without the delta rule A_mem is a weighted mean of the v: it stays between their least and greatest."""
    q, k, v = draw_segment(seed, length)
    memory, norm = write(k, v, make_empty(), delta=False)
    out = read_memories(q, memory.unsqueeze(1), norm.unsqueeze(1), epsilon=EPSILON)
    assert bool((out >= v.amin(-2, keepdim=True) - TINY).all())
    assert bool((out <= v.amax(-2, keepdim=True) + TINY).all())


@often
@given(seeds, lengths, lengths)
def test_without_delta_rule_writes_add_in_any_order(seed: int, length: int, other_length: int) -> None:
    _, k, v = draw_segment(seed, length)
    _, other_k, other_v = draw_segment(seed + 5, other_length)
    forward = write(other_k, other_v, write(k, v, make_empty(), delta=False), delta=False)
    backward = write(k, v, write(other_k, other_v, make_empty(), delta=False), delta=False)
    at_once = write(torch.cat((k, other_k), 2), torch.cat((v, other_v), 2), make_empty(), delta=False)
    for one, two, three in zip(forward, backward, at_once, strict=True):
        torch.testing.assert_close(one, two, atol=TINY, rtol=TINY)
        torch.testing.assert_close(one, three, atol=TINY, rtol=TINY)


@often
@given(seeds, lengths)
def test_with_delta_rule_the_same_token_is_learned_once(seed: int, length: int) -> None:
    """A (k, v) that the memory already gives back changes M by nothing; without the rule it counts twice."""
    _, k, v = draw_segment(seed, 1)
    k, v = k.expand(-1, -1, length, -1), v.expand(-1, -1, length, -1)
    once = write(k, v, make_empty(), delta=True)
    twice = write(k, v, once, delta=True)
    summed = write(k, v, once, delta=False)
    first_change = once[0].norm()
    assert (twice[0] - once[0]).norm() <= 1e-9 * first_change
    torch.testing.assert_close((summed[0] - once[0]).norm(), first_change)
    torch.testing.assert_close(twice[1], 2 * once[1])
