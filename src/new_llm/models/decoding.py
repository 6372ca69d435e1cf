"""Fast decoding and evaluation: matrix products for few rows, weights cast once, and CUDA graphs.

A decoding step takes as long as reading the weights. On a CPU with a C compiler, C kernels read them in place, a whole
Pythia layer per call; without a compiler, oneDNN reads a copy in its own layout. On a GPU, kernel launches dominate a
step; once captured in a CUDA graph, all kernels of a step take a single launch.
"""

import functools
import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from new_llm.models.layers import MLP, Block, InfiniLayer, PythiaLayer, Step
from new_llm.models.layers.compressive import EPSILON
from new_llm.models.layers.infini import InfiniAttention
from new_llm.models.layers.pythia import KeyValueCache, SoftmaxAttention, compute_rotary_angles
from new_llm.models.ops import kernels
from new_llm.models.ops.kernels import native
from new_llm.models.ops.kernels.native import (
    MAX_ROWS,
    MAX_STEP_ROWS,
    LinearRows,
    PythiaStep,
    can_run_compiled,
    is_plain_call,
)
from new_llm.models.ops.local_attention import is_narrow
from new_llm.models.state import MemoryState

MAX_PACKED_ROWS = 8
"""Maximum number of rows for which packed weights are used; with more, the usual product is as fast."""
PACKED_DTYPES = (torch.float32, torch.bfloat16)
LINEARS = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
NORMS = ("input_layernorm", "post_attention_layernorm")
ATTENTIONS: dict[type[nn.Module], type[nn.Module]] = {PythiaLayer: SoftmaxAttention, InfiniLayer: InfiniAttention}

Forward = Callable[[Tensor], Tensor]

MAX_TRITON_ROWS = 16
TRITON_HEAD_SIZES = (16, 32, 64, 128)
"""The numbers of rows and the head sizes that the Triton kernels support."""


class DecodingWeights:
    """Replaces a model's products and steps by faster ones while it generates.

    What is replaced depends on the model's modules and hooks at construction.

    Args:
        model: the model.
        num_rows: number of rows; with many, the usual products are faster and stay.
        packs: whether oneDNN may copy weights for which there are no C kernels, which takes as long as a few steps.
    """

    def __init__(self, model: nn.Module, *, num_rows: int, packs: bool) -> None:
        linears = [part for part in model.modules() if type(part) is nn.Linear and "forward" not in vars(part)]
        forwards = [(linear, choose_forward(linear, num_rows, packs)) for linear in linears]
        self.replaced: list[tuple[nn.Module, str, Any]] = [
            *((linear, "forward", forward) for linear, forward in forwards if forward is not None),
            *((layer, "step", step(cast(Block, layer))) for layer in model.modules() if (step := choose_step(layer))),
        ]

    def in_use(self) -> AbstractContextManager[None]:
        """Use the replacements inside the block. Blocks of one model must not overlap."""
        return replace_methods(self.replaced)


@contextmanager
def replace_methods(replacements: list[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Give modules other methods inside the block: the module, the method's name, and what is called instead."""
    try:
        for module, name, replacement in replacements:
            vars(module)[name] = replacement
        yield
    finally:
        for module, name, _ in replacements:
            vars(module).pop(name, None)


def choose_forward(linear: nn.Linear, num_rows: int, packs: bool) -> Forward | None:
    """A faster `forward` for a linear layer with few rows: a C kernel, or with `packs` oneDNN; None: there is none.

    With gradients, under autocast and for more rows, it falls back to the usual product.
    """
    dtype = linear.weight.dtype
    if num_rows <= MAX_ROWS.get(dtype, 0) and native.find_kernels(*linear.parameters()) is not None:
        multiply, can_run = LinearRows(linear), can_run_compiled
    elif packs and can_pack(linear.weight):
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        pointwise = torch.ops.mkldnn._linear_pointwise.default

        def multiply(x: Tensor) -> Tensor:
            return pointwise(x, packed, linear.bias, "none", [], "")

        def can_run(x: Tensor) -> bool:
            return is_plain_call(x, MAX_PACKED_ROWS)

    else:
        return None

    def forward(x: Tensor) -> Tensor:
        if x.dtype == dtype and can_run(x):
            return multiply(x)
        return F.linear(x, linear.weight, linear.bias)

    cast(Any, forward).multiplies_weight = True  # see is_plain_linear
    return forward


def can_pack(weight: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether oneDNN can pack this weight, cast to `dtype` (None: as it is), on this machine."""
    if weight.device.type != "cpu" or weight.dtype not in PACKED_DTYPES or weight.is_inference():
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return (dtype or weight.dtype) == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def cast_weights_once(model: Any) -> AbstractContextManager[None]:
    """Cast weights once per block, not at every product, under bfloat16 autocast on a CPU without gradients.

    Linear layers then also skip a copy of their bias. Results are the same to the last bit. The weights must not change
    inside the block. Compiled models are left as they are, since they would be compiled again.
    """
    modules = list(model.modules())
    if not is_narrow("cpu") or any(part._compiled_call_impl is not None for part in modules):
        modules = []
    linears = [part for part in modules if type(part) is nn.Linear and "forward" not in vars(part)]
    # weights that are sharded are of another type
    is_own = [type(part.weight) is nn.Parameter and can_pack(part.weight, torch.bfloat16) for part in linears]
    return replace_methods([(one, "forward", CastLinear(one)) for one in itertools.compress(linears, is_own)])


class CastLinear:
    """The `forward` of a linear layer inside `cast_weights_once`; casts the weights at the first call."""

    multiplies_weight = True  # see is_plain_linear

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self.cast: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        weight, bias = self.linear.weight, self.linear.bias
        if torch.is_grad_enabled() or not torch.is_autocast_enabled("cpu") or not x.numel():
            return F.linear(x, weight, bias)
        if self.cast is None:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(torch.bfloat16))
            self.cast = packed, None if bias is None else bias.to(torch.bfloat16)
        return torch.ops.mkldnn._linear_pointwise.default(x.to(torch.bfloat16), *self.cast, "none", [], "")


def choose_step(layer: nn.Module) -> type["FusedPythiaStep | TritonStep"] | None:
    """The class that replaces a layer's `step` by a faster one; None: there is none.

    The layer must be a `PythiaLayer` or `InfiniLayer` whose parts are neither wrapped nor hooked, with all weights
    contiguous and of one dtype.
    """
    if type(layer) not in ATTENTIONS or "step" in vars(layer):
        return None
    kinds = {
        "attention": ATTENTIONS[type(layer)],
        "mlp": MLP,
        **dict.fromkeys(LINEARS, nn.Linear),
        **dict.fromkeys(NORMS, nn.LayerNorm),
    }
    parts = {name: layer.get_submodule(name) for name in kinds}
    given = [parameter for part in (*LINEARS, *NORMS) for parameter in parts[part]._parameters.values()]
    weights, attention = [tensor for tensor in given if tensor is not None], cast(Any, parts["attention"])
    if (
        any(type(part) is not kinds[name] for name, part in parts.items())
        or any(part._forward_hooks or part._forward_pre_hooks for part in (layer, *parts.values()))
        or len(weights) < len(given)
        or len({tensor.dtype for tensor in weights}) > 1
        or not all(tensor.is_contiguous() for tensor in weights)
    ):
        return None
    is_pythia, fits_triton = type(layer) is PythiaLayer, attention.head_size in TRITON_HEAD_SIZES
    if kernels.uses_triton(weights[0], kernels.TRITON_DTYPES) and fits_triton and (is_pythia or attention.is_plain):
        return TritonStep
    return FusedPythiaStep if is_pythia and native.find_kernels(*weights) is not None else None


class TritonStep:
    """Replaces `layer.step` on a GPU: computes one token in few rows with three launches.

    It handles steps from `MemoryStream.read_token`, which change tensors in place; any other step is left to the layer.
    It supports Pythia layers, and Infini layers for which `CompressiveAttention.is_plain`, with a head size in
    `TRITON_HEAD_SIZES`. Sums are float32 throughout. Weights are read in place.
    """

    def __init__(self, layer: Block) -> None:
        self.layer = layer
        self.kept: dict[tuple[int, int], tuple[tuple[Tensor, Tensor], Tensor]] = {}

    def __call__(self, hidden: Tensor, opened: Any, memory: MemoryState | None, step: Step) -> tuple[Tensor, Any]:
        """See `Layer.step`."""
        layer, attention = self.layer, cast(Any, self.layer.attention)
        is_in_place = step.start is None and step.valid is None and hidden.shape[1] == 1 and hidden.is_contiguous()
        is_narrow = torch.is_autocast_enabled(hidden.device.type) or hidden.dtype != attention.dense.weight.dtype
        # With an empty memory, `products` and `writes` may be one tensor, which the kernel would update twice.
        is_first = isinstance(attention, InfiniAttention) and memory is None
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
                key = "all", settings, attention.num_heads  # layers with equal settings run in turn and share both
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
    """Replaces a Pythia layer's `step` on a CPU: computes one token in few rows with a C kernel.

    Any other step is left to the layer. Sums are float32 throughout, even where the layer's own step rounds to 16 bits
    in between. Weights are read in place, so changes to them take effect.
    """

    def __init__(self, layer: Block) -> None:
        self.layer, self.attention = layer, cast(SoftmaxAttention, layer.attention)
        norms, linears = ([cast(Any, layer.get_submodule(name)) for name in names] for names in (NORMS, LINEARS))
        self.call = PythiaStep(norms, linears, self.attention.num_heads, self.attention.rotary_dim)

    def __call__(
        self, hidden: Tensor, opened: KeyValueCache | None, memory: None, step: Step
    ) -> tuple[Tensor, KeyValueCache]:
        """See `Layer.step`."""
        is_short = hidden.shape[1] == 1 and len(hidden) <= MAX_STEP_ROWS and hidden.is_contiguous()
        if not is_short or hidden.dtype != self.call.dtype or not can_run_compiled(hidden):
            return Block.step(self.layer, hidden, opened, memory, step)
        cache = self.attention.grow_cache(opened, hidden, step)
        settings = (self.attention.rotary_dim, self.attention.rotary_emb_base)
        if ("fused", settings) not in step.shared:
            angles = compute_rotary_angles(step.positions[:, 0], *settings, torch.float32)
            step.shared["fused", settings] = tuple(part.contiguous() for part in angles)
        valid = None if step.valid is None else step.valid.contiguous()
        angles = step.shared["fused", settings]
        return self.call.run(hidden, cache.keys, cache.values, step.positions, valid, angles, step.longest), cache


# CUDA graphs


class CapturedCall:
    """Runs a function on a GPU: directly the first time, then captured as a CUDA graph and replayed.

    The function takes and returns nothing. It must read and change tensors that stay at the same address, and must not
    synchronise. On other devices it is always run directly.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_warm = False  # what a first call allocates, such as cuBLAS's workspaces, can't be captured
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, call: Callable[[], None]) -> None:
        """Run `call`, or replay its graph."""
        if self.device.type != "cuda" or not self.is_warm:
            call()
            self.is_warm = True
            return
        if self.graph is None:
            with torch.cuda.device(self.device):
                self.graph = capture(call, find_pool(self.device, torch.cuda.current_stream().cuda_stream))
        self.graph.replay()


def capture(call: Callable[[], None], keeper: torch.cuda.CUDAGraph | None = None) -> torch.cuda.CUDAGraph:
    """Capture a call as a graph, without running it. The graph shares the memory pool of `keeper`, another graph.

    Unlike `torch.cuda.graph` this does not synchronise and free all cached memory, which would take as long as several
    tokens.
    """
    graph, stream = torch.cuda.CUDAGraph(), find_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    collects = gc.isenabled()
    gc.disable()  # an old graph must not be destroyed during capture
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
    """The stream on which all captures run: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


@functools.cache
def find_pool(device: torch.device, stream: int) -> torch.cuda.CUDAGraph:
    """A graph whose memory pool is shared by all graphs that are replayed on this stream.

    They can share it because their calls leave nothing in it. A separate pool per graph would stay reserved after the
    graph is destroyed.
    """
    number = torch.zeros(1, device=device)

    def fill() -> None:
        number.zero_()

    return capture(fill)
