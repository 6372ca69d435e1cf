"""Parts that the memory layers share: base classes, the write schedule, token-wise writes, short convolution, decay.

Legend: B rows, S tokens per segment, H memory heads, K key width, N memories or banks, w segments written in a call.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from new_llm.models.layers.base import Attention, AttentionLayer
from new_llm.models.state import MemoryFacts, MemoryState, find_written_memory
from new_llm.processes import gather_tensor


class MemoryAttention(Attention):
    """An attention with N memories of H heads, each a matrix [K, V], and a gate β per head.

    Attributes:
        head_size: K.
        value_size: V.
        forgets: whether memories decay.
        read_loss_weight: weight of an auxiliary loss on what the memory returns; 0: none. In training this loss needs
            the token ids.
    """

    has_memory = True
    gate: nn.Parameter
    dense: nn.Linear
    num_memories: int
    num_memory_heads: int
    head_size: int
    value_size: int
    segments_per_memory: int
    use_delta_rule: bool
    forgets: bool = False
    read_loss_weight: float = 0.0

    def empty_memory(self, rows: int, like: Tensor) -> MemoryState:
        """See `Layer.empty_memory`."""
        shape = (rows, self.num_memories, self.num_memory_heads, self.head_size)
        dtype = torch.promote_types(like.dtype, torch.float32)
        counts = torch.zeros(rows, dtype=torch.int64, device=like.device)
        return MemoryState(
            memories=torch.zeros(*shape, self.value_size, dtype=dtype, device=like.device),
            norms=torch.zeros(shape, dtype=dtype, device=like.device),
            num_tokens=counts.new_zeros(shape[:2]),
            num_segments=counts,
            segments_seen=counts,
        )

    def gate_parameters(self) -> list[nn.Parameter]:
        """β."""
        return [self.gate]


class MemoryLayer(AttentionLayer):
    """A layer whose memory is that of its `attention`, a `MemoryAttention`."""

    has_memory = True
    attention: MemoryAttention
    key_prefix: ClassVar[str] = ""
    """Prefix of the keys `memories` and `memory_norms` in the layer's state dictionary."""
    index_key: ClassVar[str]
    """Key in the state dictionary for the index of the memory to be written next."""

    @property
    def reads_tokens(self) -> bool:
        """True before the head, and elsewhere in training with a `read_loss_weight`."""
        return self.stands_before_head or (self.training and self.attention.read_loss_weight > 0)

    @property
    def memory_facts(self) -> MemoryFacts:
        """See `Layer.memory_facts`."""
        attention = self.attention
        return MemoryFacts(
            layer_kind=self.kind,
            settings={
                "num_memories": attention.num_memories,
                "segments_per_memory": attention.segments_per_memory,
                "use_delta_rule": attention.use_delta_rule,
                "alibi_scale": float(self.settings["alibi_scale"]) if self.settings.get("use_alibi") else 0.0,
            },
            additive=not attention.use_delta_rule and not attention.forgets,
            keys={
                "memories": f"{self.key_prefix}memories",
                "norms": f"{self.key_prefix}memory_norms",
                "num_tokens": "token_counts",
                "num_segments": "segment_counter",
            },
            index_key=self.index_key,
        )

    def gate_values(self) -> list[float]:
        """g = sigmoid(β) for each head."""
        return torch.sigmoid(gather_tensor(self.attention.gate.detach()).float()).tolist()


# Which memory a segment is written to, and how each token is written


@dataclass(frozen=True)
class Schedule:
    """Where a call writes its first w segments.

    Attributes:
        slots: index of the memory that each segment is written to, [B, w] int64.
        chosen: the same as a mask, [B, w, N]; all False for a segment without tokens.
        num_tokens: number of tokens that each memory has seen before each segment, and after the last, [B, w + 1, N].
        num_segments: number of segments read after the last one, [B].
    """

    slots: Tensor
    chosen: Tensor
    num_tokens: Tensor
    num_segments: Tensor

    def pick_norms(self, norms: Tensor) -> Tensor:
        """z of the memory that each segment is written to: [B, w, N, H, K] to [B, w, H, K]."""
        if norms.shape[2] == 1:
            return norms[:, :, 0]
        return norms.gather(2, self.slots[:, :, None, None, None].expand(-1, -1, 1, *norms.shape[3:])).squeeze(2)

    def finish(self, before: MemoryState, memories: Tensor, norms: Tensor, every: Tensor | None) -> MemoryState:
        """The memory after all writes: `memories` is M, `norms` is z, `every` the second result of `spread_decay`."""
        return MemoryState(
            memories=memories,
            norms=norms,
            num_tokens=self.num_tokens[:, -1],
            num_segments=self.num_segments,
            segments_seen=before.segments_seen + self.num_segments - before.num_segments,
            retained=before.retained if every is None else before.share_left * every.detach().prod(1),
        )

    def spread_decay(self, decay: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Expand the decay, [H] or [B, w, 1, H], to every write; it is 1 where nothing is written.

        Returns:
            The decay of the memory written, [B, w, H], and of each memory, [B, w, N, H].
        """
        if decay is None:
            return None, None
        every = torch.where(self.chosen.unsqueeze(-1), decay, torch.ones_like(decay))
        is_written = self.chosen.any(2, keepdim=True).unsqueeze(-1)
        return torch.where(is_written, decay, torch.ones_like(decay)).squeeze(2), every


def plan_writes(memory: MemoryState, counts: Tensor, segments_per_memory: int) -> Schedule:
    """The schedule for writing segments with `counts` [B, w] tokens each, given the memory before them."""
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


class TokenRule(NamedTuple):
    """The write strength β and the decay α of each token, in the memory's precision.

    Attributes:
        beta: β, [..., H, S]; None: 1.
        log_decay: log α, [..., H, S], 0 at masked tokens; None: 0.
    """

    beta: Tensor | None
    log_decay: Tensor | None

    def write_keys(self, k: Tensor, *, solves: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys k' with which a segment is written at once: M ← f M + k'ᵀ (v − r), where the delta rule reads r from M.

        Let g_t be the sum of log α up to token t. By the segment's end, the write of token t has decayed by
        ω_t = e^{g_S − g_t}, so k'_t = ω_t β_t k_t. With `solves`, r is e^g k M, and a token's delta also sees what
        earlier tokens of the segment wrote: K'ᵀ = (ω K)ᵀ (I + A)⁻¹ diag(β), with A_ij = β_i e^{g_i − g_j} (k_i · k_j)
        for j < i; see `ops.gated_delta`.

        Args:
            k: features of the keys, [..., H, S, K]; zero at masked tokens.
            solves: whether the delta rule applies token by token, without normalisation.

        Returns:
            k', each token's contribution ω β k to z, e^g [..., H, S], and f = e^{g_S} [..., H].
        """
        total = torch.zeros_like(k[..., 0]) if self.log_decay is None else self.log_decay.cumsum(-1)
        left = (total[..., -1:] - total).exp().unsqueeze(-1) * k
        beta = torch.ones_like(k[..., :1]) if self.beta is None else self.beta.unsqueeze(-1)
        summed = written = beta * left
        if solves:
            later = torch.ones(k.shape[-2], k.shape[-2], dtype=torch.bool, device=k.device).triu(1)
            ratios = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
            coefficients = (beta * ratios * (k @ k.transpose(-1, -2))).tril(-1).transpose(-1, -2)
            written = beta * torch.linalg.solve_triangular(coefficients, left, upper=True, unitriangular=True)
        return written, summed, total.exp(), total[..., -1].exp()


def shift_keys(k: Tensor, first: Tensor | None = None) -> Tensor:
    """Replace each token's key by the previous token's, so that each token is stored under the one it followed.

    A query then finds what followed similar tokens, with a single layer. This is the shift of H3 (arXiv:2212.14052,
    section 3), applied to keys.

    Args:
        k: features of the keys, [..., S, K].
        first: key for the first token, [..., K]; None: 0, so that it is not written.
    """
    before = torch.zeros_like(k[..., :1, :]) if first is None else first.unsqueeze(-2).to(k.dtype)
    return torch.cat((before, k[..., :-1, :]), dim=-2)


def pick_last_key(k: Tensor, last_key: Tensor, valid: Tensor | None) -> Tensor:
    """The key of each row's last real token, [B, H, K].

    Args:
        k: unshifted keys of the new tokens, [B, H, T, K].
        last_key: the result for rows without a new real token, [B, H, K].
        valid: padding mask, [B, T], real tokens first; None: no padding.
    """
    if valid is None:
        return k[:, :, -1]
    every = torch.cat((last_key.unsqueeze(2).to(k.dtype), k), dim=2)
    return every[torch.arange(len(k), device=k.device), :, valid.sum(-1)]


class ShortConvolution(nn.Module):
    """A causal depthwise convolution without bias: y_t = Σ_i w_i ⊙ x_{t−i}, i = 0 … size − 1.

    Source: H3, arXiv:2212.14052, section 3; short kernels as in Mamba, arXiv:2312.00752, and Gated DeltaNet.

    Args:
        channels: width C of x.
        size: kernel size: the number of tokens that each output sees, including its own.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.zeros(channels, size))

    @torch.no_grad()
    def initialize_features(self) -> None:
        """Draw the weights from uniform(−1/√size, 1/√size)."""
        nn.init.uniform_(self.weight, -1, 1).div_(math.sqrt(self.size))

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """y [B, T, C] of the next tokens.

        Args:
            x: [B, T, C].
            before: inputs of the size − 1 tokens before x, [B, size − 1, C]; zeros at the start of a text.
        """
        inputs = torch.cat((before.to(x.dtype), x), dim=1)
        # a 2d convolution, because channels are last in memory and torch convolves such images without a copy
        y = F.conv2d(inputs.transpose(1, 2).unsqueeze(2), self.weight[:, None, None].to(x.dtype), groups=x.shape[2])
        return y.squeeze(2).transpose(1, 2)

    def keep(self, x: Tensor, before: Tensor, counts: Tensor) -> Tensor:
        """The last size − 1 inputs after `counts` [B] tokens of x, [B, size − 1, C], in the dtype of `before`."""
        places = (counts.unsqueeze(1) + torch.arange(1 - self.size, 0, device=counts.device)).unsqueeze(-1)
        old = (places + self.size - 1).clamp(max=self.size - 2).expand(-1, -1, x.shape[2])
        new = places.clamp(min=0).expand(-1, -1, x.shape[2])
        return torch.where(places < 0, before.gather(1, old), x.gather(1, new).to(before.dtype))


class TokenDecay(nn.Module):
    """log α = −exp(A) softplus(W x + b), one number per token and head.

    Source: Mamba-2, arXiv:2405.21060, section 7, and Gated DeltaNet, arXiv:2412.06464, section 3.4.

    Args:
        hidden_size: width D of x.
        num_heads: H.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, num_heads, bias=False)
        self.rate = nn.Parameter(torch.zeros(num_heads))
        self.bias = nn.Parameter(torch.zeros(num_heads))

    @torch.no_grad()
    def initialize_features(self) -> None:
        """Draw A and b so that heads decay at different rates: exp(A) in 1 … 16, softplus(b) in 0.001 … 0.1."""
        nn.init.uniform_(self.rate, 1, 16).log_()
        steps = nn.init.uniform_(self.bias, math.log(0.001), math.log(0.1)).exp()
        self.bias.copy_(steps.expm1().log())  # the inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        """log α, [..., H], at least float32, from x [..., D]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return -self.rate.to(wide).exp() * F.softplus(self.linear(x).to(wide) + self.bias)
