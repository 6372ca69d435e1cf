"""The Infini layer: banks of one compressive memory, written in turn, mixed by weights learned per head."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from new_llm.config import MemoryConfig, PythiaConfig
from new_llm.models.layers.base import check_divides, register_layer
from new_llm.models.layers.compressive import CompressiveAttention
from new_llm.models.layers.memory_layer import MemoryLayer
from new_llm.models.ops import read_memories
from new_llm.models.state import MemoryState


class InfiniAttention(CompressiveAttention):
    """A_mem = Σ_b softmax_b(bank weights) σ(q) M_b / max(σ(q) z_b, ε); one bank has no weights."""

    def __init__(
        self,
        hidden_size: int,
        num_memory_heads: int | None,
        *,
        num_memory_banks: int,
        segments_per_bank: int,
        use_delta_rule: bool,
        use_alibi: bool,
        alibi_scale: float,
        gate_init: float,
        epsilon: float,
        **options: Any,
    ) -> None:
        if alibi_scale < 0:
            raise ValueError(f"alibi_scale: {alibi_scale} is negative")
        num_memory_heads = 1 if num_memory_heads is None else num_memory_heads
        check_divides("num_memory_heads", num_memory_heads, hidden_size)
        slopes = compute_alibi_slopes(num_memory_heads)
        decay = [math.exp(-slope * alibi_scale) for slope in slopes] if use_alibi else None
        super().__init__(
            hidden_size,
            num_memory_heads,
            num_memories=num_memory_banks,
            segments_per_memory=segments_per_bank,
            use_delta_rule=use_delta_rule,
            gate_init=gate_init,
            epsilon=epsilon,
            decay=decay,
            **options,
        )
        self.bank_weights = None
        if num_memory_banks > 1:
            self.bank_weights = nn.Parameter(torch.zeros(num_memory_heads, num_memory_banks))

    def gate_parameters(self) -> list[nn.Parameter]:
        """β and the bank weights."""
        return [self.gate] if self.bank_weights is None else [self.gate, self.bank_weights]

    def read(self, q: Tensor, memory: MemoryState) -> Tensor:
        """[B, H, S, K] to [B, H, S, V]; all banks are mixed, an empty one adds 0."""
        weights = None
        if self.bank_weights is not None:
            weights = self.bank_weights.to(memory.norms.dtype).softmax(-1).t()[None, :, :, None]
        return read_memories(q, memory.memories, memory.norms, epsilon=self.epsilon, weights=weights)

    def weigh(self, products: Tensor, num_tokens: Tensor) -> Tensor | None:
        """The bank weights, [H, 1, N]: the same for every token."""
        return None if self.bank_weights is None else self.bank_weights.to(products.dtype).softmax(-1).unsqueeze(1)


@register_layer
class InfiniLayer(MemoryLayer):
    """Infini-attention (arXiv:2404.07143) with linear attention in place of the local softmax; no positions.

    M ← w M + Σ σ(k)ᵀ(v − r) at each segment's end, A_mem = σ(q) M / max(σ(q) z, ε) before it.

    Args:
        hidden_size: D.
        num_heads: heads of the model's softmax layers; the memory has `num_memory_heads`.
        intermediate_size: width of the MLP.
        num_memory_heads: H; one head is as wide as the model.
        num_memory_banks: banks, written in turn.
        segments_per_bank: segments written into one bank before the next.
        use_delta_rule: write v − r in place of v.
        use_key_shift: file each value under the key of the token before it in the segment.
        normalize_keys: divide each key's features by their sum.
        use_alibi: decay the memory at each write by w = exp(−slope · alibi_scale) a head.
        alibi_scale: scale of the decay.
        gate_init: initial β; g = sigmoid(β) is the share of memory in the output.
        query_key_init_scale: W_q and W_k begin so many times as large as other weights.
        query_key_init_bias: the initial bias of q and k; below 0 few features of a token are large.
        match_query_key_init: W_k begins as W_q, so that alike tokens find one another.
        memory_epsilon: ε, the least divisor of a read.
        layer_norm_eps: ε of the LayerNorms.

    Raises:
        ValueError: heads that do not divide the hidden size, or a count that is not positive.
    """

    kind: ClassVar[str] = "infini"
    index_key: ClassVar[str] = "current_bank"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        num_memory_heads: int | None = None,
        num_memory_banks: int = MemoryConfig.num_memory_banks,
        segments_per_bank: int = MemoryConfig.segments_per_bank,
        use_delta_rule: bool = MemoryConfig.use_delta_rule,
        use_key_shift: bool = MemoryConfig.use_key_shift,
        normalize_keys: bool = MemoryConfig.normalize_keys,
        use_alibi: bool = MemoryConfig.use_alibi,
        alibi_scale: float = MemoryConfig.alibi_scale,
        gate_init: float = MemoryConfig.gate_init,
        query_key_init_scale: float = MemoryConfig.query_key_init_scale,
        query_key_init_bias: float = MemoryConfig.query_key_init_bias,
        match_query_key_init: bool = MemoryConfig.match_query_key_init,
        memory_epsilon: float = MemoryConfig.memory_epsilon,
        layer_norm_eps: float = PythiaConfig.layer_norm_eps,
    ) -> None:
        attention = InfiniAttention(
            hidden_size,
            num_memory_heads,
            num_memory_banks=num_memory_banks,
            segments_per_bank=segments_per_bank,
            use_delta_rule=use_delta_rule,
            use_key_shift=use_key_shift,
            normalize_keys=normalize_keys,
            use_alibi=use_alibi,
            alibi_scale=alibi_scale,
            gate_init=gate_init,
            query_key_init_scale=query_key_init_scale,
            query_key_init_bias=query_key_init_bias,
            match_query_key_init=match_query_key_init,
            epsilon=memory_epsilon,
        )
        super().__init__(
            attention,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            layer_norm_eps=layer_norm_eps,
        )
        self.num_heads = num_heads


def compute_alibi_slopes(num_heads: int) -> list[float]:
    """Slopes 2^(−8i/H), i = 1 … H; for H no power of 2 as ALiBi interleaves them.

    Source: ALiBi, arXiv:2108.12409, section 3 and its published code for other numbers of heads.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    if power < num_heads:
        slopes += [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * power + 1, 2)][: num_heads - power]
    return slopes
