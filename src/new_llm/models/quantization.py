"""Weights of 8 bits: w ≈ s q, q an integer from −127 to 127, s one scale for each output of a linear layer.

s = max |w| / 127 over the output's row and q = round(w / s), so nothing is clipped and nothing is learned. Activations
stay as they are (weight-only, LLM.int8(), arXiv:2208.07339, section 2.1, without its outliers). The embedding, which a
step reads one row of, biases and LayerNorms are not rounded.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from new_llm.models.ops.kernels import native

LEVELS = 127
BLOCK_ROWS = 4096
"""Rows that are rounded at once without a kernel, so that little is held in float32."""


@dataclass(frozen=True)
class Int8Weight:
    """A weight [outputs, inputs] as q [outputs, inputs] int8 and s [outputs], float32 or wider."""

    values: Tensor
    scales: Tensor

    def widen(self, dtype: torch.dtype) -> Tensor:
        """s q, [outputs, inputs]."""
        return (self.values.to(self.scales.dtype) * self.scales.unsqueeze(1)).to(dtype)

    def pick(self, outputs: Tensor, dtype: torch.dtype) -> Tensor:
        """s q of some outputs [...], [..., inputs]."""
        return (self.values[outputs].to(self.scales.dtype) * self.scales[outputs].unsqueeze(-1)).to(dtype)


def quantize_rows_naive(weight: Tensor) -> Int8Weight:
    """`quantize_rows` from the equation."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scales = wide.abs().amax(1) / LEVELS
    levels = torch.where(scales > 0, wide.t() / scales, 0).t()
    return Int8Weight(levels.round().clamp(-LEVELS, LEVELS).to(torch.int8), scales)


def quantize_rows(weight: Tensor) -> Int8Weight:
    """Round a weight [outputs, inputs] to 8 bits, the same on every machine.

    Raises:
        ValueError: the weight holds a number that is not finite.
    """
    weight = weight.detach()
    kernels = native.find_kernels(weight) if weight.numel() else None
    if kernels is not None:
        quantized = Int8Weight(*native.quantize_rows(kernels, weight))
    else:
        parts = [quantize_rows_naive(block) for block in weight.split(BLOCK_ROWS)]
        quantized = Int8Weight(torch.cat([p.values for p in parts]), torch.cat([p.scales for p in parts]))
    if not bool(quantized.scales.isfinite().all()):
        raise ValueError("a weight is not finite: it can't be rounded to 8 bits")
    return quantized


def quantize_weights(model: nn.Module) -> None:
    """Round the weights of a model's linear layers in place to those that 8 bits keep, in the dtype that they have.

    In float32 the model then is the one that `generate(weights="int8")` runs: to measure what the rounding costs. A
    head that is the embedding becomes one of its own.

    Raises:
        ValueError: a weight holds a number that is not finite.
    """
    if untie := getattr(model, "untie_embeddings", None):
        untie()
    with torch.no_grad():
        for linear in find_linears(model):
            linear.weight.copy_(quantize_rows(linear.weight).widen(linear.weight.dtype))


def find_linears(model: nn.Module) -> list[nn.Linear]:
    """The linear layers whose forward nothing else has replaced."""
    return [part for part in model.modules() if type(part) is nn.Linear and "forward" not in vars(part)]


def linear_int8_naive(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """`linear_int8` from the equation, in the precision of the scales."""
    wide = weight.scales.dtype
    return F.linear(x.to(wide), weight.widen(wide), None if bias is None else bias.to(wide)).to(x.dtype)


def linear_int8(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """x (s q)ᵀ + b, [..., inputs] to [..., outputs]; few rows read 8 bits a weight where there is a compiled kernel."""
    if native.can_run_compiled(x, weight.values.dtype) and (bias is None or bias.dtype == x.dtype):
        kernels = native.find_kernels(x) if bias is None else native.find_kernels(x, bias)
        if kernels is not None:
            return native.linear_rows(kernels, x, native.Matrix(weight.values, weight.scales, bias))
    if x.dtype != torch.bfloat16:
        return F.linear(x, weight.widen(x.dtype), bias)
    product = F.linear(x, weight.values.to(x.dtype)) * weight.scales.to(x.dtype)  # q is exact in bfloat16, s q is not
    return product if bias is None else product + bias
