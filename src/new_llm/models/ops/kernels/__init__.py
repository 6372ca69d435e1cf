"""Kernels: C for the CPU (`native`), Triton for GPUs (`triton_kernels`). Every op also has a PyTorch implementation.

The environment variable NEW_LLM_KERNELS=0 turns all kernels off. Before a pointer is passed to a kernel, `check_tensor`
checks the tensor's device, dtype, shape and layout.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

SWITCH = "NEW_LLM_KERNELS"
TRITON_DTYPES = (torch.bfloat16, torch.float32)
"""The dtypes that the kernels can multiply. In practice they only get bfloat16: see `uses_triton`."""
MAX_KEY_BYTES = 1024
"""Largest key, in bytes (K = 512 in bfloat16), for which the delta rule's tiles leave enough registers."""


def are_enabled() -> bool:
    """Whether the switch allows kernels."""
    return os.environ.get(SWITCH) != "0"


HAS_TRITON = are_enabled() and importlib.util.find_spec("triton") is not None
"""Determined at import, since torch.compile can't trace the search for a module."""


def uses_triton(t: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)) -> bool:
    """Whether Triton kernels run on this tensor: it is on a GPU, in one of `dtypes`, and Triton is available.

    Kernels with matrix products take bfloat16 only. float32 and float64 use PyTorch and cuBLAS, in the precision that
    torch is set to, since float32 tiles would not fit in the kernels' registers. float16 uses PyTorch, too: its range
    is too small for a memory's gradients.
    """
    return t.is_cuda and t.dtype in dtypes and HAS_TRITON


def limit_bytes(t: Tensor, on_cpu: int) -> int:
    """Bytes that an op may hold at once: 1/64 of a GPU's memory (1.25 GB of 80 GB), or `on_cpu` on a CPU."""
    return torch.cuda.get_device_properties(t.device).total_memory // 64 if t.is_cuda else on_cpu


def load_triton() -> ModuleType:
    """The module `triton_kernels`, imported on demand: only torch's GPU builds come with triton."""
    from new_llm.models.ops.kernels import triton_kernels

    return triton_kernels


def load_triton_steps() -> ModuleType:
    """The module `triton_steps`, the Triton kernels for decoding, imported on demand."""
    from new_llm.models.ops.kernels import triton_steps

    return triton_steps


def check_tensor(
    name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None, device: torch.device | None = None
) -> None:
    """Raise ValueError unless a tensor is contiguous with this shape, dtype (None: any) and device (None: the CPU)."""
    is_placed = t.is_cpu if device is None else t.device == device
    if is_placed and (dtype is None or t.dtype is dtype) and t.shape == shape and t.is_contiguous():
        return
    layout = "contiguous" if t.is_contiguous() else "not contiguous"
    raise ValueError(
        f"{name}: {list(t.shape)} of {t.dtype} on {t.device}, {layout}; the kernel needs a contiguous "
        f"{list(shape)} of {dtype or 'any dtype'} on {device or 'the CPU'}"
    )


def differentiate_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a backward without a derivative of its own: asking for one is a RuntimeError.

    torch's `once_differentiable` lets second derivatives be 0 where the gradient from above is a constant, as for a
    loss, or where `torch.autograd.grad` is asked for those of some tensors.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *upstreams: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("create_graph: New-LLM's fast functions have no second derivatives")
        return backward(ctx, *upstreams)

    return run
