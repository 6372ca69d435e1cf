"""Calls of decoding.c: products with few rows, a Pythia layer's step, and rounding to 8 bits."""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from new_llm.models.ops.native import SUFFIXES

MAX_ROWS = {torch.bfloat16: 4, torch.float32: 8, torch.int8: 16}
"""Rows up to which these products take less time than torch's, by the weight's dtype."""
MAX_STEP_ROWS = 8
"""Rows that a layer's step takes; decoding.c has room for no more."""

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


def can_run_compiled(x: Tensor, weight_dtype: torch.dtype) -> bool:
    """Whether activations [..., D] are few rows of a plain call on a CPU: without gradients and autocast."""
    if x.device.type != "cpu" or x.numel() > MAX_ROWS.get(weight_dtype, 0) * x.shape[-1] or torch.is_grad_enabled():
        return False
    return not torch.is_autocast_enabled("cpu")


class _Linear(ctypes.Structure):
    _fields_ = [("weight", _POINTER), ("bias", _POINTER), ("scales", _POINTER), ("inputs", _SIZE), ("outputs", _SIZE)]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", _POINTER), ("bias", _POINTER), ("eps", ctypes.c_float)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("before_attention", "before_mlp")),
        *((name, _Linear) for name in ("query_key_value", "dense", "up", "down")),
        ("heads", _SIZE),
        ("rotary", _SIZE),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("hidden", "out", "keys", "values", "positions", "valid")),
        *((name, _POINTER) for name in ("cosines", "sines", "scratch")),
        *((name, _SIZE) for name in ("rows", "slots", "longest")),
        ("threads", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Matrix:
    """A linear layer's numbers, contiguous and on the CPU.

    Attributes:
        weight: [outputs, inputs], in the activations' dtype, or int8.
        scales: of an int8 weight, [outputs] float32.
        bias: [outputs] in the activations' dtype, or None.
    """

    weight: Tensor
    scales: Tensor | None
    bias: Tensor | None


def linear_rows(kernels: ctypes.CDLL, x: Tensor, matrix: Matrix) -> Tensor:
    """x Wᵀ + b, summed in float32; x is [..., inputs] in bfloat16 or float32."""
    rows = x.to(torch.float32).contiguous()
    out = x.new_empty(*x.shape[:-1], len(matrix.weight))
    _find(kernels, "linear_rows", x.dtype, matrix)(
        ctypes.byref(_describe_linear(matrix)),
        rows.data_ptr(),
        rows.numel() // rows.shape[-1],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


class PythiaStep:
    """A Pythia layer's numbers as the kernel takes them. The tensors must outlive it.

    Args:
        kernels: from `load_kernels`.
        norms: the LayerNorms before attention and before the MLP.
        matrices: of query_key_value, dense, dense_h_to_4h and dense_4h_to_h.
        num_heads: heads.
        rotary_dim: rotated dimensions of a head.
    """

    def __init__(
        self,
        kernels: ctypes.CDLL,
        norms: Sequence[nn.LayerNorm],
        matrices: Sequence[Matrix],
        num_heads: int,
        rotary_dim: int,
    ) -> None:
        described = [_Norm(norm.weight.data_ptr(), norm.bias.data_ptr(), norm.eps) for norm in norms]
        self._layer = _Layer(*described, *map(_describe_linear, matrices), num_heads, rotary_dim)
        self._run = _find(kernels, "step_pythia", norms[0].weight.dtype, matrices[0])
        self._count_scratch = kernels.count_step_scratch
        self._count_scratch.argtypes = [*[_SIZE] * 5, ctypes.c_int]
        self._count_scratch.restype = _SIZE
        self._sizes = (norms[0].weight.numel(), num_heads, len(matrices[2].weight))

    def run(
        self,
        hidden: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        valid: Tensor | None,
        angles: tuple[Tensor, Tensor],
        longest: int,
    ) -> Tensor:
        """The layer's output [B, 1, D] for one more token of each row, which joins the cache.

        Args:
            hidden: [B, 1, D], contiguous, of the layer's dtype.
            keys: [B, heads, slots, K], contiguous, of the layer's dtype.
            values: the same.
            positions: [B] int64, each below slots.
            valid: [B] bool: rows that take a token; None: all.
            angles: cos and sin [B, rotary_dim], float32, contiguous.
            longest: tokens of the longest row with this one.
        """
        out, threads = torch.empty_like(hidden), torch.get_num_threads()
        scratch = torch.empty(self._count_scratch(*self._sizes, len(hidden), longest, threads))
        cosines, sines = angles
        step = _Step(
            hidden.data_ptr(),
            out.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            positions.data_ptr(),
            None if valid is None else valid.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            scratch.data_ptr(),
            len(hidden),
            keys.shape[2],
            longest,
            threads,
        )
        self._run(ctypes.byref(self._layer), ctypes.byref(step))
        return out


def quantize_rows(kernels: ctypes.CDLL, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values [rows, columns] int8 and scales [rows] of a contiguous bfloat16 or float32 weight."""
    values = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), dtype=torch.float32)
    function = getattr(kernels, f"quantize_rows_{SUFFIXES[weight.dtype]}")
    function.argtypes = [_POINTER, _SIZE, _SIZE, _POINTER, _POINTER, ctypes.c_int]
    function.restype = None
    function(weight.data_ptr(), *weight.shape, values.data_ptr(), scales.data_ptr(), torch.get_num_threads())
    return values, scales


def _describe_linear(matrix: Matrix) -> _Linear:
    pointers = (None if part is None else part.data_ptr() for part in (matrix.weight, matrix.bias, matrix.scales))
    return _Linear(*pointers, matrix.weight.shape[1], matrix.weight.shape[0])


def _find(kernels: ctypes.CDLL, name: str, dtype: torch.dtype, matrix: Matrix) -> Any:
    return _declare(kernels, f"{name}_{SUFFIXES[dtype]}" + "_int8" * (matrix.weight.dtype == torch.int8))


@functools.cache
def _declare(kernels: ctypes.CDLL, name: str) -> Any:
    function = getattr(kernels, name)
    is_step = name.startswith("step_pythia")
    function.argtypes = [_POINTER, _POINTER] if is_step else [_POINTER, _POINTER, _SIZE, _POINTER, ctypes.c_int]
    function.restype = None
    return function
