"""The Transformer-XL layer: softmax attention over the segment and the last C tokens' keys and values before it."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from new_llm.config.model import MAX_SIZE
from new_llm.config.sections import section, short
from new_llm.models.layers.base import Block, Segments, Step, register_layer
from new_llm.models.layers.pythia import KeyValueCache, SoftmaxAttention
from new_llm.models.state import LayerMemory


@section
class TransformerXLOptions:
    """The options of a Transformer-XL layer."""

    memory_tokens: Annotated[int, Field(ge=0, le=MAX_SIZE), short("--memory-tokens")] = 64
    """C: number of earlier tokens whose keys and values are kept; with 0 the layer is Pythia's."""
    detach_memory: bool = True
    """Stop gradients at the segment's border; False: they flow into the keys and values of earlier segments."""


@dataclass(frozen=True)
class KeyValueMemory(LayerMemory):
    """Keys and values of the last C tokens, the newest last. They belong to one text: rows can't share them.

    Attributes:
        keys: before rotation, since positions are relative, [R, heads, C, K].
        values: [R, heads, C, K].
        num_tokens: how many of the C are there, [R], int64.
    """

    keys: Tensor
    values: Tensor
    num_tokens: Tensor

    can_add: ClassVar[bool] = False


@dataclass(frozen=True)
class OpenKeys:
    """Keys, not rotated, and values of the open segments, and how many tokens each row has."""

    cache: KeyValueCache
    num_tokens: Tensor


class TransformerXLAttention(SoftmaxAttention):
    """softmax(q kᵀ / √K) v over the earlier tokens of the segment and the C tokens before it.

    Source: Transformer-XL, arXiv:1901.02860, section 3.2, with rotary positions in place of its own: a query and a key
    are rotated by their places relative to the segment's start, −C … −1 in the memory, so that distances are exact
    across borders. Where gradients stop, they stop at keys and values; in the paper, at the hidden states below them.
    """

    def __init__(self, memory_tokens: int, *sizes: Any, detach_memory: bool) -> None:
        super().__init__(*sizes)
        self.memory_tokens = memory_tokens
        self.detach_memory = detach_memory

    def empty_memory(self, rows: int, like: Tensor) -> KeyValueMemory:
        """As `Layer.empty_memory`."""
        shape = (rows, self.num_heads, self.memory_tokens, self.head_size)
        keys = torch.zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        return KeyValueMemory(keys, keys, torch.zeros(rows, dtype=torch.int64, device=like.device))

    def forward(
        self, hidden: Tensor, memory: KeyValueMemory | None, segments: Segments
    ) -> tuple[Tensor, KeyValueMemory]:
        """All segments in one call: each is a row of its own, with its memory's keys before its own."""
        batch, num_segments, length, _ = hidden.shape
        before = self.empty_memory(batch, hidden) if memory is None else memory
        q, k, v = self.split(self.query_key_value(hidden.flatten(1, 2)))
        past_keys, past_values = (
            torch.cat((old.to(new), new), 2) for old, new in ((before.keys, k), (before.values, v))
        )
        if self.detach_memory:
            past_keys, past_values = past_keys.detach(), past_values.detach()
        positions = torch.arange(-self.memory_tokens, length, device=hidden.device)
        keys = self.rotate(self._cut(past_keys, k, num_segments), positions, {})
        queries = q.unflatten(2, (num_segments, length)).transpose(1, 2).flatten(0, 1)
        mixed = F.scaled_dot_product_attention(
            self.rotate(queries, positions[self.memory_tokens :], {}),
            keys,
            self._cut(past_values, v, num_segments),
            attn_mask=self._mask(before.num_tokens if memory is not None else before.num_tokens[:1], batch, hidden),
        )
        mixed = mixed.unflatten(0, (batch, num_segments)).transpose(2, 3).reshape(hidden.shape)
        num_writes = num_segments - (not segments.write_last)
        counts = segments.count_tokens(batch, num_writes, length, hidden.device).sum(1)
        return self.dense(mixed), self._keep(past_keys, past_values, before, counts)

    def _cut(self, stream: Tensor, own: Tensor, num_segments: int) -> Tensor:
        """Each segment's C tokens of before and its own, [B n, heads, C + S, K]; gradients flow into `own` alone."""
        own = own.unflatten(2, (num_segments, -1))
        past = stream.unfold(2, self.memory_tokens, own.shape[3])[:, :, :num_segments].transpose(-1, -2)
        return torch.cat((past.transpose(1, 2), own.transpose(1, 2)), dim=3).flatten(0, 1)

    def _mask(self, held: Tensor, batch: int, hidden: Tensor) -> Tensor:
        """Which of C + S tokens each of a segment's tokens sees, [B n, 1, S, C + S]; `held` [B or 1] are in memory."""
        num_segments, length = hidden.shape[1:3]
        places = torch.arange(-self.memory_tokens, length, device=hidden.device)
        is_earlier = places <= places[self.memory_tokens :].unsqueeze(1)  # [S, C + S]
        starts = torch.arange(0, num_segments * length, length, device=hidden.device).unsqueeze(1)
        exists = starts + places >= -held[:, None, None]  # [B or 1, n, C + S]
        mask = is_earlier & exists.unsqueeze(2)
        return mask.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)

    def _keep(self, keys: Tensor, values: Tensor, before: KeyValueMemory, counts: Tensor) -> KeyValueMemory:
        """The last C of the memory's and `counts` [B] more tokens; `keys` and `values` begin with the memory's."""
        places = counts.unsqueeze(1) + torch.arange(self.memory_tokens, device=counts.device)
        index = places[:, None, :, None].expand_as(before.keys)
        return KeyValueMemory(
            keys.gather(2, index).to(before.keys.dtype),
            values.gather(2, index).to(before.values.dtype),
            (before.num_tokens + counts).clamp(max=self.memory_tokens),
        )

    def step(
        self, hidden: Tensor, opened: OpenKeys | None, memory: KeyValueMemory | None, step: Step
    ) -> tuple[Tensor, OpenKeys]:
        """Attend to the memory, to the open segment and to the new tokens, which join it."""
        q, k, v = self.split(self.query_key_value(hidden))
        if q.device.type == "cpu" and q.dtype.itemsize < 4:  # as in Pythia's layer
            q, k, v = q.float(), k.float(), v.float()
        cache = self.grow_cache(None if opened is None else opened.cache, k, step)
        self.put(cache, k, v, step)
        memory = self.empty_memory(len(hidden), k) if memory is None else memory
        places = torch.arange(-self.memory_tokens, step.longest, device=hidden.device)
        keys, values = (
            torch.cat((old.to(k.dtype), new[:, :, : step.longest]), dim=2)
            for old, new in ((memory.keys, cache.keys), (memory.values, cache.values))
        )
        mask = (places <= step.positions.unsqueeze(-1)) & (places >= -memory.num_tokens[:, None, None])
        mixed = F.scaled_dot_product_attention(
            self.rotate(q, step.positions.unsqueeze(1), step.shared),
            self.rotate(keys, places, step.shared, f"memory {self.memory_tokens}"),
            values,
            attn_mask=mask.unsqueeze(1),
        )
        counts = step.offsets + step.count_tokens()
        mixed = mixed.to(hidden.dtype).transpose(1, 2).reshape(hidden.shape)
        return self.dense(mixed), OpenKeys(cache, counts)

    def end_segments(
        self, opened: OpenKeys, memory: KeyValueMemory | None, ended: Tensor
    ) -> tuple[OpenKeys, KeyValueMemory]:
        """The ended rows' tokens join the memory; the next segment overwrites their slots before it reads them."""
        counts = opened.num_tokens * ended
        before = self.empty_memory(len(ended), opened.cache.keys) if memory is None else memory
        keys, values = (
            torch.cat((old.to(new), new), dim=2)
            for old, new in ((before.keys, opened.cache.keys), (before.values, opened.cache.values))
        )
        return replace(opened, num_tokens=opened.num_tokens - counts), self._keep(keys, values, before, counts)


@register_layer("transformer_xl", options=TransformerXLOptions)
class TransformerXLLayer(Block):
    """A Pythia layer that also attends to the C tokens before the segment, across any number of borders.

    Its models are made of such layers alone, as in the paper: through L layers a token sees L · C tokens back.
    Arguments are those of `Block`.
    """

    has_memory = True
    can_step_in_place = True
    fills_model: ClassVar[bool] = True

    def make_attention(self, options: Any, *sizes: Any) -> SoftmaxAttention:
        """Softmax over the memory and the segment; without memory that of a Pythia layer."""
        self.has_memory, self.passes_gradients = options.memory_tokens > 0, not options.detach_memory
        attention = SoftmaxAttention(*sizes)  # always made: it draws from the generator, and a seed keeps its weights
        if not options.memory_tokens:
            return attention
        return TransformerXLAttention(options.memory_tokens, *sizes, detach_memory=options.detach_memory)
