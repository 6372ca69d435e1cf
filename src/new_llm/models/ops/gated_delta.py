"""The gated delta rule, token by token: M_t = α_t (M_{t−1} − k_tᵀ β_t k_t M_{t−1}) + k_tᵀ β_t v_t, read as q_t M_t.

Source: Gated DeltaNet, arXiv:2412.06464, eq. 10 and section 3.3; the chunked form is arXiv:2406.06484's, section 3.

Within a chunk of C tokens the rule is a unit lower triangular system. Let g_t = Σ_{i≤t} log α_i from the chunk's start,
A_ij = β_i e^{g_i − g_j} (k_i · k_j) for j < i, T = (I + A)⁻¹ diag(β), S_tj = e^{g_t − g_j} (q_t · k_j) for j ≤ t, and
L = e^g K. The chunk writes U = T (V − L M), so that

    reads = S T V + (e^g Q − S T L) M,    M ← e^{g_C} M + Rᵀ (V − L M),    R = Tᵀ e^{g_C − g} K.

Everything but M is computed for all chunks at once. Only two products per chunk are sequential, in `chain_chunks`:
M_{i+1} = d_i M_i + R_iᵀ E_i with E_i = V_i − L_i M_i.

On a CPU in float32, one C kernel does all of this chunk by chunk, with M in the cache. Two more compute what the
layer needs around it: `convolve_heads` and `gate_heads`.

Legend: B rows, T tokens, H heads, K and V widths of keys and values, n chunks of C tokens.
"""

import re
from ctypes import CDLL
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from new_llm.models.ops import kernels
from new_llm.models.ops.kernels import native
from new_llm.models.ops.local_attention import LEAST_NORM
from new_llm.models.ops.memory import sum_prefixes

CHUNK_LENGTH = 32
"""C on a CPU without kernels, found by measurement: longer chunks mean fewer steps, but more work inside a chunk."""
GPU_CHUNK_LENGTH = 64
"""C on a GPU, where the number of sequential steps dominates."""
FLA_KEY_SIZE = 256
"""Largest K that flash-linear-attention's kernel supports."""
HAS_FLA = find_spec("fla") is not None and find_spec("triton") is not None


def gated_delta_rule_naive(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` by its equation, token by token."""
    reads = []
    for t in range(q.shape[2]):
        memory = log_decay[:, :, t, None, None].exp() * memory
        held = (k[:, :, t].unsqueeze(-2) @ memory).squeeze(-2)
        written = beta[:, :, t, None] * (v[:, :, t] - held)
        memory = memory + k[:, :, t].unsqueeze(-1) * written.unsqueeze(-2)
        reads.append((q[:, :, t].unsqueeze(-2) @ memory).squeeze(-2))
    return torch.stack(reads, 2), memory


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, memory: Tensor, *, num_written: int | None = None
) -> tuple[Tensor, Tensor]:
    """Read and write one memory token by token; each token reads after its own write.

    In 16 bits on a GPU this runs flash-linear-attention (fla) if `uses_fla` allows. Otherwise it runs in chunks: in C
    on a CPU if M is float32; with Triton in bfloat16 on a GPU, M in float32; anywhere else in M's precision.

    Args:
        q: queries, [B, H, T, K], already scaled.
        k: keys, [B, H, T, K], of length at most 1, which keeps the rule stable.
        v: values, [B, H, T, V].
        beta: β between 0 and 2, [B, H, T]; 0: the token is not written.
        log_decay: log α ≤ 0, [B, H, T]; 0: no decay.
        memory: M before the first token, [B, H, K, V], float32 or wider.
        num_written: number of tokens that the returned memory contains; None: all.

    Returns:
        Reads [B, H, T, V] in v's dtype, and M after `num_written` tokens.
    """
    num_tokens, parts = q.shape[2], (q, k, v, beta, log_decay)
    written = num_tokens if num_written is None else num_written
    takes_fla, chunk = uses_fla(v, q.shape[-1]), GPU_CHUNK_LENGTH if v.is_cuda else CHUNK_LENGTH
    found = find_rule_kernel(memory.dtype, memory.device, max(memory.shape[-2:]))
    chunk = chunk if found is None else native.RULE_CHUNK
    if 0 < written < num_tokens and (takes_fla or written % chunk):
        reads, memory = gated_delta_rule(*(t[:, :, :written] for t in parts), memory=memory)
        last, _ = gated_delta_rule(*(t[:, :, written:] for t in parts), memory=memory)
        return torch.cat((reads, last), dim=2), memory
    if takes_fla:
        reads, end = _run_fla(*parts, memory=memory)
        return reads, end if written else memory
    if found is not None:
        tensors = [t.to(memory.dtype).flatten(0, 1).contiguous() for t in (*parts, memory)]
        keeps = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        reads, end = _Rule.apply(found, *tensors, -(-written // chunk), keeps)
        return reads.view_as(v).to(v.dtype), end.view_as(memory)
    if num_tokens == 1:  # in generation; the plain rule is faster than a chunk
        reads, end = gated_delta_rule_naive(*(t.to(memory.dtype) for t in parts), memory=memory)
        return reads.to(v.dtype), end if written else memory
    return _run_chunks(*parts, memory=memory, chunk=min(chunk, num_tokens), written=written)


def uses_fla(v: Tensor, width: int) -> bool:
    """Whether flash-linear-attention's kernel supports values like `v` with keys of this width.

    False with Triton 3.4 to 3.7.0 on compute capability 9.0 and up: Triton miscompiles the kernel's backward there, and
    fla 0.6 raises an error (`chunk_bwd_dqkwg`; fla issue 640). False under `torch.compile`, which can't trace fla.
    """
    if not (HAS_FLA and v.is_cuda and v.dtype.itemsize < 4 and width <= FLA_KEY_SIZE) or torch.compiler.is_compiling():
        return False
    triton = tuple(int(number) for number in re.findall(r"\d+", version("triton"))[:3])
    return not (3, 4) <= triton < (3, 7, 1) or torch.cuda.get_device_capability(v.device) < (9, 0)


def find_rule_kernel(dtype: torch.dtype, device: torch.device, width: int) -> CDLL | None:
    """The C kernels, if they support M and reads of this dtype with keys and values up to this width."""
    if dtype == torch.float32 and device.type == "cpu" and width <= native.MAX_WIDTH:
        return native.find_kernels()
    return None


class _Rule(torch.autograd.Function):
    """`gated_delta_rule` by the C kernel, on q, k, v [G, T, …], β, log α [G, T] and M [G, K, V], all float32."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        ctx.kernels, *parts, memory, ctx.num_written, keeps = arguments
        reads, end, errors, states = native.gated_delta(ctx.kernels, parts, memory, ctx.num_written, keeps=keeps)
        ctx.save_for_backward(*parts[:2], *parts[3:], errors, states)
        return reads, end

    @staticmethod
    @kernels.differentiate_once
    def backward(ctx: Any, for_reads: Tensor, for_kept: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *parts, errors, states = ctx.saved_tensors
        given = errors, states, for_reads.contiguous(), for_kept.contiguous(), ctx.num_written
        return None, *native.gated_delta_backward(ctx.kernels, parts, *given), None, None


def convolve_heads(
    x: Tensor, before: Tensor, weight: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """q, k and v [B, H, T, K]: SiLU of a causal convolution, q and k then scaled to length `scale` and 1.

    Returns None if no kernel supports the arguments.

    Args:
        x: q, k and v of all heads, [B, T, 3 H K], float32 or bfloat16.
        before: inputs of the size − 1 tokens before x, [B, size − 1, 3 H K] float32.
        weight: the convolution's, [3 H K, size] float32, the current token's last.
        num_heads: H.
        scale: length of the queries.
    """
    width, size = x.shape[-1] // (3 * num_heads), weight.shape[1]
    is_supported = x.dtype in native.SUFFIXES and weight.dtype == torch.float32 and size <= native.MAX_CONVOLUTION
    found = find_rule_kernel(before.dtype, before.device, width) if is_supported else None
    if found is None:
        return None
    return _ConvolvedHeads.apply(found, x.contiguous(), before.contiguous(), weight.contiguous(), num_heads, scale)


class _ConvolvedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        ctx.kernels, *tensors, num_heads, ctx.scale = arguments
        ctx.save_for_backward(*tensors)
        return native.convolve_heads(ctx.kernels, tensors, num_heads, ctx.scale, LEAST_NORM)

    @staticmethod
    @kernels.differentiate_once
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        given = ctx.saved_tensors, [t.contiguous() for t in upstreams], ctx.scale, LEAST_NORM
        return None, *native.convolve_heads_backward(ctx.kernels, *given), None, None


def gate_heads(reads: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    """RMSNorm(reads) SiLU(gate), [B, T, H V].

    Args:
        reads: [B, H, T, V].
        weight: the norm's, [V].
        gate: [B, T, H V]; None: 1.
        eps: the norm's, added to the mean square.
    """
    if gate is not None and gate.dtype in native.SUFFIXES and weight.dtype == torch.float32:
        found = find_rule_kernel(reads.dtype, reads.device, len(weight))
        if found is not None:
            return _GatedHeads.apply(found, reads.contiguous(), weight.contiguous(), gate.contiguous(), eps)
    mixed = F.rms_norm(reads.transpose(1, 2).to(weight.dtype), weight.shape, weight, eps).flatten(2)
    return mixed if gate is None else mixed * F.silu(gate)


class _GatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.kernels, *tensors, ctx.eps = arguments
        ctx.save_for_backward(*tensors)
        return native.gate_heads(ctx.kernels, tensors, ctx.eps)

    @staticmethod
    @kernels.differentiate_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        given = ctx.saved_tensors, upstream.contiguous(), ctx.eps
        return None, *native.gate_heads_backward(ctx.kernels, *given), None


def _run_chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, memory: Tensor, chunk: int, written: int
) -> tuple[Tensor, Tensor]:
    batch, heads, num_tokens, width = q.shape
    dtype, wide, out_dtype = v.dtype, memory.dtype, v.dtype
    if not (kernels.uses_triton(v) and width * v.element_size() <= kernels.MAX_KEY_BYTES):
        dtype = wide

    def cut(x: Tensor, dtype: torch.dtype = wide) -> Tensor:
        """[B, H, T, …] to [n, B H, C, …]; the last chunk is padded with zeros, which write nothing."""
        x = x.to(dtype)
        if missing := -num_tokens % chunk:
            x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, missing))
        return x.unflatten(2, (-1, chunk)).movedim(2, 0).flatten(1, 2)

    q, k, v, beta, log_decay = cut(q), cut(k), cut(v, dtype), cut(beta), cut(log_decay)
    total = sum_prefixes(log_decay, -1)  # g
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    # e^{g_t − g_j} for j ≤ t; the exponents of later tokens would overflow
    ratios = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
    coefficients = beta.unsqueeze(-1) * ratios * (k @ k.transpose(-1, -2))  # A, below the diagonal
    solved = (invert(coefficients) * beta.unsqueeze(-2)).to(dtype)  # T
    scores = ratios * (q.to(dtype) @ k.to(dtype).transpose(-1, -2))  # S
    mixed = scores.to(dtype) @ solved
    grown = total.exp().unsqueeze(-1)  # e^g
    left = (grown * k).to(dtype)
    right = solved.transpose(-1, -2) @ ((total[..., -1:] - total).exp().unsqueeze(-1) * k).to(dtype)
    kept = total[..., -1].exp()
    states, memory = chain_chunks(left, right, v, kept, memory.flatten(0, 1), -(-written // chunk))
    reads = mixed @ v + (grown * q - mixed @ left).to(dtype) @ states
    reads = reads.unflatten(1, (batch, heads)).movedim(0, 2).flatten(2, 3)[:, :, :num_tokens]
    return reads.to(out_dtype), memory.unflatten(0, (batch, heads))


def _run_fla(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Run fla's kernel, which needs [B, T, H, …] and the same dtype for q, k and v."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]

    q, k, v, beta, log_decay = (
        t.transpose(1, 2).contiguous() for t in (q.to(v.dtype), k.to(v.dtype), v, beta, log_decay)
    )
    reads, memory = chunk_gated_delta_rule(
        q=q, k=k, v=v, g=log_decay, beta=beta, scale=1.0, initial_state=memory, output_final_state=True
    )
    return reads.transpose(1, 2), memory


# Shared by the token-by-token delta rules: the inverse of a chunk's system, and the chain from chunk to chunk. Both
# have GPU kernels; the chain takes one launch for all chunks. In 16 bits, products of 16-bit numbers are summed in
# float32, and M is float32. G is the number of groups, one per row and head.


def invert(coefficients: Tensor) -> Tensor:
    """N = (I + A)⁻¹, where A is `coefficients` [..., C, C] below the diagonal, float32 or wider."""
    return (compiled_invert if torch.compiler.is_compiling() else _Inverse.apply)(coefficients)


def _invert(coefficients: Tensor) -> Tensor:
    if kernels.uses_triton(coefficients, (torch.float32,)):
        return kernels.load_triton().invert(coefficients)
    found = find_solver(coefficients)
    if found is not None:
        return native.solve_chunks(found, coefficients.contiguous(), None, coefficients.dtype)
    units = torch.eye(coefficients.shape[-1], dtype=coefficients.dtype, device=coefficients.device)
    units = units.expand_as(coefficients)  # the solver never reads the diagonal or anything above it
    return torch.linalg.solve_triangular(coefficients, units, upper=False, unitriangular=True).contiguous()


def find_solver(products: Tensor) -> CDLL | None:
    """The C kernels, if they support chunks [..., C, C] like `products`."""
    if products.dtype == torch.float32 and products.shape[-1] <= native.MAX_CHUNK:
        return native.find_kernels(products.contiguous())
    return None


compiled_invert = library.custom_op("new_llm::invert_chunks", _invert, mutates_args=())
compiled_invert.register_fake(lambda coefficients: coefficients.new_empty(coefficients.shape))


def _keep_inverse(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _differentiate_inverse(ctx: Any, upstream: Tensor) -> Tensor:
    """A' = −Nᵀ N' Nᵀ below the diagonal."""
    transposed = ctx.saved_tensors[0].transpose(-1, -2)
    return (transposed @ upstream @ transposed).tril(-1).neg()


compiled_invert.register_autograd(_differentiate_inverse, setup_context=_keep_inverse)


class _Inverse(torch.autograd.Function):
    """`invert` with its derivative."""

    forward = staticmethod(_invert)
    setup_context = staticmethod(_keep_inverse)
    backward = staticmethod(kernels.differentiate_once(_differentiate_inverse))  # pyright: ignore[reportAssignmentType]


def chain_chunks(
    left: Tensor, right: Tensor, values: Tensor, decay: Tensor, memory: Tensor, num_written: int
) -> tuple[Tensor, Tensor]:
    """M_{i+1} = d_i M_i + R_iᵀ (V_i − L_i M_i) for i = 0 … n − 1.

    Args:
        left: L, [n, G, C, K]. Its dtype, M's or a narrower one, is that of all products.
        right: R, [n, G, C, K], in L's dtype.
        values: V, [n, G, C, V], in L's dtype.
        decay: d, [n, G], in M's dtype.
        memory: M_0, [G, K, V], float32 or wider.
        num_written: number of chunks that the returned M contains.

    Returns:
        M before each chunk, [n, G, K, V] in L's dtype, and M after `num_written` chunks.
    """
    chain = compiled_chain if torch.compiler.is_compiling() else _Chain.apply
    states, kept, _ = chain(left, right, values, decay, memory, num_written)
    return states, kept


def _advance(
    left: Tensor, right: Tensor, values: Tensor, decay: Tensor, memory: Tensor, num_written: int
) -> tuple[Tensor, Tensor, Tensor]:
    """M before each chunk, M after `num_written` chunks, and E."""
    states = left.new_empty(len(left), *memory.shape)
    held = memory.clone(memory_format=torch.contiguous_format)
    kept, errors = held, []
    if kernels.uses_triton(left):
        for part in (slice(0, num_written), slice(num_written, len(left))):
            if part.start == num_written:
                kept = held.clone()
            if part.start < part.stop:
                errors.append(_launch(held, states[part], left[part], right[part], values[part], decay[part], None))
        return states, kept, torch.cat(errors)
    for i, state in enumerate(states):
        if i == num_written:
            kept = held
        state.copy_(held)
        errors.append(torch.baddbmm(values[i], left[i], state, alpha=-1))
        held = add_product(decay[i, :, None, None] * held, right[i].transpose(-1, -2), errors[-1])
    return states, held if num_written == len(left) else kept, torch.stack(errors)


def _retreat(
    for_states: Tensor,
    for_kept: Tensor,
    left: Tensor,
    right: Tensor,
    decay: Tensor,
    states: Tensor,
    errors: Tensor,
    num_written: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of L, R, V, d and M_0.

    Let G be the gradient of the loss with respect to M after a chunk. Then E' = V' = R G, L' = −E' Mᵀ, R' = E Gᵀ and
    d' = Σ M ⊙ G. Before the chunk, G ← d G − Lᵀ E' + `for_states`, the gradient from the reads of M.
    """
    g = torch.zeros_like(for_kept, memory_format=torch.contiguous_format)
    above = torch.empty_like(states)
    for_values = torch.empty_like(errors)
    if kernels.uses_triton(left):
        for part, more in ((slice(num_written, len(left)), for_kept), (slice(0, num_written), None)):
            if part.start < part.stop:
                for_values[part] = _launch(g, above[part], left[part], right[part], None, decay[part], for_states[part])
            if more is not None:
                g += more
    else:
        for i in reversed(range(len(left))):
            if i == num_written - 1:
                g = g + for_kept
            above[i] = g
            torch.bmm(right[i], above[i], out=for_values[i])
            g = torch.addcmul(for_states[i], decay[i, :, None, None], g)
            g = add_product(g, left[i].transpose(-1, -2), for_values[i], sign=-1)
        if num_written == 0:
            g = g + for_kept
    for_left = (for_values @ states.transpose(-1, -2)).neg_()
    for_right = errors @ above.transpose(-1, -2)
    return for_left, for_right, for_values, (states.to(g.dtype) * above).sum((-1, -2)), g


def _launch(
    state: Tensor,
    states: Tensor,
    left: Tensor,
    right: Tensor,
    values: Tensor | None,
    decay: Tensor,
    added: Tensor | None,
) -> Tensor:
    """Run the kernel of `memory_scan`'s delta rule, with chunks as its segments and groups as the heads of one row."""
    slots = torch.zeros(1, len(left), dtype=torch.int64, device=left.device)
    found = states.unsqueeze(0) if values is None else states[None, :, :, None]
    return kernels.load_triton().write_with_delta(
        state[None, :, None],
        found,
        left.unsqueeze(0),
        right.unsqueeze(0),
        None,
        None if values is None else values.unsqueeze(0),
        decay.unsqueeze(0),
        slots,
        added=None if added is None else added[None, :, :, None],
    )[0]


def add_product(total: Tensor, a: Tensor, b: Tensor, sign: int = 1) -> Tensor:
    """total ± a b in the dtype of `total`; a and b have that dtype or a narrower one."""
    if total.dtype == a.dtype:
        added = torch.baddbmm(total.flatten(0, -3), a.flatten(0, -3), b.flatten(0, -3), alpha=sign)
        return added.view_as(total)
    return torch.add(total, a @ b, alpha=sign)


compiled_chain = library.custom_op("new_llm::chain_chunks", _advance, mutates_args=())
_compiled_retreat = library.custom_op("new_llm::chain_chunks_backward", _retreat, mutates_args=())


@compiled_chain.register_fake
def _(left, right, values, decay, memory, num_written):
    return left.new_empty(len(left), *memory.shape), memory.new_empty(memory.shape), values.new_empty(values.shape)


@_compiled_retreat.register_fake
def _(for_states, for_kept, left, right, decay, states, errors, num_written):
    return tuple(t.new_empty(t.shape) for t in (left, right, errors, decay, for_kept))


def _keep_chain(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    left, right, _, decay, _, ctx.num_written = inputs
    states, kept, errors = output
    ctx.save_for_backward(left, right, decay, states, errors)
    ctx.like = kept.shape, kept.dtype
    ctx.set_materialize_grads(False)


def _differentiate_chain(retreat: Any, ctx: Any, for_states: Tensor | None, for_kept: Tensor | None, *_: Any) -> tuple:
    left, right, decay, states, errors = ctx.saved_tensors
    shape, dtype = ctx.like
    for_states = torch.zeros_like(states) if for_states is None else for_states.contiguous()
    for_kept = states.new_zeros(shape, dtype=dtype) if for_kept is None else for_kept
    return *retreat(for_states, for_kept, left, right, decay, states, errors, ctx.num_written), None


compiled_chain.register_autograd(partial(_differentiate_chain, _compiled_retreat), setup_context=_keep_chain)


class _Chain(torch.autograd.Function):
    """`chain_chunks` with its backward."""

    forward = staticmethod(_advance)
    setup_context = staticmethod(_keep_chain)
    backward = staticmethod(kernels.differentiate_once(partial(_differentiate_chain, _retreat)))  # pyright: ignore[reportAssignmentType]
