"""What compressive layers share: local linear attention, a gate, and the recurrence over segments.

Legend: B rows, n segments, S tokens of a segment, H memory heads, K = V = D / H, N memories or banks.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from new_llm.config import PythiaConfig
from new_llm.config.model import MAX_SIZE
from new_llm.config.sections import section
from new_llm.models.layers.base import Block, Segments, Step, check_divides
from new_llm.models.layers.memory_layer import MemoryAttention, MemoryLayer, pick_last_key, shift_keys
from new_llm.models.ops import (
    ScannedReads,
    add_outer_products,
    feature_map,
    local_linear_attention,
    multiply_norms,
    read_memories,
    scan_memories,
    scan_sums,
)
from new_llm.models.state import LayerMemory, MemoryState, find_written_memory

EPSILON = 1e-6
"""ε: the smallest divisor of a read."""
CHUNK_LENGTH = 1024
"""Tokens up to which local attention is one masked product; longer segments run in chunks of this length."""


@section
class MemoryOptions:
    """The options that layers with compressive memory share."""

    use_delta_rule: bool = True
    """Write only what the memory does not return yet (v − r) instead of v."""
    use_key_shift: bool = False
    """File each value under the key of the token before it, so that a query finds what followed its like."""
    normalize_keys: bool = False
    """Divide each key's features by their sum (arXiv:2102.11174, section 4.2), so that all tokens weigh the same."""
    num_memory_heads: Annotated[int | None, Field(gt=0, le=MAX_SIZE)] = None
    """Memory heads H, which divide the hidden size; None: as many as softmax attention has."""
    gate_init: float = 0.0
    """Initial β; the gate towards memory is sigmoid(β) for each head."""
    query_key_init_scale: Annotated[float, Field(gt=0)] = 1.0
    """W_q and W_k of memory layers start this many times as large as other weights."""
    query_key_init_bias: float = 0.0
    """Initial bias of q and k; negative values make few features of a token large, so that tokens overlap less."""
    match_query_key_init: bool = False
    """W_k starts equal to W_q, so that similar tokens find one another from the start."""


@dataclass(frozen=True)
class OpenSegment(LayerMemory):
    """Running sums over the tokens of an open segment, of constant size; `step` adds to them in place.

    Attributes:
        products: Σ kᵀv, [B, H, K, V], which local attention reads.
        keys: Σ k, [B, H, K].
        writes: Σ kᵀ(v − r), [B, H, K, V], added to the memory at the segment's end; without the delta rule the same
            tensor as `products`.
        num_tokens: tokens summed, [B].
        last_key: features of the last token's own key, [B, H, K], under which a key shift files the next token; 0 where
            there is none.
    """

    products: Tensor
    keys: Tensor
    writes: Tensor
    num_tokens: Tensor
    last_key: Tensor


@dataclass(frozen=True)
class Schedule:
    """The writes of a call whose first w segments are written. B rows, N memories.

    Attributes:
        slots: the memory that each segment is written to, [B, w] int64.
        chosen: the same as a mask, [B, w, N]; all False for a segment without tokens.
        num_tokens: tokens that each memory has seen before each segment and after the last, [B, w + 1, N].
        num_segments: segments read after the last, [B].
    """

    slots: Tensor
    chosen: Tensor
    num_tokens: Tensor
    num_segments: Tensor

    def count_writes(self) -> Tensor:
        """Writes to each memory, [B, N]."""
        return self.chosen.sum(1)

    def spread_decay(self, decay: Sequence[float] | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The decay w of each head at each write, 1 where nothing is written.

        Returns:
            The decay of the written memory, [B, w, H], and of all memories, [B, w, N, H].
        """
        if decay is None:
            return None, None
        of_heads = like.new_tensor(decay)
        every = torch.where(self.chosen.unsqueeze(-1), of_heads, torch.ones_like(of_heads))
        return every.amin(2), every


def plan_writes(memory: MemoryState, counts: Tensor, segments_per_memory: int) -> Schedule:
    """The schedule for segments of `counts` [B, w] tokens, given the memory before them."""
    has_tokens = counts > 0
    seen = has_tokens.cumsum(1)
    num_memories = memory.norms.shape[1]
    slots = find_written_memory(
        memory.num_segments.unsqueeze(1) + seen - has_tokens.long(), segments_per_memory, num_memories
    )
    numbers = torch.arange(num_memories, device=slots.device)
    chosen = (slots.unsqueeze(-1) == numbers) & has_tokens.unsqueeze(-1)
    added = (chosen * counts.unsqueeze(-1)).cumsum(1)
    before = memory.num_tokens.unsqueeze(1)
    return Schedule(
        slots=slots,
        chosen=chosen,
        num_tokens=torch.cat((before, before + added), dim=1),
        num_segments=memory.num_segments + has_tokens.sum(1),
    )


def _pick_norms(norms: Tensor, slots: Tensor) -> Tensor:
    """z of the memory that each segment is written to: [B, w, N, H, K] to [B, w, H, K]."""
    if norms.shape[2] == 1:
        return norms[:, :, 0]
    return norms.gather(2, slots[:, :, None, None, None].expand(-1, -1, 1, *norms.shape[3:])).squeeze(2)


class CompressiveAttention(MemoryAttention):
    """g A_mem + (1 − g) A_loc with g = sigmoid(β) per head; subclasses define how A_mem mixes the memories.

    Source: Infini-attention, arXiv:2404.07143, section 2, with linear attention in place of the local softmax.

    Args:
        hidden_size: D.
        num_memory_heads: H, which divides D.
        options: how the memory is written, and initial values.
        num_memories: N.
        segments_per_memory: segments written into one memory before the next.
        decay: w of each head, H numbers; None: 1.
    """

    def __init__(
        self,
        hidden_size: int,
        num_memory_heads: int,
        options: MemoryOptions,
        *,
        num_memories: int,
        segments_per_memory: int,
        decay: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.head_size = self.value_size = check_divides("num_memory_heads", num_memory_heads, hidden_size)
        self.num_memory_heads = num_memory_heads
        self.num_memories = num_memories
        self.segments_per_memory = segments_per_memory
        self.use_delta_rule = options.use_delta_rule
        self.use_key_shift = options.use_key_shift
        self.normalize_keys = options.normalize_keys
        self.query_key_init_scale = options.query_key_init_scale
        self.query_key_init_bias = options.query_key_init_bias
        self.match_query_key_init = options.match_query_key_init
        self.decay = None if decay is None else tuple(decay)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.gate = nn.Parameter(torch.full((num_memory_heads,), options.gate_init))

    # What subclasses define

    options_type: ClassVar[type[MemoryOptions]]
    """The dataclass of the attention's options."""
    reads_sum: ClassVar[bool] = False
    """Whether the attention also reads the sum of its memories."""

    @abstractmethod
    def read(self, q: Tensor, memory: MemoryState) -> Tensor:
        """A_mem of one segment: features of the queries [B, H, S, K] to [B, H, S, V]."""

    @abstractmethod
    def weigh(self, products: Tensor, num_tokens: Tensor) -> Tensor | None:
        """Each memory's weight for each token of n segments, broadcastable to [B, n, H, S, N]; None: 1.

        Args:
            products: q·z of each memory, [B, n, H, S, N], float32 or wider.
            num_tokens: tokens that each memory has seen, [B, n, N].
        """

    def combine(self, reads: ScannedReads) -> Tensor:
        """A_mem of n segments, [B, n, H, S, V], from the weighted reads and, with `reads_sum`, the reads of the sum."""
        return reads.reads

    @torch.no_grad()
    def initialize_features(self) -> None:
        """Scale W_q and W_k, set their biases, and copy W_q to W_k, as the options ask."""
        shape = (self.num_memory_heads, 3, self.head_size)
        weight = self.query_key_value.weight.unflatten(0, shape)
        weight[:, :2] *= self.query_key_init_scale
        self.query_key_value.bias.view(shape)[:, :2] = self.query_key_init_bias
        if self.match_query_key_init:
            weight[:, 1] = weight[:, 0]

    # The core over whole segments

    def forward(
        self, hidden: Tensor, memory: MemoryState | None, segments: Segments
    ) -> tuple[Tensor, MemoryState | None]:
        """Local attention of all segments at once, then the recurrence of the memory over the segments."""
        q, k, v = self._project(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            q, k = self._map_features(q, k)
            if self.use_key_shift:
                k = shift_keys(k)
            local = local_linear_attention(q, k, v, epsilon=EPSILON, chunk_length=CHUNK_LENGTH)
            if segments.valid is not None:  # masked keys are zero and add nothing to M and z
                k = k * segments.valid[:, :, None, :, None]
            from_memory, memory = self._scan(q, k, v, memory, segments)
            mixed = self._gate(from_memory, local)
        return self.dense(mixed.transpose(-2, -3).reshape(hidden.shape)), memory

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixed = self.query_key_value(hidden).unflatten(-1, (self.num_memory_heads, 3 * self.head_size))
        q, k, v = mixed.transpose(-2, -3).chunk(3, dim=-1)
        return q, k, v

    def _map_features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """σ(q), and σ(k), divided by its sum over K with `normalize_keys`; for q that would cancel in every read."""
        q, k = feature_map(q), feature_map(k)
        if self.normalize_keys:
            k = k / k.sum(-1, keepdim=True)
        return q, k

    def _gate(self, from_memory: Tensor, local: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate).to(local.dtype)[:, None, None]
        return gate * from_memory + (1 - gate) * local

    # Writing

    def _scan(
        self, q: Tensor, k: Tensor, v: Tensor, memory: MemoryState | None, segments: Segments
    ) -> tuple[Tensor, MemoryState | None]:
        """Read and write all segments of a call.

        Neither the schedule nor z depends on values, so both are computed for all segments at once; only M is left to
        `scan_memories`.

        Args:
            q: features of the queries, [B, n, H, S, K].
            k: features of the keys, likewise, zero at masked tokens.
            v: values, [B, n, H, S, V].
            memory: the memory before the call; None: empty.
            segments: which tokens are real, and whether the last segment is written.

        Returns:
            A_mem [B, n, H, S, V], and the memory after the last write.
        """
        batch, num_segments, _, length, _ = q.shape
        num_writes = num_segments - (not segments.write_last)
        if memory is None and num_writes == 0:
            return torch.zeros_like(v), None
        counts = segments.count_tokens(batch, num_writes, length, q.device)
        before = self.empty_memory(batch, v) if memory is None else memory
        schedule = plan_writes(before, counts, self.segments_per_memory)
        decay, norm_decay = schedule.spread_decay(self.decay, before.norms)
        # z of all memories before each segment and after the last, [B, w + 1, N, H, K]
        changes = schedule.chosen[..., None, None] * k[:, :num_writes].sum(-2, dtype=before.norms.dtype).unsqueeze(2)
        norms = scan_sums(before.norms, changes, None if norm_decay is None else norm_decay.unsqueeze(-1))
        products = multiply_norms(q, norms[:, :num_segments].transpose(2, 3))  # [B, n, H, S, N]
        weights = self.weigh(products, schedule.num_tokens[:, :num_segments])
        divisors = products.clamp_min(EPSILON)
        delta_scales = None
        if self.use_delta_rule and num_writes:
            written = _pick_norms(norms[:, :num_writes], schedule.slots).unsqueeze(-2)
            delta_scales = 1 / multiply_norms(k[:, :num_writes], written).squeeze(-1).clamp_min(EPSILON)
        reads = scan_memories(
            q,
            k,
            v,
            None if memory is None else memory.memories,
            divisors.reciprocal() if weights is None else weights / divisors,
            schedule.slots,
            num_writes=num_writes,
            sum_scales=products.sum(-1).clamp_min(EPSILON).reciprocal() if self.reads_sum else None,
            delta_scales=delta_scales,
            decay=decay,
        )
        if num_writes:
            memory = MemoryState(
                memories=reads.memories,
                norms=norms[:, -1],
                num_tokens=schedule.num_tokens[:, -1],
                num_segments=schedule.num_segments,
                segments_seen=before.segments_seen + schedule.num_segments - before.num_segments,
                retained=self.decay_retained(before, schedule.count_writes()),
            )
        return self.combine(reads), memory

    def _decay_like(self, norm: Tensor) -> Tensor | None:
        """w as a tensor in the memory's precision, which may differ from the model's."""
        return None if self.decay is None else norm.new_tensor(self.decay)

    def _current(self, memory: MemoryState) -> tuple[Tensor, Tensor]:
        if self.num_memories == 1:
            return memory.memories[:, 0], memory.norms[:, 0]
        rows = torch.arange(memory.rows, device=memory.norms.device)
        index = find_written_memory(memory.num_segments, self.segments_per_memory, self.num_memories)
        return memory.memories[rows, index], memory.norms[rows, index]

    def _replace(self, memory: MemoryState, written: Tensor, norm: Tensor, count: Tensor) -> MemoryState:
        """Put back the written memory of rows that read any token (`count` [B] > 0), and count their segment."""
        has_tokens = count > 0
        num_segments = memory.num_segments + has_tokens
        index = find_written_memory(memory.num_segments, self.segments_per_memory, self.num_memories)
        slots = torch.arange(self.num_memories, device=index.device)
        chosen = (slots == index.unsqueeze(1)) & has_tokens.unsqueeze(1)  # [B, N]
        return MemoryState(
            memories=torch.where(chosen[..., None, None, None], written.unsqueeze(1), memory.memories),
            norms=torch.where(chosen[..., None, None], norm.unsqueeze(1), memory.norms),
            num_tokens=memory.num_tokens + chosen * count.unsqueeze(1),
            num_segments=num_segments,
            segments_seen=memory.segments_seen + has_tokens,
            retained=self.decay_retained(memory, chosen.long()),
        )

    def decay_retained(self, memory: MemoryState, num_writes: Tensor) -> Tensor | None:
        """`memory.retained` after `num_writes` [B, N] more writes to each memory."""
        decay = self._decay_like(memory.norms)
        if decay is None:
            return None
        return memory.share_left * decay ** num_writes.unsqueeze(-1)

    # The core over tokens that continue open segments

    def step(
        self, hidden: Tensor, opened: OpenSegment | None, memory: MemoryState | None, step: Step
    ) -> tuple[Tensor, OpenSegment]:
        """More tokens; the write is summed as they come, since r reads the memory from before the segment."""
        q, k, v = self._project(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            q, k = self._map_features(q, k)
            last_key = None
            if self.use_key_shift:
                last_key = torch.zeros_like(k[:, :, 0]) if opened is None else opened.last_key
                k, last_key = shift_keys(k, last_key), pick_last_key(k, last_key, step.valid)
            if step.valid is not None:
                k = k * step.valid[:, None, :, None]
            if hidden.shape[1] == 1:
                mixed, opened = self._step_one(q, k, v, opened, memory, step)
            else:
                sums = None if opened is None else (opened.products, opened.keys)
                local = local_linear_attention(q, k, v, epsilon=EPSILON, chunk_length=CHUNK_LENGTH, initial_sums=sums)
                from_memory = torch.zeros_like(v) if memory is None else self.read(q, memory)
                opened = self._sum_step(k, v, opened, memory, step)
                mixed = self._gate(from_memory, local)
            if last_key is not None:
                opened = replace(opened, last_key=last_key)
        return self.dense(mixed.transpose(1, 2).reshape(hidden.shape)), opened

    def _step_one(
        self, q: Tensor, k: Tensor, v: Tensor, opened: OpenSegment | None, memory: MemoryState | None, step: Step
    ) -> tuple[Tensor, OpenSegment]:
        """One token per row: add it to the sums first; local attention is then one product with them.

        This runs in the sums' precision, so that M is read as it is; 16 bits would scale and round all of it each time.
        """
        dtype = torch.promote_types(v.dtype, torch.float32)
        wide_q, wide_k, wide_v = q.to(dtype), k.to(dtype), v.to(dtype)
        opened = self._sum_step(wide_k, wide_v, opened, memory, step)
        mixed = wide_q @ opened.products / (wide_q @ opened.keys.unsqueeze(-1)).clamp_min(EPSILON)
        from_memory = torch.zeros_like(mixed) if memory is None else self.read(wide_q, memory)
        return self._gate(from_memory, mixed).to(v.dtype), opened

    def _sum_step(
        self, k: Tensor, v: Tensor, opened: OpenSegment | None, memory: MemoryState | None, step: Step
    ) -> OpenSegment:
        written = v
        if self.use_delta_rule and memory is not None:
            current, norm = self._current(memory)
            written = v - read_memories(k, current.unsqueeze(1), norm.unsqueeze(1), epsilon=EPSILON)
        if opened is None:
            opened = self._open_segment(k.shape[0], v, is_one_sum=written is v)
        add_outer_products(opened.products, k, v)
        if opened.writes is not opened.products:
            add_outer_products(opened.writes, k, written)
        keys = opened.keys + k.sum(-2, dtype=opened.keys.dtype)
        return replace(opened, keys=keys, num_tokens=opened.num_tokens + step.count_tokens())

    def _open_segment(self, rows: int, like: Tensor, *, is_one_sum: bool) -> OpenSegment:
        """An open segment without tokens; where r = 0, `products` and `writes` are one tensor."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        keys = torch.zeros(rows, self.num_memory_heads, self.head_size, dtype=dtype, device=like.device)
        products = keys.new_zeros(*keys.shape, self.head_size)
        writes = products if is_one_sum else torch.zeros_like(products)
        num_tokens = torch.zeros(rows, dtype=torch.int64, device=like.device)
        return OpenSegment(products, keys, writes, num_tokens, last_key=torch.zeros_like(keys, dtype=like.dtype))

    def end_segments(
        self, opened: OpenSegment | None, memory: MemoryState | None, ended: Tensor
    ) -> tuple[OpenSegment | None, MemoryState | None]:
        """Add the ended rows' sums to the memory whose turn it is, and clear them."""
        if opened is None:
            return opened, memory
        if memory is None:
            memory = self.empty_memory(ended.shape[0], opened.products)
        current, norm = self._current(memory)
        decay = self._decay_like(norm)
        if decay is not None:
            current, norm = current * decay[:, None, None], norm * decay[:, None]
        count = opened.num_tokens * ended
        memory = self._replace(memory, current + opened.writes, norm + opened.keys, count)
        return opened.emptied().select_rows(ended, opened), memory


class CompressiveLayer(MemoryLayer, Block):
    """A block whose attention is compressive; subclasses name their attention.

    Args:
        hidden_size: D.
        num_heads: heads of the model's softmax layers, and of the memory where `num_memory_heads` is None.
        intermediate_size: width of the MLP.
        layer_norm_eps: ε of the LayerNorms.
        options: fields of the attention's `options_type`.

    Raises:
        ValueError: heads that do not divide the hidden size, or an option out of range.
    """

    attention_type: ClassVar[type[CompressiveAttention]]

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        layer_norm_eps: float = PythiaConfig.layer_norm_eps,
        **options: Any,
    ) -> None:
        chosen: Any = self.attention_type.options_type(**options)
        make_attention: Any = self.choose_attention(chosen)
        super().__init__(
            make_attention(hidden_size, chosen.num_memory_heads or num_heads, chosen),
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            layer_norm_eps=layer_norm_eps,
        )
        self.num_heads = num_heads

    def choose_attention(self, options: Any) -> type[CompressiveAttention]:
        """The class of attention that these options ask for."""
        return self.attention_type
