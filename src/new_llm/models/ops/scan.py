"""Decayed sums over segments, all at once."""

import torch
from torch import Tensor


def scan_sums(initial: Tensor, changes: Tensor, decay: Tensor | None = None) -> Tensor:
    """y_0 = `initial`, y_{i+1} = d_i y_i + x_i for all i, in log2(n) rounds of whole-tensor operations.

    The rounds join pairs (d, x): (d1, x1) then (d2, x2) is (d1 d2, d2 x1 + x2), which is associative.
    Source: Blelloch, Prefix Sums and Their Applications, CMU-CS-90-190, section 1.4; rounds as Hillis and Steele's.

    Args:
        initial: y_0, [B, ...].
        changes: x, [B, n, ...].
        decay: d, [B, n, ...] that broadcasts to x; None: 1.

    Returns:
        y_0 … y_n, [B, n + 1, ...].
    """
    sums = torch.cat((initial.unsqueeze(1), changes), dim=1)
    if decay is None:
        return sum_prefixes(sums, 1)
    decay = torch.cat((torch.ones_like(decay[:, :1]), decay), dim=1)
    reach = 1
    while reach < sums.shape[1]:
        joined = sums[:, reach:] + decay[:, reach:] * sums[:, :-reach]
        sums = torch.cat((sums[:, :reach], joined), dim=1)
        decay = torch.cat((decay[:, :reach], decay[:, reach:] * decay[:, :-reach]), dim=1)
        reach *= 2
    return sums


def sum_prefixes(values: Tensor, dim: int) -> Tensor:
    """Sums of the first 1, 2, … entries along a dimension: `cumsum`.

    On a GPU torch has no deterministic cumsum of real numbers; where deterministic algorithms are asked for there,
    `add_in_rounds` takes its place.
    """
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return add_in_rounds(values, dim)
    return values.cumsum(dim)


def add_in_rounds(values: Tensor, dim: int) -> Tensor:
    """`cumsum` in the rounds of `scan_sums`, each of which is one addition of whole tensors."""
    sums, reach = values, 1
    length = values.shape[dim]
    while reach < length:
        first, rest = sums.split((reach, length - reach), dim)
        sums = torch.cat((first, rest + sums.narrow(dim, 0, length - reach)), dim)
        reach *= 2
    return sums


def scan_sums_naive(initial: Tensor, changes: Tensor, decay: Tensor | None = None) -> Tensor:
    """The equation of `scan_sums`, segment by segment."""
    sums = [initial]
    for i in range(changes.shape[1]):
        before = sums[-1] if decay is None else decay[:, i] * sums[-1]
        sums.append(before + changes[:, i])
    return torch.stack(sums, dim=1)
