"""Kernels: C for the CPU (`native`) and Triton for GPUs (`triton_kernels`). Without them every op has a PyTorch form.

One switch turns both off: the environment variable NEW_LLM_KERNELS=0. Before a pointer leaves Python, `check_tensor`
compares device, dtype, shape and layout with what the kernel was written for, whatever torch's defaults are.
"""

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

SWITCH = "NEW_LLM_KERNELS"
TRITON_DTYPES = (torch.float32, torch.bfloat16)
"""float64 takes the PyTorch forms, and so does float16, whose range is too small for the gradients of a memory."""
MAX_KEY_BYTES = 4096
"""Bytes of a key beyond which the delta rule's tiles no longer fit an H200's 227 KB of shared memory."""


def are_enabled() -> bool:
    """Whether the switch allows kernels."""
    return os.environ.get(SWITCH) != "0"


def uses_triton(t: Tensor) -> bool:
    """Whether Triton's kernels run on tensors such as this one."""
    return t.is_cuda and t.dtype in TRITON_DTYPES and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return are_enabled() and importlib.util.find_spec("triton") is not None


def load_triton() -> ModuleType:
    """The module of Triton kernels. It imports triton, which only torch's builds for GPUs bring."""
    from new_llm.models.ops.kernels import triton_kernels

    return triton_kernels


def check_tensor(
    name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None, device: torch.device | None = None
) -> None:
    """Make sure by a ValueError that a kernel may read or write a tensor's memory: device, dtype, shape and layout.

    The dtype None is any, the device None the CPU.
    """
    is_placed = t.is_cpu if device is None else t.device == device
    if is_placed and (dtype is None or t.dtype is dtype) and t.shape == shape and t.is_contiguous():
        return
    layout = "contiguous" if t.is_contiguous() else "not contiguous"
    raise ValueError(
        f"{name}: {list(t.shape)} of {t.dtype} on {t.device}, {layout}; the kernel takes a contiguous "
        f"{list(shape)} of {dtype or 'any dtype'} on {device or 'the CPU'}"
    )
