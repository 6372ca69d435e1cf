"""Tile sizes and precision of the kernels' dots."""

# pyright: reportMissingImports=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST_BLOCK = 16
"""The least side of a tile that a dot takes."""


def choose_block(size: int, most: int) -> int:
    """The power of 2 that holds `size`, within 16 … `most`."""
    return min(max(triton.next_power_of_2(size), LEAST_BLOCK), most)


def choose_precision(t: Tensor) -> str:
    """How dots of float32 multiply: as torch's own products do. Other dtypes don't ask."""
    allows_tf32 = t.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allows_tf32 else "ieee"


def choose_operand(t: Tensor) -> Any:
    """The type of the dots' operands: the tensors' own, but float32 in the interpreter, which can't multiply bfloat16.

    Numbers are rounded to the tensors' type first, so that both give the same but for the order of sums.
    """
    is_interpreted = triton.knobs.runtime.interpret
    return tl.bfloat16 if t.dtype == torch.bfloat16 and not is_interpreted else tl.float32
