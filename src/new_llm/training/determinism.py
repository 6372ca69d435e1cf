"""Two runs of one configuration on one machine that agree in every bit."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUBLAS_WORKSPACE = ":4096:8"
"""A workspace for each stream, without which cuBLAS promises nothing (NVIDIA's cuBLAS documentation, 2.1.4)."""


@contextmanager
def compute_deterministically(is_wanted: bool = True) -> Iterator[None]:
    """Inside the block torch takes only algorithms that give the same bits every time; an op without one is an error.

    The number of threads must be the same too: sums are cut by it. `environment.json` has it.

    Args:
        is_wanted: False: the block changes nothing.
    """
    if not is_wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
