"""What decoding computes with: the model's weights in the form that reads fastest, a token at a time.

A step multiplies every weight with few rows, and its time is that of reading the weights. On a CPU with a compiler the
compiled kernels read them where they stand; without one oneDNN reads a copy in its own order. With `int8` each linear
layer's weights are rounded to 8 bits first, for the prompt too, and half as much is read.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from new_llm.models.layers import PythiaLayer
from new_llm.models.ops.kernels import native
from new_llm.models.ops.kernels.native import MAX_ROWS, Matrix, can_run_compiled, linear_rows
from new_llm.models.packed_linears import can_pack, pack_linear
from new_llm.models.pythia_step import FusedPythiaStep
from new_llm.models.quantization import find_linears, linear_int8, quantize_rows

if TYPE_CHECKING:
    from new_llm.models.transformer import TransformerLM

Forward = Callable[[Tensor], Tensor]


class StepWeights:
    """A model's weights for one generation.

    Args:
        model: the model.
        weights: `auto`: those that it has; `int8`: rounded to 8 bits, as they are now.
        num_rows: rows of the batch; for many the kernels are not the fastest.
        packs: where the kernels are not, let oneDNN copy the weights, which takes the time of some steps.

    Raises:
        ValueError: with `int8`, a weight that is not finite.
    """

    def __init__(self, model: "TransformerLM", weights: Literal["auto", "int8"], *, num_rows: int, packs: bool) -> None:
        linears = find_linears(model)
        self.quantized = {}
        if weights == "int8":
            self.quantized = {linear: quantize_rows(linear.weight) for linear in linears}
        forwards = [(linear, self._choose_forward(linear, num_rows, packs)) for linear in linears]
        steps = [
            (layer, FusedPythiaStep(layer, self.quantized))
            for layer in model.layers
            if type(layer) is PythiaLayer and "step" not in vars(layer) and native.find_kernels(*layer.parameters())
        ]
        rows = []
        if model.embed_out in self.quantized and model.layer_list[-1].follows_final_norm:
            rows = [(model, "find_token_rows", self._pick_token_rows(model.embed_out))]
        self.replaced: list[tuple[nn.Module, str, Any]] = [
            *rows,
            *((module, "forward", forward) for module, forward in forwards if forward is not None),
            *((module, "step", step) for module, step in steps),
        ]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside the block the model computes with them. Blocks of one model may not overlap."""
        try:
            for module, name, replacement in self.replaced:
                vars(module)[name] = replacement
            yield
        finally:
            for module, name, _ in self.replaced:
                vars(module).pop(name, None)

    def _pick_token_rows(self, head: nn.Linear) -> Forward:
        weight, dtype = self.quantized[head], head.weight.dtype
        return lambda input_ids: weight.pick(input_ids, dtype)

    def _choose_forward(self, linear: nn.Linear, num_rows: int, packs: bool) -> Forward | None:
        if linear in self.quantized:
            weight = self.quantized[linear]
            return lambda x: linear_int8(x, weight, linear.bias)
        if num_rows <= MAX_ROWS.get(linear.weight.dtype, 0) and native.find_kernels(linear.weight) is not None:
            return make_native_forward(linear)
        return pack_linear(linear) if packs and can_pack(linear.weight) else None


def make_native_forward(linear: nn.Linear) -> Forward:
    """A forward that runs few rows by the compiled kernel, and the others as ever."""

    def forward(x: Tensor) -> Tensor:
        weight, bias = linear.weight, linear.bias
        tensors = (x, weight) if bias is None else (x, weight, bias)
        if can_run_compiled(x, weight.dtype):
            kernels = native.find_kernels(*tensors)
            if kernels is not None and all(tensor.dtype == x.dtype for tensor in tensors):
                return linear_rows(kernels, x, Matrix(weight, None, bias))
        return F.linear(x, weight, bias)

    return forward
