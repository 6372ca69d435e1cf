"""The gated delta rule, token by token: M_t = α_t (M_{t−1} − k_tᵀ β_t k_t M_{t−1}) + k_tᵀ β_t v_t, read as q_t M_t.

Source: Gated DeltaNet, arXiv:2412.06464, eq. 10 and section 3.3; the chunked form is arXiv:2406.06484's, section 3.

In a chunk of C tokens the rule is a unit lower triangular system. With g_t = Σ_{i≤t} log α_i from the chunk's start and
A_ij = β_i e^{g_i − g_j} (k_i · k_j) for j < i, what is written is U = (I + A)⁻¹ diag(β) (V − e^g K M) = P − R M, and

    reads = e^g Q M + (e^{g_t − g_j} q_t · k_j)_{j≤t} U,    M ← e^{g_C} M + Σ_j e^{g_C − g_j} k_jᵀ u_j.

Everything but M is made for all chunks at once; from chunk to chunk M passes through one product.

Legend: B rows, T tokens, H heads, K and V widths of keys and values, C tokens of a chunk, n chunks.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LENGTH = 32
"""C: longer chunks mean fewer steps, but more products inside; measured on a CPU."""


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

    In 16 bits on a GPU with flash-linear-attention (fla) installed, its kernel runs; else chunks, in M's precision.

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
    uses_fla = v.is_cuda and v.dtype.itemsize < 4 and find_spec("fla") is not None
    if 0 < written < num_tokens and (uses_fla or written % CHUNK_LENGTH):
        reads, memory = gated_delta_rule(*(t[:, :, :written] for t in parts), memory=memory)
        last, _ = gated_delta_rule(*(t[:, :, written:] for t in parts), memory=memory)
        return torch.cat((reads, last), dim=2), memory
    if uses_fla:
        reads, end = _run_fla(*parts, memory=memory)
        return reads, end if written else memory
    wide = [t.to(memory.dtype) for t in parts]
    if num_tokens == 1:  # as when text is generated: the rule itself is faster than a chunk
        reads, end = gated_delta_rule_naive(*wide, memory=memory)
        return reads.to(v.dtype), end if written else memory
    reads, states = _scan_chunks(*wide, memory=memory, chunk=min(CHUNK_LENGTH, num_tokens))
    return reads.to(v.dtype), states[-(-written // CHUNK_LENGTH)]


def _scan_chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, memory: Tensor, chunk: int
) -> tuple[Tensor, list[Tensor]]:
    """The reads, and M before each chunk and after the last."""
    batch, heads, num_tokens, _ = q.shape

    def cut(x: Tensor) -> Tensor:
        """[B, H, T, …] to [B H, n, C, …]; tokens that are missing to a whole chunk are zero, and so write nothing."""
        if missing := -num_tokens % chunk:
            x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, missing))
        return x.flatten(0, 1).unflatten(1, (-1, chunk))

    q, k, v, beta, log_decay = (cut(t) for t in (q, k, v, beta, log_decay))
    total = log_decay.cumsum(-1)  # g
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    # e^{g_t − g_j} for j ≤ t; the exponents of later tokens would overflow
    ratios = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
    coefficients = (beta.unsqueeze(-1) * ratios * (k @ k.transpose(-1, -2))).tril(-1)  # A
    scores = ratios * (q @ k.transpose(-1, -2))
    grown = total.exp().unsqueeze(-1)  # e^g
    values = beta.unsqueeze(-1) * torch.cat((v, grown * k), dim=-1)
    solved = torch.linalg.solve_triangular(coefficients, values, upper=False, unitriangular=True)
    values, keys = solved.split((v.shape[-1], k.shape[-1]), dim=-1)  # P and R
    kept = total[..., -1, None, None].exp()
    writing = ((total[..., -1:] - total).exp().unsqueeze(-1) * k).transpose(-1, -2)
    states = [memory.flatten(0, 1)]
    for one in zip(kept.unbind(1), (writing @ values).unbind(1), (writing @ keys).unbind(1), strict=True):
        states.append(torch.baddbmm(one[0] * states[-1] + one[1], one[2], states[-1], alpha=-1))
    reads = scores @ values + (grown * q - scores @ keys) @ torch.stack(states[:-1], dim=1)
    reads = reads.flatten(1, 2)[:, :num_tokens]
    return reads.unflatten(0, (batch, heads)), [state.unflatten(0, (batch, heads)) for state in states]


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
