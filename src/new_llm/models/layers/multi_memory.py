"""The multi-memory layer: independent memories, written in turn, selected token by token."""

from typing import Any, ClassVar

from torch import Tensor

from new_llm.config import MemoryConfig, PythiaConfig
from new_llm.models.layers.base import register_layer
from new_llm.models.layers.compressive import CompressiveAttention
from new_llm.models.layers.memory_layer import MemoryLayer
from new_llm.models.ops import read_memories, select_memories, weigh_memories
from new_llm.models.state import MemoryState


class MultiMemoryAttention(CompressiveAttention):
    """A_mem = Σ_m w_m σ(q) M_m / max(σ(q) z_m, ε), w = softmax over the filled ones of σ(q)·(z_m / n_m) / (τ √K)."""

    def __init__(
        self,
        hidden_size: int,
        num_memory_heads: int,
        *,
        selection_temperature: float = MemoryConfig.selection_temperature,
        **options: Any,
    ) -> None:
        if not selection_temperature > 0:
            raise ValueError(f"selection_temperature: {selection_temperature} is not positive")
        super().__init__(hidden_size, num_memory_heads, **options)
        self.selection_temperature = selection_temperature

    def read(self, q: Tensor, memory: MemoryState) -> Tensor:
        """[B, H, S, K] to [B, H, S, V]."""
        weights = select_memories(q, memory.norms, memory.num_tokens, temperature=self.selection_temperature)
        return read_memories(q, memory.memories, memory.norms, epsilon=self.epsilon, weights=weights)

    def weigh(self, products: Tensor, num_tokens: Tensor) -> Tensor:
        """The selection of each token, [B, n, H, S, N]."""
        return weigh_memories(products, num_tokens, width=self.head_size, temperature=self.selection_temperature)


@register_layer
class MultiMemoryLayer(MemoryLayer):
    """Several independent memories, a segment each in turn; a read selects among them by attention to their z.

    Selection has no parameters, and each token's weights look at the past alone.

    Args:
        hidden_size: D.
        num_heads: heads of the model's softmax layers.
        intermediate_size: width of the MLP.
        num_memories: memories M.
        selection_temperature: τ, by which the scores of the memories are divided.
        num_memory_heads: H; None: `num_heads`.
        use_delta_rule: write v − r in place of v.
        use_key_shift: file each value under the key of the token before it in the segment.
        normalize_keys: divide each key's features by their sum.
        gate_init: initial β; g = sigmoid(β) is the share of memory in the output.
        query_key_init_scale: W_q and W_k begin so many times as large as other weights.
        query_key_init_bias: the initial bias of q and k; below 0 few features of a token are large.
        match_query_key_init: W_k begins as W_q, so that alike tokens find one another.
        memory_epsilon: ε, the least divisor of a read.
        layer_norm_eps: ε of the LayerNorms.

    Raises:
        ValueError: heads that do not divide the hidden size, or a count that is not positive.
    """

    kind: ClassVar[str] = "multi_memory"
    index_key: ClassVar[str] = "current_memory_idx"
    attention_type: ClassVar[type[MultiMemoryAttention]] = MultiMemoryAttention

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        num_memories: int = MemoryConfig.num_memories,
        selection_temperature: float = MemoryConfig.selection_temperature,
        num_memory_heads: int | None = None,
        use_delta_rule: bool = MemoryConfig.use_delta_rule,
        use_key_shift: bool = MemoryConfig.use_key_shift,
        normalize_keys: bool = MemoryConfig.normalize_keys,
        gate_init: float = MemoryConfig.gate_init,
        query_key_init_scale: float = MemoryConfig.query_key_init_scale,
        query_key_init_bias: float = MemoryConfig.query_key_init_bias,
        match_query_key_init: bool = MemoryConfig.match_query_key_init,
        memory_epsilon: float = MemoryConfig.memory_epsilon,
        layer_norm_eps: float = PythiaConfig.layer_norm_eps,
    ) -> None:
        attention = self.attention_type(
            hidden_size,
            num_heads if num_memory_heads is None else num_memory_heads,
            num_memories=num_memories,
            selection_temperature=selection_temperature,
            segments_per_memory=1,
            use_delta_rule=use_delta_rule,
            use_key_shift=use_key_shift,
            normalize_keys=normalize_keys,
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
