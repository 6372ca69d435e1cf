"""The gated delta rule, token by token: M_t = α_t (M_{t−1} − k_tᵀ β_t k_t M_{t−1}) + k_tᵀ β_t v_t, read as q_t M_t.

Source: Gated DeltaNet, arXiv:2412.06464, eq. 10 and section 3.3; the chunked form is arXiv:2406.06484's, section 3.

In a chunk of C tokens the rule is a unit lower triangular system. With g_t = Σ_{i≤t} log α_i from the chunk's start,
A_ij = β_i e^{g_i − g_j} (k_i · k_j) for j < i, T = (I + A)⁻¹ diag(β) and S_tj = e^{g_t − g_j} (q_t · k_j) for j ≤ t,
what is written is U = T (V − L M) with L = e^g K, and

    reads = S T V + (e^g Q − S T L) M,    M ← e^{g_C} M + Rᵀ (V − L M),    R = Tᵀ e^{g_C − g} K.

Everything but M is made for all chunks at once; from chunk to chunk M passes through two products, `delta_chunks`.

Legend: B rows, T tokens, H heads, K and V widths of keys and values, n chunks of C tokens.
"""

import re
from importlib.metadata import version
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from new_llm.models.ops import kernels
from new_llm.models.ops.delta_chunks import chain_chunks, invert
from new_llm.models.ops.memory import sum_prefixes

CHUNK_LENGTH = 32
"""C on a CPU: longer chunks mean fewer steps, but more products inside; measured."""
GPU_CHUNK_LENGTH = 64
"""C on a GPU, where the length of the chain is what takes time."""
FLA_KEY_SIZE = 256
"""K at most that flash-linear-attention's kernel takes."""
HAS_FLA = find_spec("fla") is not None and find_spec("triton") is not None


def gated_delta_rule_naive(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` from its equation, a token at a time."""
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
    """Read and write one memory token by token; each token reads it after its own write.

    In 16 bits on a GPU flash-linear-attention (fla) runs where it can, `uses_fla`. Elsewhere chunks: with Triton on a
    GPU in bfloat16, with M in float32; else in M's precision.

    Args:
        q: queries, [B, H, T, K], scaled as they are to be read.
        k: keys of length 1 at most, so that the rule is stable, [B, H, T, K].
        v: values, [B, H, T, V].
        beta: β between 0 and 2, [B, H, T]; 0 where nothing is written.
        log_decay: log α ≤ 0, [B, H, T]; 0 keeps everything.
        memory: M before the first token, [B, H, K, V], float32 or wider.
        num_written: tokens after which the returned memory is taken; None: all.

    Returns:
        Reads [B, H, T, V] in v's dtype, and M.
    """
    num_tokens, parts = q.shape[2], (q, k, v, beta, log_decay)
    written = num_tokens if num_written is None else num_written
    takes_fla, chunk = uses_fla(v, q.shape[-1]), GPU_CHUNK_LENGTH if v.is_cuda else CHUNK_LENGTH
    if 0 < written < num_tokens and (takes_fla or written % chunk):
        reads, memory = gated_delta_rule(*(t[:, :, :written] for t in parts), memory=memory)
        last, _ = gated_delta_rule(*(t[:, :, written:] for t in parts), memory=memory)
        return torch.cat((reads, last), dim=2), memory
    if takes_fla:
        reads, end = _run_fla(*parts, memory=memory)
        return reads, end if written else memory
    if num_tokens == 1:  # as when text is generated: the rule itself is faster than a chunk
        reads, end = gated_delta_rule_naive(*(t.to(memory.dtype) for t in parts), memory=memory)
        return reads.to(v.dtype), end if written else memory
    return _run_chunks(*parts, memory=memory, chunk=min(chunk, num_tokens), written=written)


def uses_fla(v: Tensor, width: int) -> bool:
    """Whether flash-linear-attention's kernel takes values such as these with keys of this width.

    Its backward raises an error with Triton 3.4 to 3.7.0 from compute capability 9.0 on, where that compiler's code for
    it is wrong (fla 0.6, `chunk_bwd_dqkwg`; issue 640 there). Its functions can't be compiled into a graph.
    """
    if not (HAS_FLA and v.is_cuda and v.dtype.itemsize < 4 and width <= FLA_KEY_SIZE) or torch.compiler.is_compiling():
        return False
    triton = tuple(int(number) for number in re.findall(r"\d+", version("triton"))[:3])
    return not (3, 4) <= triton < (3, 7, 1) or torch.cuda.get_device_capability(v.device) < (9, 0)


def _run_chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, memory: Tensor, chunk: int, written: int
) -> tuple[Tensor, Tensor]:
    batch, heads, num_tokens, width = q.shape
    dtype, wide, out_dtype = v.dtype, memory.dtype, v.dtype
    if not (kernels.uses_triton(v) and width * v.element_size() <= kernels.MAX_KEY_BYTES):
        dtype = wide

    def cut(x: Tensor, dtype: torch.dtype = wide) -> Tensor:
        """[B, H, T, …] to [n, B H, C, …]; tokens that are missing to a whole chunk are zero, and so write nothing."""
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
    """fla's kernel, which wants [B, T, H, …] and one dtype of q, k and v."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]

    q, k, v, beta, log_decay = (
        t.transpose(1, 2).contiguous() for t in (q.to(v.dtype), k.to(v.dtype), v, beta, log_decay)
    )
    reads, memory = chunk_gated_delta_rule(
        q=q, k=k, v=v, g=log_decay, beta=beta, scale=1.0, initial_state=memory, output_final_state=True
    )
    return reads.transpose(1, 2), memory
