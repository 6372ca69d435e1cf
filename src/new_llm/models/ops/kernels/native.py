"""The C kernels for the CPU, and the only functions that call them; these check all arguments.

The kernels are optional. Without a compiler, or with NEW_LLM_KERNELS=0, every op uses PyTorch, and this module's logger
gives the reason at debug level. The kernels run on the threads of torch's own OpenMP library.
"""

import ctypes
import functools
import logging
import subprocess
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from new_llm.models.ops.kernels import are_enabled, check_tensor
from new_llm.models.ops.kernels.build import load_library

SUFFIXES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
"""The dtypes that the kernels support, with the suffixes of their function names."""
MAX_ROWS = {torch.bfloat16: 4, torch.float32: 8}
"""Number of rows up to which `LinearRows` is faster than torch, by the weight's dtype."""
MAX_STEP_ROWS = 8
"""Maximum number of rows in a layer's step, limited by the arrays in decoding.c."""
MAX_CHUNK = 64
"""Maximum number of tokens in a chunk of the delta rule, limited by the arrays in delta.c."""
MAX_WIDTH, MAX_CONVOLUTION = 128, 8
"""Maximum widths of a gated delta layer's heads and convolution, limited by the arrays in gated_delta*.c."""
MAX_TOKENS, LANES = 256, 16
"""Maximum length of a segment in `attend_heads`, and the number of which its heads' width must be a multiple."""
RULE_CHUNK = 16
"""Tokens in a chunk of the gated delta rule, CHUNK in gated_delta.c."""

_POINTER, _SIZE, _INT, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_log = logging.getLogger(__name__)
_is_loaded = False  # read under torch.compile, which can't trace loading

# Loading


def has_kernels() -> bool:
    """Whether the kernels are available; under `torch.compile`: whether they have already been loaded."""
    if torch.compiler.is_compiling():
        return _is_loaded
    return load_kernels() is not None


def find_kernels(*tensors: Tensor) -> ctypes.CDLL | None:
    """The kernels, if they support these tensors: on the CPU, contiguous and of a supported dtype; else None."""
    if torch.compiler.is_compiling():  # pointers can't be traced
        return None
    if all(t.device.type == "cpu" and t.dtype in SUFFIXES and t.is_contiguous() for t in tensors):
        return load_kernels()
    return None


@functools.cache
def load_kernels() -> ctypes.CDLL | None:
    """Load the kernels, compiling them if necessary; None if they are off or can't be compiled or loaded."""
    global _is_loaded
    if not are_enabled():
        return None
    try:
        library = _declare(load_library())
        _is_loaded = True
        return library
    except (OSError, subprocess.SubprocessError, AttributeError, ValueError) as error:
        _log.debug("no compiled kernels, PyTorch is used instead: %s", error)
        return None


_TAKEN_BY_DTYPE = {
    "score_rows": "pnnpppii",
    "step_pythia": "pp",
    "linear_rows": "ppnpi",
    "solve_chunks": "pppnni",
    "solve_chunks_backward": "pppppppnnni",
    "move_memories": "ppppppnnni",
    "retreat_memories": "pppppppppnnni",
}
"""Argument types of the functions that exist once per dtype: p pointer, n 64-bit size, i int, x float."""


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the functions' argument and return types to ctypes; only `count_step_scratch` returns a value."""
    kinds = {"p": _POINTER, "n": _SIZE, "i": _INT, "x": _REAL}
    takes = {f"{name}_{suffix}": one for name, one in _TAKEN_BY_DTYPE.items() for suffix in SUFFIXES.values()}
    for one, other in product(SUFFIXES.values(), repeat=2):
        takes |= {f"scale_rows_{one}_{other}": "ppppnnxi", f"scale_rows_backward_{one}_{other}": "ppppppnni"}
    takes |= {"causal_softmax": "pppnnnnxi", "causal_softmax_backward": "pppnnnnxi", "split_heads": "ppppppnnnnnii"}
    takes |= {"attend_heads": "pppppnnnnnxi", "normalize_rows": "ppppppnnxi", "add_parts": "ppppni"}
    takes |= {"gated_delta": "p" * 10 + "nnnnni", "gated_delta_backward": "p" * 14 + "nnnnni"}
    takes |= {"convolve_heads": "ppppppnnnnnxxii", "convolve_heads_backward": "pppppppppnnnnnxxii"}
    takes |= {"gate_heads": "ppppnnnnxii", "gate_heads_backward": "pppppppnnnnxii"}
    takes["count_step_scratch"] = "nnnnni"
    for name, letters in takes.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [kinds[letter] for letter in letters], None
    library.count_step_scratch.restype = _SIZE
    return library


def _call(kernels: ctypes.CDLL, name: str, dtype: torch.dtype | None, *arguments: Any) -> None:
    """Call a kernel (with a dtype: the variant for that dtype), passing tensors as pointers.

    The number of threads is added as the last argument, which every kernel takes.
    """
    if dtype is not None and dtype not in SUFFIXES:
        raise ValueError(f"{name}: no kernel for {dtype}; supported: {', '.join(map(str, SUFFIXES))}")
    function = getattr(kernels, name if dtype is None else f"{name}_{SUFFIXES[dtype]}")
    function(*(_point(x) if isinstance(x, Tensor) else x for x in arguments), torch.get_num_threads())


def _point(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised CPU tensor for C to write to, whatever torch's default dtype and device are."""
    return torch.empty(*shape, dtype=dtype, device="cpu")


# Scores of a head and of attention


def score_rows(
    kernels: ctypes.CDLL, logits: Tensor, targets: Tensor, weights: Tensor | None, *, write_gradients: bool
) -> Tensor:
    """Losses [n] of rows of logits [n, Z]; see `head_loss.score_logits`."""
    num_rows, num_words = logits.shape
    check_tensor("logits", logits, (num_rows, num_words), logits.dtype)
    targets = targets.contiguous()
    check_tensor("targets", targets, (num_rows,), torch.int64)
    if weights is not None:
        weights = weights.to(torch.float32).contiguous()
        check_tensor("weights", weights, (num_rows,), torch.float32)
    losses, sizes = _empty(num_rows), (num_rows, num_words)
    _call(kernels, "score_rows", logits.dtype, logits, *sizes, targets, weights, losses, int(write_gradients))
    return losses


def causal_softmax(kernels: ctypes.CDLL, scores: Tensor, logsumexp: Tensor, *, first: int, scale: float) -> None:
    """Replace bfloat16 scores [n, rows, columns] by softmax(scale · scores).

    Row r sees only the first `first + r + 1` columns. The logsumexp of the scaled scores is written to `logsumexp`,
    [n, rows] float32.
    """
    _check_scores(scores, logsumexp, first)
    scratch = _empty(torch.get_num_threads(), scores.shape[2])
    _call(kernels, "causal_softmax", None, scores, logsumexp, scratch, *scores.shape, first, scale)


def causal_softmax_backward(
    kernels: ctypes.CDLL, scores: Tensor, gradients: Tensor, logsumexp: Tensor, *, first: int, scale: float
) -> None:
    """Backward of `causal_softmax`, in place: scores become probabilities, and probabilities' gradients the scores'."""
    _check_scores(scores, logsumexp, first)
    check_tensor("gradients", gradients, scores.shape, torch.bfloat16)
    _call(kernels, "causal_softmax_backward", None, scores, gradients, logsumexp, *scores.shape, first, scale)


def _check_scores(scores: Tensor, logsumexp: Tensor, first: int) -> None:
    number, num_rows, num_columns = scores.shape
    check_tensor("scores", scores, (number, num_rows, num_columns), torch.bfloat16)
    check_tensor("logsumexp", logsumexp, (number, num_rows), torch.float32)
    if not 0 <= first <= num_columns - num_rows:
        raise ValueError(f"first: row {first} and the next {num_rows - 1} do not fit within {num_columns} columns")


def split_heads(kernels: ctypes.CDLL, mixed: Tensor, num_heads: int, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, [B, H, S, K], with q and k rotated; arguments as in `local_attention.split_heads`."""
    batch, length, width = mixed.shape[0], mixed.shape[1], mixed.shape[2] // (3 * num_heads)
    heads = _empty(3, batch, num_heads, length, width, dtype=mixed.dtype)
    _move_heads(kernels, mixed, heads.unbind(), angles, back=False)
    return heads[0], heads[1], heads[2]


def can_attend(mixed: Tensor, num_heads: int) -> bool:
    """Whether `attend_heads` supports segments of this length and heads of this width; for longer ones it is slower.

    It also is where a processor's vectors are shorter than the kernel's.
    """
    width, is_wide = mixed.shape[2] // (3 * num_heads), torch.backends.cpu.get_cpu_capability() == "AVX512"
    return is_wide and width % LANES == 0 and width <= MAX_WIDTH and mixed.shape[1] <= MAX_TOKENS


def attend_heads(
    kernels: ctypes.CDLL, mixed: Tensor, num_heads: int, angles: Tensor, *, keeps: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention [B, S, H K] after `split_heads`, and with `keeps` the logsumexp of the scaled scores, [B, H, S]."""
    batch, length, width = mixed.shape[0], mixed.shape[1], mixed.shape[2] // (3 * num_heads)
    _check_mixed(mixed, width, num_heads, angles)
    if not can_attend(mixed, num_heads):
        raise ValueError(f"{length} tokens and heads of width {width}: no kernel")
    half = angles.shape[-1] // 2
    turned = F.pad(angles[..., :half].transpose(1, 2), (0, -length % LANES)).contiguous()
    out = _empty(batch, length, num_heads * width, dtype=mixed.dtype)
    logsumexp = _empty(batch, num_heads, length) if keeps else None
    sizes = (batch, length, num_heads, width, half)
    _call(kernels, "attend_heads", None, mixed, *turned.unbind(), out, logsumexp, *sizes, width**-0.5)
    return out, logsumexp


def join_heads(kernels: ctypes.CDLL, heads: Sequence[Tensor], angles: Tensor) -> Tensor:
    """Backward of `split_heads`: the gradient of `mixed`, from those of q, k and v."""
    batch, num_heads, length, width = heads[0].shape
    mixed = _empty(batch, length, num_heads * 3 * width, dtype=heads[0].dtype)
    _move_heads(kernels, mixed, heads, angles, back=True)
    return mixed


def _move_heads(kernels: ctypes.CDLL, mixed: Tensor, heads: Sequence[Tensor], angles: Tensor, *, back: bool) -> None:
    batch, num_heads, length, width = heads[0].shape
    _check_mixed(mixed, width, num_heads, angles)
    for name, t in zip("qkv", heads, strict=True):
        check_tensor(name, t, (batch, num_heads, length, width), torch.bfloat16)
    sizes = (batch, length, num_heads, width, angles.shape[-1])
    _call(kernels, "split_heads", None, mixed, *heads, *angles.unbind(), *sizes, int(back))


def _check_mixed(mixed: Tensor, width: int, num_heads: int, angles: Tensor) -> None:
    batch, length = mixed.shape[:2]
    check_tensor("mixed", mixed, (batch, length, num_heads * 3 * width), torch.bfloat16)
    check_tensor("angles", angles, (2, length, angles.shape[-1]), torch.float32)
    if angles.shape[-1] % 2 or angles.shape[-1] > width:
        raise ValueError(f"angles: {angles.shape[-1]} rotated dimensions for heads of width {width}")


# Scaling rows to given lengths, and the delta rule


def scale_rows(
    kernels: ctypes.CDLL, x: Tensor, lengths: Tensor | None, dtype: torch.dtype, *, least: float
) -> tuple[Tensor, Tensor]:
    """l x / max(‖x‖, least) in `dtype` for rows x [..., K], and the norms [...]; lengths l [...] float32 (None: 1)."""
    check_tensor("x", x, x.shape, x.dtype)
    if lengths is not None:
        check_tensor("lengths", lengths, x.shape[:-1], torch.float32)
    y, norms = _empty(*x.shape, dtype=dtype), _empty(*x.shape[:-1])
    name, sizes = f"scale_rows_{SUFFIXES[x.dtype]}", (norms.numel(), x.shape[-1])
    _call(kernels, name, dtype, x, lengths, y, norms, *sizes, least)
    return y, norms


def scale_rows_backward(
    kernels: ctypes.CDLL, x: Tensor, lengths: Tensor | None, norms: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and of the lengths; see `scale_rows`."""
    check_tensor("x", x, x.shape, x.dtype)
    check_tensor("upstream", upstream, x.shape, upstream.dtype)
    for name, t in (("norms", norms), ("lengths", norms if lengths is None else lengths)):
        check_tensor(name, t, x.shape[:-1], torch.float32)
    for_x, for_lengths = _empty(*x.shape, dtype=x.dtype), None if lengths is None else torch.empty_like(lengths)
    name, sizes = f"scale_rows_backward_{SUFFIXES[x.dtype]}", (norms.numel(), x.shape[-1])
    _call(kernels, name, upstream.dtype, x, lengths, norms, upstream, for_x, for_lengths, *sizes)
    return for_x, for_lengths


def normalize_rows(
    kernels: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm in bfloat16 of float32 rows x [..., D], and the means and 1 / standard deviations, [..., 1]."""
    for name, t, shape in (("x", x, x.shape), ("weight", weight, x.shape[-1:]), ("bias", bias, x.shape[-1:])):
        check_tensor(name, t, shape, torch.float32)
    y, means, factors = _empty(*x.shape, dtype=torch.bfloat16), _empty(*x.shape[:-1], 1), _empty(*x.shape[:-1], 1)
    sizes = (means.numel(), x.shape[-1])
    _call(kernels, "normalize_rows", None, x, weight, bias, y, means, factors, *sizes, eps)
    return y, means, factors


def add_parts(kernels: ctypes.CDLL, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """x + (a + b) in float32, for x float32 and a and b bfloat16."""
    for name, t, dtype in (("a", a, torch.bfloat16), ("b", b, torch.bfloat16), ("x", x, torch.float32)):
        check_tensor(name, t, x.shape, dtype)
    total = torch.empty_like(x)
    _call(kernels, "add_parts", None, a, b, x, total, x.numel())
    return total


def solve_chunks(kernels: ctypes.CDLL, products: Tensor, strengths: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(I + tril(diag(β) S, −1))⁻¹ diag(β) in `dtype`, for S [..., C, C] and β [..., C] float32 (None: 1)."""
    size = _check_chunks(products, strengths)
    solved = _empty(*products.shape, dtype=dtype)
    _call(kernels, "solve_chunks", dtype, products, strengths, solved, products.shape[:-2].numel(), size)
    return solved


def solve_chunks_backward(
    kernels: ctypes.CDLL, below: Tensor, products: Tensor, strengths: Tensor, for_writes: Tensor, writes: Tensor
) -> tuple[Tensor, Tensor]:
    """Backward through W = Kᵀ N diag(β): Q + Qᵀ for Q below the diagonal, and β'; see `delta_rule`.

    Args:
        below: Q = −diag(β) A', [..., C, C]; only entries below the diagonal are read.
        products: S, [..., C, C] float32.
        strengths: β, [..., C] float32, not 0.
        for_writes: W', [..., K, C].
        writes: W, [..., K, C].
    """
    size = _check_chunks(products, strengths)
    shape = (*products.shape[:-2], writes.shape[-2], size)
    for name, t, expected in (("Q", below, products.shape), ("W'", for_writes, shape), ("W", writes, shape)):
        check_tensor(name, t, expected, below.dtype)
    symmetric, for_strengths = _empty(*products.shape, dtype=below.dtype), _empty(*strengths.shape)
    tensors = (below, products, strengths, for_writes, writes, symmetric, for_strengths)
    sizes = (products.shape[:-2].numel(), size, writes.shape[-2])
    _call(kernels, "solve_chunks_backward", below.dtype, *tensors, *sizes)
    return symmetric, for_strengths


def move_memories(
    kernels: ctypes.CDLL, memory: Tensor, rest: Tensor, retained: Tensor | None, product: Tensor | None, narrow: Tensor
) -> Tensor | None:
    """Write M₀ + w (M − M₀) + P to `narrow`; also returned in float32 if P is given and narrower than float32.

    Args:
        memory: M, [B, H, K, V] float32.
        rest: M₀, [H, K, V] float32.
        retained: w, [B, H] float32; None: 1.
        product: P, [B, H, K, V] in the dtype of `narrow`; None: 0.
        narrow: the result, [B, H, K, V].
    """
    for name, t in (("P", narrow if product is None else product), ("narrow", narrow)):
        check_tensor(name, t, memory.shape, narrow.dtype)
    sizes = _check_memories(memory, rest, retained)
    wide = None if product is None or narrow.dtype == memory.dtype else torch.empty_like(memory)
    _call(kernels, "move_memories", narrow.dtype, memory, rest, retained, product, wide, narrow, *sizes)
    return wide


def retreat_memories(
    kernels: ctypes.CDLL,
    g: Tensor,
    product: Tensor | None,
    added: Tensor | None,
    memory: Tensor,
    rest: Tensor,
    retained: Tensor | None,
    for_retained: Tensor | None,
    for_rest: Tensor,
    narrow: Tensor,
) -> None:
    """Backward of `move_memories`: G ← w (G − P) + R, in place and in `narrow`.

    Also w' = Σ (M − M₀) (G − P), and M₀' += (1 − w) (G − P).

    Args:
        g: G, [B, H, K, V] float32.
        product: P, [B, H, K, V] in the dtype of `narrow`; None: 0.
        added: R, like P; None: 0.
        memory: M, like P.
        rest: M₀, [H, K, V] float32.
        retained: w, [B, H] float32; None: 1, and M₀' does not change.
        for_retained: w', [B, H] float32, written here; None if w is None.
        for_rest: M₀' of each row, [B, H, K, V] float32, added to here.
        narrow: G in another dtype, written here; `g` itself if that is float32.
    """
    for name, t in (("P", product), ("R", added), ("M", memory), ("narrow", narrow)):
        check_tensor(name, narrow if t is None else t, g.shape, narrow.dtype)
    check_tensor("for_rest", for_rest, g.shape, torch.float32)
    if (retained is None) != (for_retained is None):
        raise ValueError("w and its gradient must be given together")
    if for_retained is not None:
        check_tensor("for_retained", for_retained, g.shape[:2], torch.float32)
    sizes, rounded = _check_memories(g, rest, retained), None if narrow is g else narrow
    tensors = (g, product, added, memory, rest, retained, for_retained, for_rest, rounded)
    _call(kernels, "retreat_memories", narrow.dtype, *tensors, *sizes)


def _check_memories(memory: Tensor, rest: Tensor, retained: Tensor | None) -> tuple[int, int, int]:
    batch, heads, width, value_width = memory.shape
    check_tensor("M", memory, memory.shape, torch.float32)
    check_tensor("rest", rest, memory.shape[1:], torch.float32)
    if retained is not None:
        check_tensor("w", retained, (batch, heads), torch.float32)
    return batch, heads, width * value_width


def _check_chunks(products: Tensor, strengths: Tensor | None) -> int:
    size = products.shape[-1]
    check_tensor("products", products, (*products.shape[:-1], size), torch.float32)
    if strengths is not None:
        check_tensor("strengths", strengths, products.shape[:-1], torch.float32)
    if size > MAX_CHUNK:
        raise ValueError(f"chunks of {size} tokens; the kernels support at most {MAX_CHUNK}")
    return size


# The gated delta rule, and what its layer computes between products


def gated_delta(
    kernels: ctypes.CDLL, parts: Sequence[Tensor], memory: Tensor, num_written: int, *, keeps: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Reads [G, T, V], M after `num_written` chunks, and with `keeps` W and M before each chunk, for the backward.

    Args:
        parts: q, k [G, T, K], v [G, T, V], β and log α [G, T], all float32.
        memory: M before the first token, [G, K, V] float32.
        num_written: number of chunks that the returned memory contains.
    """
    sizes = _check_rule(parts[0], parts[1], parts[3], parts[4], memory)
    groups, tokens, _, values = sizes
    check_tensor("v", parts[2], (groups, tokens, values), torch.float32)
    reads, kept = _empty(groups, tokens, values), torch.empty_like(memory)
    errors = states = None
    if keeps:
        errors, states = torch.empty_like(reads), _empty(-(-tokens // RULE_CHUNK), *memory.shape)
    _call(kernels, "gated_delta", None, *parts, memory, reads, errors, states, kept, *sizes, num_written)
    return reads, kept, errors, states


def gated_delta_backward(
    kernels: ctypes.CDLL,
    parts: Sequence[Tensor],
    errors: Tensor,
    states: Tensor,
    for_reads: Tensor,
    for_kept: Tensor,
    num_written: int,
) -> list[Tensor]:
    """The gradients of q, k, v, β, log α and M; `parts` are q, k, β and log α, the others as `gated_delta` has them."""
    q, k, strengths, log_decay = parts
    sizes = _check_rule(q, k, strengths, log_decay, for_kept)
    groups, tokens, width, values = sizes
    check_tensor("states", states, (-(-tokens // RULE_CHUNK), groups, width, values), torch.float32)
    for name, t in (("W", errors), ("for_reads", for_reads)):
        check_tensor(name, t, (groups, tokens, values), torch.float32)
    found = [torch.empty_like(t) for t in (q, k, errors, strengths, log_decay, for_kept)]
    given = (*parts, errors, states, for_reads, for_kept)
    _call(kernels, "gated_delta_backward", None, *given, *found, *sizes, num_written)
    return found


def _check_rule(
    q: Tensor, k: Tensor, strengths: Tensor, log_decay: Tensor, memory: Tensor
) -> tuple[int, int, int, int]:
    groups, tokens, width = q.shape
    for name, t in (("q", q), ("k", k)):
        check_tensor(name, t, (groups, tokens, width), torch.float32)
    for name, t in (("β", strengths), ("log α", log_decay)):
        check_tensor(name, t, (groups, tokens), torch.float32)
    check_tensor("M", memory, (groups, width, memory.shape[2]), torch.float32)
    if max(width, memory.shape[2]) > MAX_WIDTH:
        raise ValueError(f"heads of width {max(width, memory.shape[2])}; the kernels support at most {MAX_WIDTH}")
    return groups, tokens, width, memory.shape[2]


def convolve_heads(
    kernels: ctypes.CDLL, tensors: Sequence[Tensor], num_heads: int, scale: float, least: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, H, T, K] float32, from x, `before` and the weight; see `ops.gated_delta.convolve_heads`."""
    x, before, weight = tensors
    sizes = _check_heads(x, before, weight, num_heads)
    batch, tokens, heads, width, _ = sizes
    q, k, v = (_empty(batch, heads, tokens, width) for _ in range(3))
    narrow = int(x.dtype == torch.bfloat16)
    _call(kernels, "convolve_heads", None, x, before, weight, q, k, v, *sizes, scale, least, narrow)
    return q, k, v


def convolve_heads_backward(
    kernels: ctypes.CDLL, tensors: Sequence[Tensor], upstreams: Sequence[Tensor], scale: float, least: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, `before` and the weight, from those of q, k and v."""
    x, before, weight = tensors
    batch, num_heads, tokens, width = upstreams[0].shape
    sizes = _check_heads(x, before, weight, num_heads)
    for name, t in zip("qkv", upstreams, strict=True):
        check_tensor(name, t, (batch, num_heads, tokens, width), torch.float32)
    for_weight = _empty(batch, *weight.shape)
    found = torch.empty_like(x), torch.empty_like(before), for_weight
    narrow = int(x.dtype == torch.bfloat16)
    _call(kernels, "convolve_heads_backward", None, x, before, weight, *upstreams, *found, *sizes, scale, least, narrow)
    return found[0], found[1], for_weight.sum(0)


def _check_heads(x: Tensor, before: Tensor, weight: Tensor, num_heads: int) -> tuple[int, int, int, int, int]:
    batch, tokens, channels = x.shape
    width, size = channels // (3 * num_heads), weight.shape[1]
    check_tensor("x", x, (batch, tokens, 3 * num_heads * width), x.dtype)
    check_tensor("before", before, (batch, size - 1, channels), torch.float32)
    check_tensor("weight", weight, (channels, size), torch.float32)
    if x.dtype not in SUFFIXES or width > MAX_WIDTH or size > MAX_CONVOLUTION:
        raise ValueError(f"{x.dtype}, heads of width {width}, a convolution of {size}: no kernel")
    return batch, tokens, num_heads, width, size


def gate_heads(kernels: ctypes.CDLL, tensors: Sequence[Tensor], eps: float) -> Tensor:
    """RMSNorm(reads) SiLU(gate), [B, T, H V], from reads, weight and gate; see `ops.gated_delta.gate_heads`."""
    reads, weight, gate = tensors
    out, sizes = torch.empty_like(gate), _check_gate(reads, weight, gate)
    _call(kernels, "gate_heads", None, reads, weight, gate, out, *sizes, eps, int(gate.dtype == torch.bfloat16))
    return out


def gate_heads_backward(
    kernels: ctypes.CDLL, tensors: Sequence[Tensor], upstream: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the reads, the weight and the gate."""
    reads, weight, gate = tensors
    sizes = _check_gate(reads, weight, gate)
    check_tensor("upstream", upstream, gate.shape, gate.dtype)
    for_reads, for_gate = torch.empty_like(reads), torch.empty_like(gate)
    for_weight = _empty(*reads.shape[:2], len(weight))
    found = for_reads, for_weight, for_gate
    narrow = int(gate.dtype == torch.bfloat16)
    _call(kernels, "gate_heads_backward", None, reads, weight, gate, upstream, *found, *sizes, eps, narrow)
    return for_reads, for_weight.sum((0, 1)), for_gate


def _check_gate(reads: Tensor, weight: Tensor, gate: Tensor) -> tuple[int, int, int, int]:
    batch, heads, tokens, width = reads.shape
    check_tensor("reads", reads, reads.shape, torch.float32)
    check_tensor("weight", weight, (width,), torch.float32)
    check_tensor("gate", gate, (batch, tokens, heads * width), gate.dtype)
    if gate.dtype not in SUFFIXES or width > MAX_WIDTH:
        raise ValueError(f"{gate.dtype}, heads of width {width}: no kernel")
    return batch, tokens, heads, width


# Decoding: products with few rows, and a Pythia layer's step


def is_plain_call(x: Tensor, num_rows: int) -> bool:
    """Whether x [..., D] has at most `num_rows` rows, on a CPU without autograd, autocast and `torch.compile`."""
    is_free = not (torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
    return is_free and x.device.type == "cpu" and x.numel() <= num_rows * x.shape[-1]


def can_run_compiled(x: Tensor) -> bool:
    """Whether `LinearRows` can multiply x [..., D] and is faster than torch, with weights of x's dtype."""
    return is_plain_call(x, MAX_ROWS.get(x.dtype, 0))


class _Linear(ctypes.Structure):
    _fields_ = [("weight", _POINTER), ("bias", _POINTER), ("inputs", _SIZE), ("outputs", _SIZE)]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", _POINTER), ("bias", _POINTER), ("eps", _REAL)]


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


def _describe_linear(name: str, linear: nn.Linear, dtype: torch.dtype, inputs: int, outputs: int) -> _Linear:
    """A linear layer as a C struct, after checking its dtype and widths."""
    check_tensor(f"{name}.weight", linear.weight, (outputs, inputs), dtype)
    if linear.bias is not None:
        check_tensor(f"{name}.bias", linear.bias, (outputs,), dtype)
    return _Linear(_point(linear.weight), _point(linear.bias), inputs, outputs)


class LinearRows:
    """A linear layer, x Wᵀ + b, in bfloat16 or float32, for few rows x [..., inputs]; sums are float32."""

    def __init__(self, linear: nn.Linear) -> None:
        kernels, self.dtype, (self.outputs, self.inputs) = load_kernels(), linear.weight.dtype, linear.weight.shape
        assert kernels is not None
        self._linear = ctypes.byref(_describe_linear("linear", linear, self.dtype, self.inputs, self.outputs))
        self._kept = [parameter.detach() for parameter in linear.parameters()]
        self._multiply = getattr(kernels, f"linear_rows_{SUFFIXES[self.dtype]}")

    def __call__(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs], in the layer's dtype."""
        leading = x.shape[:-1]
        rows, out = x.to(torch.float32).contiguous(), _empty(*leading, self.outputs, dtype=self.dtype)
        check_tensor("x", rows, (*leading, self.inputs), torch.float32)
        self._multiply(self._linear, rows.data_ptr(), leading.numel(), out.data_ptr(), torch.get_num_threads())
        return out


class PythiaStep:
    """One decoding step of a Pythia layer. Raises ValueError if the layer's sizes or dtypes do not fit together."""

    def __init__(
        self, norms: Sequence[nn.LayerNorm], linears: Sequence[nn.Linear], num_heads: int, rotary_dim: int
    ) -> None:
        width, inner, self.dtype = norms[0].weight.numel(), len(linears[2].weight), norms[0].weight.dtype
        if width % num_heads or rotary_dim % 2 or not 0 <= rotary_dim <= width // num_heads:
            raise ValueError(f"{num_heads} heads with {rotary_dim} rotary dimensions do not fit a width of {width}")
        for norm in norms:
            check_tensor("norm.weight", norm.weight, (width,), self.dtype)
            check_tensor("norm.bias", norm.bias, (width,), self.dtype)
        shapes = ((width, 3 * width), (width, width), (width, inner), (inner, width))
        names = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
        described = (
            *(_Norm(_point(norm.weight), _point(norm.bias), norm.eps) for norm in norms),
            *(
                _describe_linear(name, linear, self.dtype, *shape)
                for name, linear, shape in zip(names, linears, shapes, strict=True)
            ),
        )
        self._layer = _Layer(*described, num_heads, rotary_dim)
        self._kept = [tensor.detach() for part in (*norms, *linears) for tensor in part.parameters()]
        self._kernels, self._rotary_dim, self._sizes = load_kernels(), rotary_dim, (width, num_heads, inner)

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
        """The layer's output [B, 1, D] for one new token per row, whose key and value are written to the cache.

        Args:
            hidden: [B, 1, D], contiguous, in the layer's dtype.
            keys: [B, heads, slots, K], contiguous, in the layer's dtype.
            values: like `keys`.
            positions: [B, 1] int64, each below `longest`.
            valid: padding mask, [B, 1] bool; None: no padding.
            angles: cos and sin, [B, rotary_dim] each, float32, contiguous.
            longest: length of the longest row including its new token; at most slots.

        Raises:
            ValueError: a tensor does not fit the layer or the other tensors.
        """
        width, num_heads, _ = self._sizes
        num_rows, num_slots = hidden.shape[0], keys.shape[2]
        check_tensor("hidden", hidden, (num_rows, 1, width), self.dtype)
        for name, cached in (("keys", keys), ("values", values)):
            check_tensor(name, cached, (num_rows, num_heads, num_slots, width // num_heads), self.dtype)
        check_tensor("positions", positions, (num_rows, 1), torch.int64)
        if valid is not None:
            check_tensor("valid", valid, (num_rows, 1), torch.bool)
        for name, part in zip(("cosines", "sines"), angles, strict=True):
            check_tensor(name, part, (num_rows, self._rotary_dim), torch.float32)
        takes_token = [True] * num_rows if valid is None else valid.flatten().tolist()
        places = [place for place, takes in zip(positions.flatten().tolist(), takes_token, strict=True) if takes]
        if num_rows > MAX_STEP_ROWS or longest > num_slots or not all(0 <= place < longest for place in places):
            raise ValueError(
                f"{num_rows} rows at positions {places}, the longest of {longest} tokens, exceed "
                f"{MAX_STEP_ROWS} rows with {num_slots} slots"
            )
        kernels, threads = self._kernels, torch.get_num_threads()
        assert kernels is not None
        out = _empty(*hidden.shape, dtype=self.dtype)
        scratch = _empty(kernels.count_step_scratch(*self._sizes, num_rows, longest, threads))
        tensors = (hidden, out, keys, values, positions, valid, *angles, scratch)
        step = _Step(*map(_point, tensors), num_rows, num_slots, longest, threads)
        getattr(kernels, f"step_pythia_{SUFFIXES[self.dtype]}")(ctypes.byref(self._layer), ctypes.byref(step))
        return out
