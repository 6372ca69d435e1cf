"""A Pythia layer's decoding step as one compiled call; the layer's own `step` is the reference."""

from typing import Any

import torch
from torch import Tensor, nn

from new_llm.models.layers import PythiaLayer, Step
from new_llm.models.layers.base import MLP
from new_llm.models.layers.pythia import KeyValueCache, SoftmaxAttention
from new_llm.models.ops.kernels import native
from new_llm.models.ops.kernels.native import MAX_STEP_ROWS, Matrix, PythiaStep, can_run_compiled
from new_llm.models.quantization import Int8Weight
from new_llm.models.rope import compute_rotary_angles
from new_llm.models.state import MemoryState

LINEARS = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
NORMS = ("input_layernorm", "post_attention_layernorm")
PARTS = {"": PythiaLayer, "attention": SoftmaxAttention, "mlp": MLP}
PARTS |= dict.fromkeys(LINEARS, nn.Linear) | dict.fromkeys(NORMS, nn.LayerNorm)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class FusedPythiaStep:
    """In place of `layer.step`: one token of few rows runs compiled, everything else as ever.

    Sums are float32 from the layer's input to its output, also where the layer's own step rounds to 16 bits between.
    Weights are read where they stand, so a change of them is seen; int8 ones are what they were when they were made.

    Args:
        layer: the layer.
        quantized: int8 weights of linear layers.
    """

    def __init__(self, layer: PythiaLayer, quantized: dict[nn.Linear, Int8Weight]) -> None:
        self.layer = layer
        self.quantized = quantized
        self.parts = {name: layer.get_submodule(name) for name in PARTS}
        self.call: PythiaStep | None = None
        self.seen: list[tuple[dict[str, Any], str, Any, int]] = []

    def __call__(
        self, hidden: Tensor, opened: KeyValueCache | None, memory: MemoryState | None, step: Step
    ) -> tuple[Tensor, KeyValueCache]:
        """As `Layer.step`."""
        call = self._prepare(hidden)
        if call is None:
            return PythiaLayer.step(self.layer, hidden, opened, memory, step)
        attention = self.layer.attention
        assert isinstance(attention, SoftmaxAttention)
        cache = attention.grow_cache(opened, hidden, step)
        settings = (attention.rotary_dim, attention.rotary_emb_base)
        if ("fused", settings) not in step.shared:
            angles = compute_rotary_angles(step.positions[:, 0], *settings, torch.float32)
            step.shared["fused", settings] = tuple(part.contiguous() for part in angles)
        valid = None if step.valid is None else step.valid.contiguous()
        angles = step.shared["fused", settings]
        return call.run(hidden, cache.keys, cache.values, step.positions, valid, angles, step.longest), cache

    def _prepare(self, hidden: Tensor) -> PythiaStep | None:
        """The call for these tokens; None: the compiled step can't take them."""
        if hidden.shape[1] != 1 or len(hidden) > MAX_STEP_ROWS or not hidden.is_contiguous() or self._has_hooks():
            return None
        is_same = self.seen and all(
            owner.get(name) is found and (not place or found.data_ptr() == place)
            for owner, name, found, place in self.seen
        )
        if not is_same:
            self.call = self._describe()
        if self.call is None or hidden.dtype != self.dtype or not can_run_compiled(hidden, self.weight_dtype):
            return None
        return self.call

    def _describe(self) -> PythiaStep | None:
        """The layer's weights as the kernel takes them, if it is a plain layer and they fit."""
        self.parts = {name: self.layer.get_submodule(name) for name in PARTS}
        parameters = [entry for part in (*LINEARS, *NORMS) for entry in self._watch(part, "_parameters")]
        self.seen = [
            *parameters,
            *(entry for part in ("", "attention", "mlp") for entry in self._watch(part, "_modules")),
        ]
        if any(type(self.parts[name]) is not kind for name, kind in PARTS.items()):
            return None
        given = [tensor for _, _, tensor, _ in parameters if tensor is not None]
        kernels = native.find_kernels(*given)
        if kernels is None or len(given) < len(parameters) or len({tensor.dtype for tensor in given}) > 1:
            return None
        linears: list[Any] = [self.parts[name] for name in LINEARS]
        matrices = [self._describe_matrix(linear) for linear in linears]
        if len({matrix.weight.dtype for matrix in matrices}) > 1:
            return None
        self.dtype, self.weight_dtype = given[0].dtype, matrices[0].weight.dtype
        norms: list[Any] = [self.parts[name] for name in NORMS]
        attention: Any = self.parts["attention"]
        return PythiaStep(kernels, norms, matrices, attention.num_heads, attention.rotary_dim)

    def _watch(self, part: str, kind: str) -> list[tuple[dict[str, Any], str, Any, int]]:
        """Each parameter or module of a part: the dictionary it stands in, its name, itself, and a tensor's address."""
        owner = vars(self.parts[part])[kind]
        return [
            (owner, key, found, found.data_ptr() if isinstance(found, Tensor) else 0) for key, found in owner.items()
        ]

    def _describe_matrix(self, linear: nn.Linear) -> Matrix:
        weight = self.quantized.get(linear)
        if weight is None:
            return Matrix(linear.weight, None, linear.bias)
        return Matrix(weight.values, weight.scales, linear.bias)

    def _has_hooks(self) -> bool:
        return any(vars(part)[hooks] for part in self.parts.values() for hooks in HOOKS)
