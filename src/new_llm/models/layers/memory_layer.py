"""What layers with memory share: an associative memory's sizes and facts, key shift, short convolution and decay."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from new_llm.models.layers.base import Attention, AttentionLayer
from new_llm.models.state import MemoryFacts, MemoryState
from new_llm.processes import gather_tensor


class MemoryAttention(Attention):
    """An attention with N memories of H heads, each a matrix [K, V], and a gate β for each head.

    Attributes:
        head_size: K.
        value_size: V.
        decay: the fixed decay w of each head at each write; None: 1.
    """

    gate: nn.Parameter
    dense: nn.Linear
    num_memories: int
    num_memory_heads: int
    head_size: int
    value_size: int
    segments_per_memory: int
    use_delta_rule: bool
    decay: Sequence[float] | None = None
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

    @property
    def forgets(self) -> bool:
        """Whether memories fade."""
        return self.decay is not None

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
