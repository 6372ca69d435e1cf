"""The token memory: recalls which tokens followed similar contexts, as their rows of the head's weight matrix."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from new_llm.config.model import MAX_SIZE, Size
from new_llm.config.sections import section
from new_llm.models.layers.base import ReadTokens, Segments, Step, register_layer
from new_llm.models.layers.memory_layer import (
    MemoryAttention,
    MemoryLayer,
    Schedule,
    pick_last_key,
    plan_writes,
    shift_keys,
)
from new_llm.models.ops import scale_to_length, scan_delta_rule, scan_sums, sum_reads, write_delta_rule
from new_llm.models.state import LayerMemory, MemoryState


@section
class TokenMemoryOptions:
    """The options of a token memory."""

    num_memory_heads: Size = 4
    """Number of memory heads H, each [K, D]."""
    memory_key_size: Annotated[int | None, Field(gt=0, le=MAX_SIZE)] = None
    """Key width K; None: half the hidden size."""
    read_gate_init: float = -1.0
    """Initial β of the gates g = sigmoid(β + w x); gates that start far from β = 0 hardly learn."""
    read_scale_init: float = 30.0
    """Initial α, the factor by which memory reads are multiplied."""
    query_key_init_scale: Annotated[float, Field(gt=0)] = 1.0
    """Initial scale of W_q = W_k relative to other weights; the larger they are, the slower their direction changes."""
    retention_init: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Initial w, the share of the memory kept when a segment is written."""
    use_delta_rule: bool = True
    """Write only what the memory does not return yet (v − k M). False: write v."""


@dataclass(frozen=True)
class OpenTokens(LayerMemory):
    """What an open segment has written so far, in constant size.

    Attributes:
        change: M minus the decayed M from before the segment, [B, H, K, V].
        norms: Σ k², [B, H, K].
        num_tokens: number of tokens read, [B].
        last_key: the last token's own key, [B, H, K], under which the next token is stored; 0 before the first token.
    """

    change: Tensor
    norms: Tensor
    num_tokens: Tensor
    last_key: Tensor


class TokenMemoryAttention(MemoryAttention):
    """α W_o Σ_h g_h q_h M_h, where each token writes M ← M + kᵀ β (v − k M), or M + kᵀ β v without the delta rule.

    Queries and keys are projections of the input, normalised to length 1. A token's value is W_v u, where u is its row
    of the head's weight, normalised to length 1; it is stored under the key of the previous token. A segment reads M as
    it was before the segment.

    Before a segment is written, M ← M₀ + w (M − M₀), with learned M₀ and w. Without this decay, a layer trained on few
    segments would meet memory states in a long text that it never saw in training.

    Args:
        hidden_size: D, which is also V.
        options: sizes and initial values.
    """

    num_memories = 1
    segments_per_memory = 1

    def __init__(self, hidden_size: int, options: TokenMemoryOptions) -> None:
        super().__init__()
        heads, width = options.num_memory_heads, options.memory_key_size or max(hidden_size // 2, 1)
        self.num_memory_heads, self.head_size, self.value_size = heads, width, hidden_size
        self.use_delta_rule = options.use_delta_rule
        self.query_key_init_scale = options.query_key_init_scale
        self.query = nn.Linear(hidden_size, heads * width)
        self.key = nn.Linear(hidden_size, heads * width)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.strength = nn.Linear(hidden_size, heads)
        self.token_gate = nn.Linear(hidden_size, heads, bias=False)
        self.gate = nn.Parameter(torch.full((heads,), options.read_gate_init))
        self.dense = nn.Linear(hidden_size, hidden_size, bias=False)
        self.read_scale = nn.Parameter(torch.full((1,), float(options.read_scale_init)))
        retained = options.retention_init
        self.retention = nn.Parameter(torch.full((heads,), math.log(retained / (1 - retained))))
        self.initial_memory = nn.Parameter(torch.zeros(heads, width, hidden_size))

    @torch.no_grad()
    def initialize_features(self) -> None:
        """Start with W_k = W_q, with W_v and W_o as identities, β = 1, and a gate that does not depend on the token."""
        self.query.weight *= self.query_key_init_scale
        self.key.weight.copy_(self.query.weight)
        for linear in (self.value, self.dense):
            nn.init.eye_(linear.weight)
        for linear in (self.strength, self.token_gate):
            nn.init.zeros_(linear.weight)

    def gate_parameters(self) -> list[nn.Parameter]:
        """The gates' β, α, and the logits of w."""
        return [self.gate, self.read_scale, self.retention]

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """M₀, the memory's initial state."""
        return [self.initial_memory]

    def forward(
        self, hidden: Tensor, memory: MemoryState | None, segments: Segments
    ) -> tuple[Tensor, MemoryState | None]:
        """See `Layer.forward`."""
        batch, num_segments, length, _ = hidden.shape
        num_writes = num_segments - (not segments.write_last)
        hidden = round_for_products(hidden)
        q, k, v, beta = self._project(hidden, segments.tokens)
        with torch.autocast(hidden.device.type, enabled=False):
            k = _FileKeys.apply(k, num_writes)
            counts = segments.count_tokens(batch, num_writes, length, hidden.device)
            if segments.valid is not None:
                k = k * segments.valid[:, :num_writes, None, :, None]
            before = self.empty_memory(batch, beta) if memory is None else memory
            schedule, decay = self._plan(before, counts)
            rest = self.initial_memory.to(beta.dtype)
            scan = scan_delta_rule if self.use_delta_rule else scan_plain_rule
            # the state holds M − M₀, so that an empty memory is zero
            reads, change = scan(q, k, v, beta, before.memories[:, 0], rest, decay)
            if num_writes:
                squares = k.to(beta.dtype).square().sum(-2)
                norms = scan_sums(before.norms[:, 0], squares, decay.unsqueeze(-1))[:, -1]
                memory = schedule.finish(before, change.unsqueeze(1), norms.unsqueeze(1), decay.unsqueeze(2))
        return self.dense(reads.to(hidden.dtype)), memory

    def _plan(self, memory: MemoryState, counts: Tensor) -> tuple[Schedule, Tensor]:
        """The schedule for segments of `counts` [B, n] tokens, and each write's w, [B, n, H]; 1 for empty segments."""
        schedule = plan_writes(memory, counts, self.segments_per_memory)
        retained = torch.sigmoid(self.retention.to(memory.memories.dtype))
        return schedule, torch.where((counts > 0).unsqueeze(-1), retained, torch.ones_like(retained))

    def compute_gates(self, hidden: Tensor) -> Tensor:
        """The gates g of each token and head, [..., S, H], at least float32."""
        return torch.sigmoid(self.gate + self.token_gate(hidden).to(torch.promote_types(hidden.dtype, torch.float32)))

    def _project(self, hidden: Tensor, tokens: ReadTokens | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """α g q and k, [..., H, S, K]; v, [..., S, V]; β, [..., H, S], at least float32.

        q, k and v have the dtype of W_v's output, but float32 for float16, whose range is too small for a memory.
        """
        if tokens is None:
            raise ValueError("a token memory needs token ids and the head's weight: runs only inside a TransformerLM")
        token_rows = F.embedding(tokens.input_ids, tokens.head_weight)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        by_head = (self.num_memory_heads, -1)
        beta = 2 * torch.sigmoid(self.strength(hidden).to(dtype))
        v = self.value(scale_to_length(token_rows, dtype=hidden.dtype))
        v = v.to(dtype) if v.dtype == torch.float16 else v
        q = self.query(hidden).unflatten(-1, by_head)
        q = scale_to_length(q, self.read_scale * self.compute_gates(hidden), v.dtype)
        k = scale_to_length(self.key(hidden).unflatten(-1, by_head), dtype=v.dtype)
        return q.transpose(-2, -3), k.transpose(-2, -3), v, beta.transpose(-1, -2)

    def step(
        self, hidden: Tensor, opened: OpenTokens | None, memory: MemoryState | None, step: Step
    ) -> tuple[Tensor, OpenTokens]:
        """See `Layer.step`; tokens read the memory from before the segment, and writes are added up until its end."""
        hidden = round_for_products(hidden)
        q, k, v, beta = self._project(hidden, step.tokens)
        with torch.autocast(hidden.device.type, enabled=False):
            q, k, v = (t.to(beta.dtype) for t in (q, k, v))
            rest = self.initial_memory.to(k.dtype)
            memory = self.empty_memory(len(hidden), k) if memory is None else memory
            held = memory.memories[:, 0]
            reads = sum_reads(q.transpose(1, 2).flatten(2), rest + held)
            if opened is None:
                keys = k.new_zeros(len(hidden), self.num_memory_heads, self.head_size)
                change = keys.new_zeros(*keys.shape, self.value_size)
                opened = OpenTokens(change, keys, torch.zeros_like(step.offsets), keys)
            k, last_key = shift_keys(k, opened.last_key), pick_last_key(k, opened.last_key, step.valid)
            if step.valid is not None:
                k = k * step.valid[:, None, :, None]
            faded = torch.sigmoid(self.retention.to(k.dtype))[:, None, None] * held
            if self.use_delta_rule:
                added = write_delta_rule(k, v, beta, rest + faded + opened.change)
            else:
                added = k.transpose(-1, -2) @ (beta.unsqueeze(-1) * v.unsqueeze(1))
            opened = OpenTokens(
                change=opened.change + added,
                norms=opened.norms + k.square().sum(-2),
                num_tokens=opened.num_tokens + step.count_tokens(),
                last_key=last_key,
            )
        return self.dense(reads.to(hidden.dtype)), opened

    def end_segments(
        self, opened: OpenTokens, memory: MemoryState | None, ended: Tensor
    ) -> tuple[OpenTokens, MemoryState]:
        """See `Layer.end_segments`."""
        memory = self.empty_memory(len(ended), opened.change) if memory is None else memory
        schedule, decay = self._plan(memory, (opened.num_tokens * ended).unsqueeze(1))
        empty = opened.emptied()
        closed = opened.select_rows(ended, empty)
        memories = decay.unsqueeze(-1).unsqueeze(-1) * memory.memories + closed.change.unsqueeze(1)
        norms = decay.unsqueeze(-1) * memory.norms + closed.norms.unsqueeze(1)
        return empty.select_rows(ended, opened), schedule.finish(memory, memories, norms, decay.unsqueeze(2))


def scan_plain_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, change: Tensor, rest: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """`scan_delta_rule` without the delta rule: M ← M + kᵀ β v."""
    num_segments, num_writes = q.shape[1], k.shape[1]
    values = beta[:, :num_writes].unsqueeze(-1) * v[:, :num_writes].unsqueeze(2)
    states = scan_sums(change, k.to(values.dtype).transpose(-1, -2) @ values, decay[..., None, None])
    held = rest + states[:, :num_segments]
    return (q.to(held.dtype) @ held).sum(2), states[:, -1]


def round_for_products(x: Tensor) -> Tensor:
    """Cast x to autocast's dtype, if autocast is on: once, instead of at each product that takes x."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class _FileKeys(torch.autograd.Function):
    """`shift_keys` for the first w segments, [B, n, H, S, K] to [B, w, H, S, K], with segments outermost in memory."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, num_writes: int) -> Tensor:
        ctx.num_segments = k.shape[1]
        k = k[:, :num_writes].transpose(0, 1)
        filed = k.new_empty(k.shape)
        filed[..., 0, :] = 0
        filed[..., 1:, :] = k[..., :-1, :]
        return filed.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        batch, num_writes, heads, length, width = upstream.shape
        for_k = upstream.new_empty(batch, ctx.num_segments, length, heads, width)  # the memory layout of projections
        for_k[:, num_writes:] = 0
        for_k[:, :num_writes, -1] = 0
        for_k[:, :num_writes, :-1] = upstream[..., 1:, :].transpose(2, 3)
        return for_k.transpose(2, 3), None


@register_layer("token_memory", options=TokenMemoryOptions)
class TokenMemoryLayer(MemoryLayer):
    """x + α W_o Σ_h g_h q_h M_h between the final LayerNorm and the head: maps contexts to the tokens that followed.

    Queries and keys are projections of the head's input x. Values are projections of the tokens' rows of the head's
    weight, so a read raises the logits of tokens that followed similar contexts. The idea is that of the continuous
    cache (arXiv:1612.04426), which stores every context; this memory has constant size. It is written token by token
    as in DeltaNet (arXiv:2102.11174, section 4.2, arXiv:2406.06484), and a segment reads the memory from before it, as
    in Infini-attention (arXiv:2404.07143). An empty memory returns the learned M₀.

    Args:
        hidden_size: D.
        options: fields of `TokenMemoryOptions`.

    Raises:
        ValueError: an option is out of range.
    """

    index_key: ClassVar[str] = "current_memory_idx"
    stands_before_head: ClassVar[bool] = True
    can_step_in_place = True

    def __init__(self, hidden_size: int, **options: Any) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.attention = TokenMemoryAttention(hidden_size, TokenMemoryOptions(**options))
