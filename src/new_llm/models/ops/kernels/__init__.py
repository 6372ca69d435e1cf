"""Kernels: C for the CPU (`native`) and Triton for GPUs (`triton_kernels`). Without them every op has a PyTorch form.

One switch turns both off: the environment variable NEW_LLM_KERNELS=0. Before a pointer leaves Python, `check_tensor`
compares device, dtype, shape and layout with what the kernel was written for, whatever torch's defaults are.
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
"""What the kernels multiply. Only bfloat16 is given to them: see `uses_triton`."""
MAX_KEY_BYTES = 1024
"""Bytes of a key (K = 512 in bfloat16) up to which the delta rule's tiles leave registers enough."""


def are_enabled() -> bool:
    """Whether the switch allows kernels."""
    return os.environ.get(SWITCH) != "0"


HAS_TRITON = are_enabled() and importlib.util.find_spec("triton") is not None
"""Found once: torch.compile can't look for modules."""


def uses_triton(t: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)) -> bool:
    """Whether Triton's kernels take tensors such as this one: on a GPU, and in bfloat16 where they multiply.

    float32 and float64 take the PyTorch forms, whose products are cuBLAS's, in the precision that torch is set to: the
    kernels' tiles of float32 would not fit in the registers. So does float16, whose range is too small for the
    gradients of a memory.
    """
    return t.is_cuda and t.dtype in dtypes and HAS_TRITON


def limit_bytes(t: Tensor, on_cpu: int) -> int:
    """Bytes that one step of an operation may hold at once: a 64th of a GPU's memory (1.25 GB of 80), or `on_cpu`."""
    return torch.cuda.get_device_properties(t.device).total_memory // 64 if t.is_cuda else on_cpu


def load_triton() -> ModuleType:
    """The module of Triton kernels. It imports triton, which only torch's builds for GPUs bring."""
    from new_llm.models.ops.kernels import triton_kernels

    return triton_kernels


def load_triton_steps() -> ModuleType:
    """The module of Triton kernels for one token, likewise."""
    from new_llm.models.ops.kernels import triton_steps

    return triton_steps


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
