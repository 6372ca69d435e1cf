"""The Transformer-XL layer: softmax attention over the segment and cached keys and values of the C tokens before it."""

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
    """C: number of earlier tokens whose keys and values are cached; 0: a plain Pythia layer."""
    detach_memory: bool = True
    """Stop gradients at segment boundaries; False: they flow into the keys and values of earlier segments."""


@dataclass(frozen=True)
class KeyValueMemory(LayerMemory):
    """Keys and values of the last C tokens, newest last. They belong to a single text, so rows can't share them.

    Attributes:
        keys: not yet rotated, since positions are relative, [R, heads, C, K].
        values: [R, heads, C, K].
        num_tokens: number of slots that are filled, at most C, [R], int64.
    """

    keys: Tensor
    values: Tensor
    num_tokens: Tensor

    can_add: ClassVar[bool] = False


@dataclass(frozen=True)
class OpenKeys:
    """Unrotated keys and values of the open segments, and each row's number of tokens."""

    cache: KeyValueCache
    num_tokens: Tensor


class TransformerXLAttention(SoftmaxAttention):
    """softmax(q kᵀ / √K) v over the segment so far and the C tokens before the segment.

    Source: Transformer-XL, arXiv:1901.02860, section 3.2, but with rotary positions. Positions count from the segment's
    start, and cached tokens have −C … −1, so distances are exact across segment boundaries. With `detach_memory` the
    cached keys and values are detached; the paper detaches the hidden states from which it computes them.
    """

    has_memory = True

    def __init__(self, memory_tokens: int, *sizes: Any, detach_memory: bool) -> None:
        super().__init__(*sizes)
        self.memory_tokens = memory_tokens
        self.detach_memory = detach_memory

    def empty_memory(self, rows: int, like: Tensor) -> KeyValueMemory:
        """See `Layer.empty_memory`."""
        shape = (rows, self.num_heads, self.memory_tokens, self.head_size)
        keys = torch.zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        return KeyValueMemory(keys, keys, torch.zeros(rows, dtype=torch.int64, device=like.device))

    def forward(
        self, hidden: Tensor, memory: KeyValueMemory | None, segments: Segments
    ) -> tuple[Tensor, KeyValueMemory]:
        """See `Layer.forward`; all segments run at once, each as a batch row with its C cached tokens in front."""
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
        """Each segment, from `own`, with the C tokens before it, from `stream`, in front; [B n, heads, C + S, K]."""
        own = own.unflatten(2, (num_segments, -1))
        past = stream.unfold(2, self.memory_tokens, own.shape[3])[:, :, :num_segments].transpose(-1, -2)
        return torch.cat((past.transpose(1, 2), own.transpose(1, 2)), dim=3).flatten(0, 1)

    def _mask(self, held: Tensor, batch: int, hidden: Tensor) -> Tensor:
        """Attention mask, [B n, 1, S, C + S]; `held` [B or 1] is the number of cached tokens before the call."""
        num_segments, length = hidden.shape[1:3]
        places = torch.arange(-self.memory_tokens, length, device=hidden.device)
        is_earlier = places <= places[self.memory_tokens :].unsqueeze(1)  # [S, C + S]
        starts = torch.arange(0, num_segments * length, length, device=hidden.device).unsqueeze(1)
        exists = starts + places >= -held[:, None, None]  # [B or 1, n, C + S]
        mask = is_earlier & exists.unsqueeze(2)
        return mask.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)

    def _keep(self, keys: Tensor, values: Tensor, before: KeyValueMemory, counts: Tensor) -> KeyValueMemory:
        """The memory after `counts` [B] new tokens; `keys` and `values` hold the cached tokens, then the new ones."""
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
        """See `Layer.step`; the new tokens join the open segment and attend to it and to the memory."""
        q, k, v = self.split(self.query_key_value(hidden))
        if q.device.type == "cpu" and q.dtype.itemsize < 4:  # as in RotarySoftmax.attend_step
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
        """See `Layer.end_segments`; nothing is cleared, since the next segment overwrites slots before reading them."""
        counts = opened.num_tokens * ended
        before = self.empty_memory(len(ended), opened.cache.keys) if memory is None else memory
        keys, values = (
            torch.cat((old.to(new), new), dim=2)
            for old, new in ((before.keys, opened.cache.keys), (before.values, opened.cache.values))
        )
        return replace(opened, num_tokens=opened.num_tokens - counts), self._keep(keys, values, before, counts)


@register_layer("transformer_xl", options=TransformerXLOptions)
class TransformerXLLayer(Block):
    """A Pythia layer that also attends to the C tokens before the segment, even if C spans several segments.

    All layers of its models are of this kind, as in the paper, so that L layers reach L · C tokens back.
    The arguments are `Block`'s.
    """

    has_memory = True
    can_step_in_place = True
    fills_model: ClassVar[bool] = True

    def make_attention(self, options: Any, *sizes: Any) -> SoftmaxAttention:
        """See `Block.make_attention`; without memory, the attention of a Pythia layer."""
        self.has_memory, self.passes_gradients = options.memory_tokens > 0, not options.detach_memory
        # built even if unused: it draws random numbers, so skipping it would change a seed's weights
        attention = SoftmaxAttention(*sizes)
        if not options.memory_tokens:
            return attention
        return TransformerXLAttention(options.memory_tokens, *sizes, detach_memory=options.detach_memory)
