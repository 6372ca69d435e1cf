"""What the token-by-token delta rules share: the inverse of a chunk's system, and the chain from chunk to chunk.

In a chunk of C tokens the rule is a unit lower triangular system I + A. From chunk to chunk only M passes,
M_{i+1} = d_i M_i + R_iᵀ E_i with E_i = V_i − L_i M_i; all else is made for all chunks at once.

Both have kernels on a GPU, the chain one launch for all chunks. In 16 bits products are those of 16-bit numbers, summed
in float32, and M is float32.

Legend: n chunks, G groups (a row's head each), C tokens of a chunk, K and V widths of keys and values.
"""

from ctypes import CDLL
from typing import Any

import torch
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from new_llm.models.ops import kernels
from new_llm.models.ops.kernels import native


def invert(coefficients: Tensor) -> Tensor:
    """N = (I + A)⁻¹ of what stands below the diagonals of `coefficients` [..., C, C], float32 or wider."""
    return (compiled_invert if torch.compiler.is_compiling() else _Inverse.apply)(coefficients)


def _invert(coefficients: Tensor) -> Tensor:
    if kernels.uses_triton(coefficients, (torch.float32,)):
        return kernels.load_triton().invert(coefficients)
    found = find_solver(coefficients)
    if found is not None:
        return native.solve_chunks(found, coefficients.contiguous(), None, coefficients.dtype)
    units = torch.eye(coefficients.shape[-1], dtype=coefficients.dtype, device=coefficients.device)
    units = units.expand_as(coefficients)  # the solver never looks at the diagonal, nor at what is above it
    return torch.linalg.solve_triangular(coefficients, units, upper=False, unitriangular=True).contiguous()


def find_solver(products: Tensor) -> CDLL | None:
    """The C kernels, if they solve chunks such as these, [..., C, C]."""
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
    backward = staticmethod(once_differentiable(_differentiate_inverse))  # pyright: ignore[reportAssignmentType]


def chain_chunks(
    left: Tensor, right: Tensor, values: Tensor, decay: Tensor, memory: Tensor, num_written: int
) -> tuple[Tensor, Tensor]:
    """M_{i+1} = d_i M_i + R_iᵀ (V_i − L_i M_i) for i = 0 … n − 1.

    Args:
        left: L, [n, G, C, K], in M's dtype or a narrower one, that of all products.
        right: R, likewise.
        values: V, [n, G, C, V], likewise.
        decay: d, [n, G], in M's dtype.
        memory: M_0, [G, K, V], float32 or wider.
        num_written: chunks after which the returned M is taken.

    Returns:
        M before each chunk, [n, G, K, V] in the products' dtype, and M after `num_written` chunks.
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

    With G = ∂L/∂M behind a chunk: E' = R G, L' = −E' Mᵀ, R' = E Gᵀ, d' = Σ M ⊙ G, and before it
    G ← d G − Lᵀ E' + what the reads of M give.
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
    """The kernel of segments with the delta rule, for which a chunk is a segment, on the one row of all groups."""
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
    """total ± a b, in the dtype of `total`, from a and b in that dtype or a narrower one."""
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


def _differentiate_compiled(ctx: Any, *upstreams: Tensor | None) -> tuple:
    return _differentiate_chain(_compiled_retreat, ctx, *upstreams)


compiled_chain.register_autograd(_differentiate_compiled, setup_context=_keep_chain)


class _Chain(torch.autograd.Function):
    """`chain_chunks` with its derivatives."""

    forward = staticmethod(_advance)
    setup_context = staticmethod(_keep_chain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _differentiate_chain(_retreat, ctx, *upstreams)
