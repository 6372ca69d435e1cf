"""What all memory layers share: local linear attention, a gate, and the recurrence over segments.

Legend: B rows, n segments, S tokens of a segment, H memory heads, K = V = D / H, N memories or banks.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from new_llm.config.sections import section
from new_llm.models.layers.base import Segments, Step, check_divides
from new_llm.models.layers.key_shift import pick_last_key, shift_keys
from new_llm.models.layers.memory_attention import MemoryAttention
from new_llm.models.layers.recurrence import scan_segments
from new_llm.models.ops import (
    ScannedReads,
    add_outer_products,
    feature_map,
    local_linear_attention,
    read_memories,
)
from new_llm.models.state import MemoryState, clear_rows, find_written_memory

CHUNK_LENGTH = 1024
"""Tokens up to which local attention is one masked product; beyond, it runs in chunks of this length."""


@section
class MemoryOptions:
    """The options that layers with compressive memory share."""

    use_delta_rule: bool = True
    """Write only what the memory does not hold yet (v − r) instead of v."""
    use_key_shift: bool = False
    """File each value under the key of the token before it, so that a query finds what followed its like."""
    normalize_keys: bool = False
    """Divide each key's features by their sum (arXiv:2102.11174, section 4.2), so that every token weighs alike."""
    num_memory_heads: Annotated[int | None, Field(gt=0)] = None
    """Memory heads H, which divide the hidden size; None: as many as softmax attention has."""
    gate_init: float = 0.0
    """Initial β; the gate towards memory is sigmoid(β) for each head."""
    query_key_init_scale: Annotated[float, Field(gt=0)] = 1.0
    """W_q and W_k of memory layers begin this many times as large as other weights."""
    query_key_init_bias: float = 0.0
    """Initial bias of q and k; below 0 few features of a token are large, and different tokens overlap less."""
    match_query_key_init: bool = False
    """W_k begins equal to W_q, so that similar tokens find one another from the start."""
    memory_epsilon: Annotated[float, Field(gt=0)] = 1e-6
    """ε: the smallest divisor of a read."""


@dataclass(frozen=True)
class OpenSegment:
    """Running sums over the tokens of an open segment, of constant size; `step` adds to them in place.

    Attributes:
        products: Σ kᵀv, [B, H, K, V], which local attention reads.
        keys: Σ k, [B, H, K].
        writes: Σ kᵀ(v − r), [B, H, K, V], which the segment's end adds to the memory; without the delta rule the same
            tensor as `products`.
        num_tokens: tokens summed, [B].
        last_key: features of the last token's own key, [B, H, K], under which shifted keys file the next token; 0 where
            there is none.
    """

    products: Tensor
    keys: Tensor
    writes: Tensor
    num_tokens: Tensor
    last_key: Tensor


class CompressiveAttention(MemoryAttention):
    """g A_mem + (1 − g) A_loc with g = sigmoid(β) a head; a kind of layer says how A_mem mixes its memories.

    Source: Infini-attention, arXiv:2404.07143, section 2, with linear attention in place of the local softmax.

    Args:
        hidden_size: D.
        num_memory_heads: H, which divides D.
        options: how the memory is written, and what it begins with.
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
        self.epsilon = options.memory_epsilon
        self.decay = None if decay is None else tuple(decay)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.gate = nn.Parameter(torch.full((num_memory_heads,), options.gate_init))

    # What a kind of layer defines

    reads_sum: ClassVar[bool] = False
    """Whether the kind reads the sum of its memories too."""

    @abstractmethod
    def read(self, q: Tensor, memory: MemoryState) -> Tensor:
        """A_mem of one segment: features of the queries [B, H, S, K] to [B, H, S, V]."""

    @abstractmethod
    def weigh(self, products: Tensor, num_tokens: Tensor) -> Tensor | None:
        """Each memory's weight for each token of n segments, [B, n, H, S, N] or what broadcasts to it; None: 1.

        Args:
            products: q·z of each memory, [B, n, H, S, N], float32 or wider.
            num_tokens: tokens that each memory has seen, [B, n, N].
        """

    def combine(self, reads: ScannedReads) -> Tensor:
        """A_mem of n segments, [B, n, H, S, V], from the weighed reads and, with `reads_sum`, those of the sum."""
        return reads.reads

    @torch.no_grad()
    def initialize_features(self) -> None:
        """Give freshly drawn queries and keys the scale, bias and likeness that they are to begin with."""
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
            local = local_linear_attention(q, k, v, epsilon=self.epsilon, chunk_length=CHUNK_LENGTH)
            if segments.valid is not None:  # masked keys are zero, so that they add nothing to M and z
                k = k * segments.valid[:, :, None, :, None]
            from_memory, memory = scan_segments(self, q, k, v, memory, segments)
            mixed = self._gate(from_memory, local)
        return self.dense(mixed.transpose(-2, -3).reshape(hidden.shape)), memory

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixed = self.query_key_value(hidden).unflatten(-1, (self.num_memory_heads, 3 * self.head_size))
        q, k, v = mixed.transpose(-2, -3).chunk(3, dim=-1)
        return q, k, v

    def _map_features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """σ(q), and σ(k) or its share in the sum over K; of q such a share would cancel out in every read."""
        q, k = feature_map(q), feature_map(k)
        if self.normalize_keys:
            k = k / k.sum(-1, keepdim=True)
        return q, k

    def _gate(self, from_memory: Tensor, local: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate).to(local.dtype)[:, None, None]
        return gate * from_memory + (1 - gate) * local

    # Writing

    def _decay_like(self, norm: Tensor) -> Tensor | None:
        """w as a tensor of the memory's precision, which the model's need not be."""
        return None if self.decay is None else norm.new_tensor(self.decay)

    def _current(self, memory: MemoryState) -> tuple[Tensor, Tensor]:
        if self.num_memories == 1:
            return memory.memories[:, 0], memory.norms[:, 0]
        rows = torch.arange(memory.rows, device=memory.norms.device)
        index = find_written_memory(memory.num_segments, self.segments_per_memory, memory.frozen)
        return memory.memories[rows, index], memory.norms[rows, index]

    def _replace(self, memory: MemoryState, written: Tensor, norm: Tensor, count: Tensor) -> MemoryState:
        """Put a row's written memory back where the row read any token, [B] `count`, and count the segment."""
        has_tokens = count > 0
        num_segments = memory.num_segments + has_tokens
        if all(memory.frozen):
            return replace(memory, num_segments=num_segments)
        index = find_written_memory(memory.num_segments, self.segments_per_memory, memory.frozen)
        slots = torch.arange(self.num_memories, device=index.device)
        chosen = (slots == index.unsqueeze(1)) & has_tokens.unsqueeze(1)  # [B, N]
        return MemoryState(
            memories=torch.where(chosen[..., None, None, None], written.unsqueeze(1), memory.memories),
            norms=torch.where(chosen[..., None, None], norm.unsqueeze(1), memory.norms),
            num_tokens=memory.num_tokens + chosen * count.unsqueeze(1),
            num_segments=num_segments,
            frozen=memory.frozen,
            retained=self.decay_retained(memory, chosen.long()),
        )

    def decay_retained(self, memory: MemoryState, num_writes: Tensor) -> Tensor | None:
        """`memory.retained` after some writes to each memory, [B, N]."""
        decay = self._decay_like(memory.norms)
        if decay is None:
            return None
        return memory.share_left * decay ** num_writes.unsqueeze(-1)

    # The core over tokens that continue open segments

    def step(
        self, hidden: Tensor, opened: OpenSegment | None, memory: MemoryState | None, step: Step
    ) -> tuple[Tensor, OpenSegment]:
        """The segment's write can be summed as it goes, since r reads the memory of before the segment."""
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
                local = local_linear_attention(
                    q, k, v, epsilon=self.epsilon, chunk_length=CHUNK_LENGTH, initial_sums=sums
                )
                from_memory = torch.zeros_like(v) if memory is None else self.read(q, memory)
                opened = self._sum_step(k, v, opened, memory, step)
                mixed = self._gate(from_memory, local)
            if last_key is not None:
                opened = replace(opened, last_key=last_key)
        return self.dense(mixed.transpose(1, 2).reshape(hidden.shape)), opened

    def _step_one(
        self, q: Tensor, k: Tensor, v: Tensor, opened: OpenSegment | None, memory: MemoryState | None, step: Step
    ) -> tuple[Tensor, OpenSegment]:
        """One token a row: the sums take it first, and one product with them is the local attention.

        All in the sums' precision: M is then read as it is, where 16 bits would scale and round all of it each time.
        """
        dtype = torch.promote_types(v.dtype, torch.float32)
        wide_q, wide_k, wide_v = q.to(dtype), k.to(dtype), v.to(dtype)
        opened = self._sum_step(wide_k, wide_v, opened, memory, step)
        mixed = wide_q @ opened.products / (wide_q @ opened.keys.unsqueeze(-1)).clamp_min(self.epsilon)
        from_memory = torch.zeros_like(mixed) if memory is None else self.read(wide_q, memory)
        return self._gate(from_memory, mixed).to(v.dtype), opened

    def _sum_step(
        self, k: Tensor, v: Tensor, opened: OpenSegment | None, memory: MemoryState | None, step: Step
    ) -> OpenSegment:
        written = v
        if self.use_delta_rule and memory is not None:
            current, norm = self._current(memory)
            written = v - read_memories(k, current.unsqueeze(1), norm.unsqueeze(1), epsilon=self.epsilon)
        if opened is None:
            opened = self._open_segment(k.shape[0], v, is_one_sum=written is v)
        add_outer_products(opened.products, k, v)
        if opened.writes is not opened.products:
            add_outer_products(opened.writes, k, written)
        keys = opened.keys + k.sum(-2, dtype=opened.keys.dtype)
        return replace(opened, keys=keys, num_tokens=opened.num_tokens + step.count_tokens())

    def _open_segment(self, rows: int, like: Tensor, *, is_one_sum: bool) -> OpenSegment:
        """An open segment without tokens; where r = 0 one tensor serves as `products` and as `writes`."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        keys = torch.zeros(rows, self.num_memory_heads, self.head_size, dtype=dtype, device=like.device)
        products = keys.new_zeros(*keys.shape, self.head_size)
        writes = products if is_one_sum else torch.zeros_like(products)
        num_tokens = torch.zeros(rows, dtype=torch.int64, device=like.device)
        return OpenSegment(products, keys, writes, num_tokens, last_key=torch.zeros_like(keys, dtype=like.dtype))

    def end_segments(
        self, opened: OpenSegment | None, memory: MemoryState | None, ended: Tensor
    ) -> tuple[OpenSegment | None, MemoryState | None]:
        """Add the ended rows' sums to the memory whose turn it is, and begin anew."""
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
        return clear_rows(ended, opened), memory
