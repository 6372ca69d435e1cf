"""The Pythia layer: GPT-NeoX's softmax attention with partial rotary positions, within the segment."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from new_llm.models.layers.base import Attention, Block, Segments, Step, check_divides, register_layer
from new_llm.models.ops.local_attention import attend_heads, can_split_heads, causal_attention, normalize
from new_llm.models.state import LayerMemory


def compute_rotary_angles(positions: Tensor, rotary_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of p · base^(−2i / rotary_dim), i = 0 … rotary_dim / 2 − 1, repeated once to fill rotary_dim.

    Source: RoFormer, arXiv:2104.09864, eq. 15, in the half-split layout of GPT-NeoX. Angles are always computed in
    float32, as Hugging Face does, so that a float64 model's logits agree too.

    Args:
        positions: token positions p, integers, [...].
        rotary_dim: number of rotated dimensions per head, even.
        base: base of the wavelengths.
        dtype: dtype of the result.

    Returns:
        cos and sin, each [..., rotary_dim].
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device) / rotary_dim
    angles = positions.to(torch.float32).unsqueeze(-1) * (1.0 / base**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@library.custom_op("new_llm::rotary_table", mutates_args=())
def make_rotary_table(length: int, rotary_dim: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """cos and sin of positions 0 … length − 1, [2, length, rotary_dim].

    A custom op, so that `torch.compile` can't fuse it into the rotation, where cos and sin would be recomputed for
    every element. Only compiled code calls it: calling it in eager mode imports torch's whole compiler.
    """
    return _keep_rotary_table(length, rotary_dim, base, dtype, device).clone()


@lru_cache(maxsize=16)
def _keep_rotary_table(length: int, rotary_dim: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.stack(compute_rotary_angles(torch.arange(length, device=device), rotary_dim, base, dtype))


@make_rotary_table.register_fake
def _(length: int, rotary_dim: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(2, length, rotary_dim, dtype=dtype, device=device)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim dimensions of queries or keys [..., T, K] by cos and sin [..., T, rotary_dim]."""
    rotary_dim = cos.shape[-1]
    rotated, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    turned = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, passed), dim=-1)


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of the open segments, [B, heads, capacity + 1, K]; `step` fills them in place.

    Masked tokens go to the extra slot at the end. Every slot is written before it is read, so slots are never cleared.
    """

    keys: Tensor
    values: Tensor


class RotarySoftmax:
    """Causal softmax(q kᵀ / √K) v within a segment, with rotary positions that start at 0 in each segment.

    Args:
        num_heads: number of attention heads.
        head_size: K.
        rotary_pct: fraction of each head's dimensions that are rotated.
        rotary_emb_base: base of the rotary wavelengths.

    Raises:
        ValueError: the number of rotated dimensions is odd.
    """

    def __init__(self, num_heads: int, head_size: int, rotary_pct: float, rotary_emb_base: float) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.rotary_dim = int(head_size * rotary_pct)
        if self.rotary_dim % 2:
            raise ValueError(
                f"rotary_pct: {rotary_pct} of a head of width {head_size} rotates {self.rotary_dim} dimensions; "
                "the number must be even"
            )
        self.rotary_emb_base = rotary_emb_base

    def rotate(self, x: Tensor, positions: Tensor, shared: dict[Any, Any], name: str = "") -> Tensor:
        """Rotate queries or keys [B, heads, T, K] by their positions, [T] or [B, 1, T].

        Angles are cached in `shared` under `name`, so that layers with the same settings compute them once.
        """
        if not self.rotary_dim:
            return x
        settings = (self.rotary_dim, self.rotary_emb_base, x.dtype)
        if (name, *settings) not in shared:
            shared[name, *settings] = compute_rotary_angles(positions, *settings)
        return apply_rotary(x, *shared[name, *settings])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend within whole segments; q, k and v are [B, heads, S, K], not yet rotated."""
        if self.rotary_dim:
            settings = self.rotary_dim, float(self.rotary_emb_base), q.dtype
            table = make_rotary_table if torch.compiler.is_compiling() else _keep_rotary_table
            cos, sin = table(q.shape[2], *settings, q.device).unbind()
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        return causal_attention(q, k, v)

    def attend_step(
        self, q: Tensor, k: Tensor, v: Tensor, opened: KeyValueCache | None, step: Step
    ) -> tuple[Tensor, KeyValueCache]:
        """Add new tokens to the cache and let them attend to it; q, k and v are [B, heads, T, K], not yet rotated."""
        dtype, positions = v.dtype, step.positions.unsqueeze(1)
        q, k = self.rotate(q, positions, step.shared), self.rotate(k, positions, step.shared)
        if q.device.type == "cpu" and q.dtype.itemsize < 4:  # 16-bit attention to few tokens is slow on a CPU
            q, k, v = q.float(), k.float(), v.float()
        cache = self.grow_cache(opened, k, step)
        self.put(cache, k, v, step)
        keys, values = cache.keys[:, :, : step.longest], cache.values[:, :, : step.longest]
        mask = None
        if step.start is None or q.shape[2] > 1:  # otherwise the only new token attends to everything
            if "seen" not in step.shared:
                seen = torch.arange(step.longest, device=q.device)[None, None, None, :]
                step.shared["seen"] = seen <= step.positions[:, None, :, None]
            mask = step.shared["seen"]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).to(dtype), cache

    def put(self, cache: KeyValueCache, k: Tensor, v: Tensor, step: Step) -> None:
        """Write the new tokens' keys and values into the cache, in place."""
        if step.start is not None:
            cache.keys[:, :, step.start : step.longest] = k
            cache.values[:, :, step.start : step.longest] = v
            return
        slots = step.positions[:, None, :, None]
        if step.valid is not None:  # masked tokens go to the extra slot at the end, which is never read
            slots = torch.where(step.valid[:, None, :, None], slots, cache.keys.shape[2] - 1)
        index = slots.expand(-1, k.shape[1], -1, k.shape[3])
        cache.keys.scatter_(2, index, k)
        cache.values.scatter_(2, index, v)

    def grow_cache(self, opened: KeyValueCache | None, like: Tensor, step: Step) -> KeyValueCache:
        """The cache in the dtype of `like`, with room for the longest row; capacity doubles, up to one segment."""
        capacity = 0 if opened is None else opened.keys.shape[2] - 1
        if opened is not None and capacity >= step.longest and opened.keys.dtype == like.dtype:
            return opened
        new_capacity = capacity
        if capacity < step.longest:
            new_capacity = min(step.segment_length, max(step.longest, 2 * capacity))
        shape = (len(step.offsets), self.num_heads, new_capacity + 1, self.head_size)
        keys, values = (like.new_zeros(shape) for _ in range(2))
        if opened is not None:
            keys[:, :, :capacity] = opened.keys[:, :, :capacity]
            values[:, :, :capacity] = opened.values[:, :, :capacity]
        return KeyValueCache(keys, values)


class SoftmaxAttention(RotarySoftmax, Attention):
    """GPT-NeoX's attention, within the segment."""

    def __init__(self, hidden_size: int, num_heads: int, rotary_pct: float, rotary_emb_base: float) -> None:
        nn.Module.__init__(self)
        head_size = check_divides("num_heads", num_heads, hidden_size)
        RotarySoftmax.__init__(self, num_heads, head_size, rotary_pct, rotary_emb_base)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor, memory: Any, segments: Segments) -> tuple[Tensor, LayerMemory | None]:
        """See `Layer.forward`. Padding needs no mask: it is on the right, where causal attention never looks."""
        mixed = self.query_key_value(hidden.flatten(0, 1))
        if can_split_heads(mixed):
            settings = self.rotary_dim, float(self.rotary_emb_base), torch.float32
            angles = _keep_rotary_table(mixed.shape[1], *settings, mixed.device)
            attended = attend_heads(mixed, self.num_heads, angles)
        else:
            attended = self.attend(*self.split(mixed)).transpose(1, 2)
        return self.dense(attended.reshape(hidden.shape)), memory

    def step(self, hidden: Tensor, opened: Any, memory: Any, step: Step) -> tuple[Tensor, Any]:
        """See `Layer.step`."""
        mixed, cache = self.attend_step(*self.split(self.query_key_value(hidden)), opened, step)
        return self.dense(mixed.transpose(1, 2).reshape(hidden.shape)), cache

    def end_segments(self, opened: Any, memory: Any, ended: Tensor) -> tuple[Any, Any]:
        """See `Layer.end_segments`; nothing to do, since the next segment overwrites slots before it reads them."""
        return opened, memory

    def split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the projection [B, T, 3 D] into unrotated queries, keys and values, [B, heads, T, K] each."""
        heads = mixed.unflatten(-1, (self.num_heads, 3 * self.head_size))
        q, k, v = heads.transpose(1, 2).chunk(3, dim=-1)
        return q, k, v


@register_layer("pythia")
class PythiaLayer(Block):
    """GPT-NeoX's layer: with the same weights it gives the same output as Hugging Face's `GPTNeoXLayer`."""

    can_step_in_place = True

    def enter(self, hidden: Tensor) -> Tensor:
        """See `AttentionLayer.enter`."""
        return normalize(self.input_layernorm, hidden)

    def make_attention(self, options: Any, *sizes: Any) -> SoftmaxAttention:
        """See `Block.make_attention`."""
        return SoftmaxAttention(*sizes)
