"""Triton kernels of the memory ops for GPUs; the PyTorch forms beside them are the reference.

`triton` is no dependency: torch's builds for CUDA bring it. Nothing here imports it before a kernel is called. Kernels
take float32 and bfloat16. float64 takes the PyTorch forms, and so does float16, whose range is too small for the
gradients of a memory.
"""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)

MAX_KEY_BYTES = 4096
"""Bytes of a key beyond which the delta rule's tiles no longer fit an H200's 227 KB of shared memory."""


@functools.cache
def is_installed() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def is_wanted(t: Tensor) -> bool:
    """Whether kernels run on tensors such as this one."""
    return t.is_cuda and t.dtype in DTYPES and is_installed()


def sum_causally(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See `local.sum_causally`."""
    from new_llm.models.ops.triton import local

    return local.sum_causally(*args, **kwargs)


def write_with_delta(*args: Any, **kwargs: Any) -> Tensor:
    """See `recurrence.write_with_delta`."""
    from new_llm.models.ops.triton import recurrence

    return recurrence.write_with_delta(*args, **kwargs)


def write_sums(*args: Any, **kwargs: Any) -> None:
    """See `recurrence.write_sums`."""
    from new_llm.models.ops.triton import recurrence

    recurrence.write_sums(*args, **kwargs)
