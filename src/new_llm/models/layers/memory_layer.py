"""What layers with memory share: the memory's sizes and facts, where and how tokens are written, shifted keys, decay.

Legend: B rows, S tokens of a segment, H memory heads, K key width, N memories or banks, w written segments of a call.
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
    """An attention with N memories of H heads, each a matrix [K, V], and a gate β for each head.

    Attributes:
        head_size: K.
        value_size: V.
        forgets: whether memories fade.
        read_loss_weight: weight of a loss of what the memory returns; it reads tokens in training.
    """

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
        """As `Layer.empty_memory`."""
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
    """A layer whose memory belongs to one `MemoryAttention`, its `attention`."""

    has_memory = True
    attention: MemoryAttention
    key_prefix: ClassVar[str] = ""
    """Prefix of `memories` in the keys of the layer's state."""
    index_key: ClassVar[str]
    """The key of the index of the memory that is written next."""

    @property
    def reads_tokens(self) -> bool:
        """Before the head always; elsewhere in training, where what memory returns has a loss of its own."""
        return self.stands_before_head or (self.training and self.attention.read_loss_weight > 0)

    @property
    def memory_facts(self) -> MemoryFacts:
        """As `Layer.memory_facts`."""
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
        """g = sigmoid(β) of each head."""
        return torch.sigmoid(gather_tensor(self.attention.gate.detach()).float()).tolist()


# Which memory a segment is written to, and how each token is written


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

    def pick_norms(self, norms: Tensor) -> Tensor:
        """z of the memory that each segment is written to: [B, w, N, H, K] to [B, w, H, K]."""
        if norms.shape[2] == 1:
            return norms[:, :, 0]
        return norms.gather(2, self.slots[:, :, None, None, None].expand(-1, -1, 1, *norms.shape[3:])).squeeze(2)

    def finish(self, before: MemoryState, memories: Tensor, norms: Tensor, every: Tensor | None) -> MemoryState:
        """The memory after all writes, with these M and z and the decay of `spread_decay`."""
        return MemoryState(
            memories=memories,
            norms=norms,
            num_tokens=self.num_tokens[:, -1],
            num_segments=self.num_segments,
            segments_seen=before.segments_seen + self.num_segments - before.num_segments,
            retained=before.retained if every is None else before.share_left * every.detach().prod(1),
        )

    def spread_decay(self, decay: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The decay w of each head at each write, 1 where nothing is written; `decay` is [H], or [B, w, 1, H].

        Returns:
            The decay of the written memory, [B, w, H], and of all memories, [B, w, N, H].
        """
        if decay is None:
            return None, None
        every = torch.where(self.chosen.unsqueeze(-1), decay, torch.ones_like(decay))
        is_written = self.chosen.any(2, keepdim=True).unsqueeze(-1)
        return torch.where(is_written, decay, torch.ones_like(decay)).squeeze(2), every


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


class TokenRule(NamedTuple):
    """How strongly each token is written, and how much is left of what was there; both in the memory's precision.

    Attributes:
        beta: β, [..., H, S]; None: 1.
        log_decay: log α, [..., H, S], 0 at masked tokens; None: 0.
    """

    beta: Tensor | None
    log_decay: Tensor | None

    def write_keys(self, k: Tensor, *, solves: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys k' such that a segment's write is M ← f M + k'ᵀ (v − e k M), in the rule's precision.

        With g the sums of log α from the segment's start, a write of token t fades to ω_t = e^{g_S − g_t}, so that
        k'_t = ω_t β_t k_t. With `solves` each token also reads what the segment's earlier ones wrote, unnormalised:
        K'ᵀ = (ω K)ᵀ (I + A)⁻¹ diag(β), A_ij = β_i e^{g_i − g_j} (k_i · k_j) for j < i; see `ops.gated_delta`.

        Args:
            k: features of the keys, [..., H, S, K]; zero at masked tokens.
            solves: the delta rule holds token by token.

        Returns:
            k', what is added to z for each token (ω β k), e^g [..., H, S], and f = e^{g_S} [..., H].
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
    """Replace each token's key by the previous token's: each token is filed under the word that it followed.

    A query for a context then finds, in one layer, what followed similar contexts. It is the shift of H3
    (arXiv:2212.14052, section 3), applied to keys.

    Args:
        k: features of the keys, [..., S, K].
        first: the key of the first token, [..., K]; None: 0, so that it is not written.
    """
    before = torch.zeros_like(k[..., :1, :]) if first is None else first.unsqueeze(-2).to(k.dtype)
    return torch.cat((before, k[..., :-1, :]), dim=-2)


def pick_last_key(k: Tensor, last_key: Tensor, valid: Tensor | None) -> Tensor:
    """The features of the last real token's own key, [B, H, K].

    Args:
        k: keys of new tokens, [B, H, T, K], not shifted.
        last_key: the value kept by rows without a real token.
        valid: real tokens, [B, T], on the left; None: all.
    """
    if valid is None:
        return k[:, :, -1]
    every = torch.cat((last_key.unsqueeze(2).to(k.dtype), k), dim=2)
    return every[torch.arange(len(k), device=k.device), :, valid.sum(-1)]


class ShortConvolution(nn.Module):
    """y_t = Σ_i w_i ⊙ x_{t−i}, i = 0 … size − 1, a weight for each channel and distance, no bias.

    Source: H3, arXiv:2212.14052, section 3; of this size as in Mamba, arXiv:2312.00752, and Gated DeltaNet.

    Args:
        channels: width C of x.
        size: tokens that each output sees, its own included.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.zeros(channels, size))

    @torch.no_grad()
    def initialize_features(self) -> None:
        """Draw the weights, uniform in ±1/√size."""
        nn.init.uniform_(self.weight, -1, 1).div_(math.sqrt(self.size))

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """y of the next tokens x [B, T, C], and all inputs, those of `before` first.

        Args:
            x: [B, T, C].
            before: the inputs of the size − 1 tokens before them, [B, size − 1, C]; zeros where there are none.
        """
        inputs = torch.cat((before.to(x.dtype), x), dim=1)
        # channels are last in memory, and torch convolves such images without moving them
        y = F.conv2d(inputs.transpose(1, 2).unsqueeze(2), self.weight[:, None, None].to(x.dtype), groups=x.shape[2])
        return y.squeeze(2).transpose(1, 2), inputs

    def keep(self, inputs: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
        """The last size − 1 of all inputs after `counts` [B] new tokens, [B, size − 1, C]."""
        places = counts.unsqueeze(1) + torch.arange(self.size - 1, device=counts.device)
        return inputs.gather(1, places.unsqueeze(-1).expand(-1, -1, inputs.shape[2])).to(dtype)


class TokenDecay(nn.Module):
    """log α = −exp(A) softplus(W x + b), a number for each token and head.

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
        """Draw A and b so that heads fade at different rates: exp(A) in 1 … 16, softplus(b) in 0.001 … 0.1."""
        nn.init.uniform_(self.rate, 1, 16).log_()
        steps = nn.init.uniform_(self.bias, math.log(0.001), math.log(0.1)).exp()
        self.bias.copy_(steps.expm1().log())  # the inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., H], float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return -self.rate.to(wide).exp() * F.softplus(self.linear(x).to(wide) + self.bias)
