"""Fast decoding: products for steps that multiply every weight with few rows, and steps captured as CUDA graphs.

The time of a step is the time to read the weights. On a CPU with a C compiler, kernels read them in place, a whole
Pythia layer per call; without a compiler oneDNN reads a copy in its own layout. On a GPU a short step's time is that of
launching its kernels: recorded once in a CUDA graph, they start again by a single launch.
"""

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from new_llm.models.layers import InfiniLayer, PythiaLayer, Step
from new_llm.models.layers.base import MLP, Block
from new_llm.models.layers.compressive import EPSILON
from new_llm.models.layers.infini import InfiniAttention
from new_llm.models.layers.pythia import KeyValueCache, SoftmaxAttention, compute_rotary_angles
from new_llm.models.ops import kernels
from new_llm.models.ops.kernels import native
from new_llm.models.ops.kernels.native import (
    MAX_ROWS,
    MAX_STEP_ROWS,
    Matrix,
    PythiaStep,
    can_run_compiled,
    linear_rows,
)
from new_llm.models.state import MemoryState

MAX_PACKED_ROWS = 8
"""Most rows for which the packed weight is used; with more, the usual product is as fast."""
PACKED_DTYPES = (torch.float32, torch.bfloat16)
LINEARS = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
NORMS = ("input_layernorm", "post_attention_layernorm")
PARTS = {"": PythiaLayer, "attention": SoftmaxAttention, "mlp": MLP}
PARTS |= dict.fromkeys(LINEARS, nn.Linear) | dict.fromkeys(NORMS, nn.LayerNorm)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")

Forward = Callable[[Tensor], Tensor]

MAX_TRITON_ROWS = 16
TRITON_HEAD_SIZES = (16, 32, 64, 128)
"""Rows, and widths of heads, that Triton's kernels take."""


class DecodingWeights:
    """A model's weights for one generation of `num_rows` rows; with many rows the usual product is faster.

    `packs` lets oneDNN, where there are no kernels, copy the weights, which takes as long as some steps.
    """

    def __init__(self, model: nn.Module, *, num_rows: int, packs: bool) -> None:
        linears = [part for part in model.modules() if type(part) is nn.Linear and "forward" not in vars(part)]
        layers = [part for part in model.modules() if type(part) is PythiaLayer and "step" not in vars(part)]
        forwards = [(linear, choose_forward(linear, num_rows, packs)) for linear in linears]
        self.replaced: list[tuple[nn.Module, str, Any]] = [
            *((linear, "forward", forward) for linear, forward in forwards if forward is not None),
            *((layer, "step", FusedPythiaStep(layer)) for layer in layers if native.find_kernels(*layer.parameters())),
            *((layer, "step", TritonStep(cast(Block, layer))) for layer in model.modules() if TritonStep.takes(layer)),
        ]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Use them inside the block. Blocks of one model must not overlap."""
        try:
            for module, name, replacement in self.replaced:
                vars(module)[name] = replacement
            yield
        finally:
            for module, name, _ in self.replaced:
                vars(module).pop(name, None)


def choose_forward(linear: nn.Linear, num_rows: int, packs: bool) -> Forward | None:
    """The fastest product of few rows with a layer's weight; None: the usual one."""
    if num_rows <= MAX_ROWS.get(linear.weight.dtype, 0) and native.find_kernels(linear.weight) is not None:
        forward = make_native_forward(linear)
    elif packs and can_pack(linear.weight):
        forward = pack_linear(linear)
    else:
        return None
    cast(Any, forward).multiplies_weight = True  # see is_plain_linear
    return forward


def make_native_forward(linear: nn.Linear) -> Forward:
    """A forward that uses the compiled kernel for few rows and the usual product otherwise."""

    def forward(x: Tensor) -> Tensor:
        weight, bias = linear.weight, linear.bias
        tensors = (x, weight) if bias is None else (x, weight, bias)
        if can_run_compiled(x, weight.dtype):
            kernels = native.find_kernels(*tensors)
            if kernels is not None and all(tensor.dtype == x.dtype for tensor in tensors):
                return linear_rows(kernels, x, Matrix(weight, bias))
        return F.linear(x, weight, bias)

    return forward


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can pack this weight on this machine."""
    if weight.device.type != "cpu" or weight.dtype not in PACKED_DTYPES or weight.is_inference():
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack_linear(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    """A forward with the layer's weight packed.

    With gradients, under autocast, with more rows, or once the weight has changed, the usual product runs.
    """
    weight, bias = linear.weight, linear.bias
    version, place = weight._version, weight.data_ptr()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def forward(x: Tensor) -> Tensor:
        has_changed = linear.weight._version != version or linear.weight.data_ptr() != place
        if (
            has_changed
            or x.dtype != packed.dtype
            or x.numel() > MAX_PACKED_ROWS * x.shape[-1]
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            return F.linear(x, linear.weight, linear.bias)
        return multiply(x, packed, bias, "none", [], "")

    return forward


class TritonStep:
    """Replaces `layer.step` on a GPU: one token of few rows in three launches, everything else by the layer itself.

    It takes the steps of `MemoryStream.read_token`, which change tensors in place, of plain Pythia layers and of Infini
    layers with the default features and heads up to 128 wide. Sums are float32 throughout. Weights are read in place.
    """

    def __init__(self, layer: Block) -> None:
        self.layer = layer
        self.kept: dict[tuple[int, int], tuple[tuple[Tensor, Tensor], Tensor]] = {}

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        """Whether the kernels compute this layer."""
        if type(layer) not in (PythiaLayer, InfiniLayer) or "step" in vars(layer):
            return False
        parts = {name: layer.get_submodule(name) for name in PARTS if name}
        attention: Any = parts["attention"]
        kinds = {**PARTS, "attention": SoftmaxAttention if type(layer) is PythiaLayer else InfiniAttention}
        given = [parameter for part in (*LINEARS, *NORMS) for parameter in parts[part]._parameters.values()]
        like = next(layer.parameters())
        return (
            kernels.uses_triton(like, kernels.TRITON_DTYPES)
            and all(type(part) is kinds[name] for name, part in parts.items())
            and all(tensor is not None and tensor.dtype == like.dtype and tensor.is_contiguous() for tensor in given)
            and attention.head_size in TRITON_HEAD_SIZES
            and not any(vars(part)[hooks] for part in (layer, *parts.values()) for hooks in HOOKS)
            and (type(layer) is PythiaLayer or attention.is_plain)
        )

    def __call__(self, hidden: Tensor, opened: Any, memory: MemoryState | None, step: Step) -> tuple[Tensor, Any]:
        """As `Layer.step`."""
        layer, attention = self.layer, cast(Any, self.layer.attention)
        is_in_place = step.start is None and step.valid is None and hidden.shape[1] == 1 and hidden.is_contiguous()
        is_narrow = torch.is_autocast_enabled(hidden.device.type) or hidden.dtype != attention.dense.weight.dtype
        is_first = isinstance(attention, InfiniAttention) and memory is None  # its sums are one tensor
        if not is_in_place or is_first or is_narrow or len(hidden) > MAX_TRITON_ROWS:
            return type(layer).step(layer, hidden, opened, memory, step)
        steps = kernels.load_triton_steps()
        mixed, inner = steps.project(
            hidden,
            *(layer.input_layernorm, attention.query_key_value),
            *(layer.post_attention_layernorm, layer.mlp.dense_h_to_4h),
        )
        if isinstance(attention, SoftmaxAttention):
            opened = attention.grow_cache(opened, hidden, step)
            settings = (attention.rotary_dim, attention.rotary_emb_base, torch.float32)
            case = step.longest, len(hidden)
            if case not in self.kept:
                key = "all", settings, attention.num_heads  # equal layers, which run one after another, share both
                if key not in step.shared:
                    angles = compute_rotary_angles(torch.arange(step.longest, device=hidden.device), *settings)
                    done = torch.zeros(len(hidden) * attention.num_heads, dtype=torch.int32, device=hidden.device)
                    step.shared[key] = angles, done
                self.kept = {case: step.shared[key]}
            angles, done = self.kept[case]
            cache = opened.keys, opened.values
            mixed = steps.attend(mixed, *cache, step.offsets, angles, attention.rotary_dim, done)
        else:
            assert memory is not None
            opened = opened or attention._open_segment(len(hidden), hidden, is_one_sum=False)
            mixed = steps.recall(
                *(mixed, opened.products, opened.keys, opened.writes, opened.num_tokens),
                *(memory.memories, memory.norms, attention.gate),
                epsilon=EPSILON,
                use_delta_rule=attention.use_delta_rule,
            )
        return steps.merge(hidden, mixed, attention.dense, inner, layer.mlp.dense_4h_to_h), opened


class FusedPythiaStep:
    """Replaces `layer.step`: one token of few rows runs compiled, everything else by the layer itself.

    Sums are float32 throughout, also where the layer's own step rounds to 16 bits in between. Weights are read in
    place, so changes to them are seen.
    """

    def __init__(self, layer: PythiaLayer) -> None:
        self.layer = layer
        self.parts = {name: layer.get_submodule(name) for name in PARTS}
        self.call: PythiaStep | None = None
        self.seen: list[tuple[dict[str, Any], str, Any, int]] = []

    def __call__(
        self, hidden: Tensor, opened: KeyValueCache | None, memory: None, step: Step
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
        """The compiled call for these tokens; None: it can't take them."""
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
        """The layer's weights in the kernel's form, if the layer is plain and they fit."""
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
        matrices = [Matrix(linear.weight, linear.bias) for linear in linears]
        if len({matrix.weight.dtype for matrix in matrices}) > 1:
            return None
        self.dtype, self.weight_dtype = given[0].dtype, matrices[0].weight.dtype
        norms: list[Any] = [self.parts[name] for name in NORMS]
        attention: Any = self.parts["attention"]
        return PythiaStep(kernels, norms, matrices, attention.num_heads, attention.rotary_dim)

    def _watch(self, part: str, kind: str) -> list[tuple[dict[str, Any], str, Any, int]]:
        """Each parameter or module of a part: its owning dictionary, name, itself, and a tensor's address."""
        owner = vars(self.parts[part])[kind]
        return [
            (owner, key, found, found.data_ptr() if isinstance(found, Tensor) else 0) for key, found in owner.items()
        ]

    def _has_hooks(self) -> bool:
        return any(vars(part)[hooks] for part in self.parts.values() for hooks in HOOKS)


# CUDA graphs


class CapturedCall:
    """Makes a call at first as it is, captures it the second time, and then replays that.

    The call takes nothing and returns nothing: what it reads and changes are tensors that keep their places, and it
    asks the device nothing. Elsewhere than on a GPU it is made as it is every time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_warm = False  # what is made at a first call, such as cuBLAS's workspaces, can't be captured
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, call: Callable[[], None]) -> None:
        """Make the call."""
        if self.device.type != "cuda" or not self.is_warm:
            call()
            self.is_warm = True
            return
        if self.graph is None:
            with torch.cuda.device(self.device):
                self.graph = capture(call, find_pool(self.device, torch.cuda.current_stream().cuda_stream))
        self.graph.replay()


def capture(call: Callable[[], None], keeper: torch.cuda.CUDAGraph | None = None) -> torch.cuda.CUDAGraph:
    """The graph of a call, which is not made; `keeper` is one whose pool of memory it shares.

    `torch.cuda.graph` also waits for the device and frees all cached memory, which takes longer than some tokens.
    """
    graph, stream = torch.cuda.CUDAGraph(), find_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    collects = gc.isenabled()
    gc.disable()  # an old graph must not be destroyed meanwhile
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(*([] if keeper is None else [keeper.pool()]), capture_error_mode="thread_local")
            try:
                call()
            finally:
                graph.capture_end()
    finally:
        if collects:
            gc.enable()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


@functools.cache
def find_stream(device: int) -> torch.cuda.Stream:
    """The stream of all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


@functools.cache
def find_pool(device: torch.device, stream: int) -> torch.cuda.CUDAGraph:
    """A graph whose pool all graphs replayed on a stream share; their calls leave nothing in it.

    A pool of its own for each graph would stay reserved when the graph is gone.
    """
    number = torch.zeros(1, device=device)

    def fill() -> None:
        number.zero_()

    return capture(fill)
