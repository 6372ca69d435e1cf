"""Which device and precision a machine trains in."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from new_llm.config import UserError


def choose_device(name: str) -> torch.device:
    """auto: a GPU where there is one.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch sees no GPU here; use auto or cpu")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """bf16 where it is asked for, or (auto) where the machine multiplies in it; else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _cpu_multiplies_bf16() else "fp32"


def make_autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """The context that training and evaluation both run the model in."""
    if precision == "bf16":
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext


def _cpu_multiplies_bf16() -> bool:
    capabilities = torch.backends.cpu.get_cpu_capability()
    if not capabilities.startswith("AVX512"):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
