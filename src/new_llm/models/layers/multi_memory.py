"""The multi-memory layer: independent memories, written in turn, selected token by token."""

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from new_llm.config.model import Size
from new_llm.config.sections import section, short
from new_llm.models.layers.compressive import EPSILON, CompressiveAttention, CompressiveLayer, MemoryOptions
from new_llm.models.layers.registry import register_layer
from new_llm.models.ops import read_memories, select_memories, weigh_memories
from new_llm.models.state import MemoryState


@section
class MultiMemoryOptions(MemoryOptions):
    """The options of a multi-memory or hierarchical layer."""

    num_memories: Annotated[Size, short("--num-memories")] = 4
    """Independent memories, written in turn."""
    selection_temperature: Annotated[float, Field(gt=0)] = 1.0
    """τ, which divides the scores: near 0 a token reads one memory, far above 1 all memories equally."""


class MultiMemoryAttention(CompressiveAttention):
    """A_mem = Σ_m w_m σ(q) M_m / max(σ(q) z_m, ε), w = softmax over the filled ones of σ(q)·(z_m / n_m) / (τ √K)."""

    options_type: ClassVar[type[MemoryOptions]] = MultiMemoryOptions

    def __init__(self, hidden_size: int, num_memory_heads: int, options: Any) -> None:
        super().__init__(
            hidden_size, num_memory_heads, options, num_memories=options.num_memories, segments_per_memory=1
        )
        self.selection_temperature = options.selection_temperature

    def read(self, q: Tensor, memory: MemoryState) -> Tensor:
        """[B, H, S, K] to [B, H, S, V]."""
        weights = select_memories(q, memory.norms, memory.num_tokens, temperature=self.selection_temperature)
        return read_memories(q, memory.memories, memory.norms, epsilon=EPSILON, weights=weights)

    def weigh(self, products: Tensor, num_tokens: Tensor) -> Tensor:
        """The selection of each token, [B, n, H, S, N]."""
        return weigh_memories(products, num_tokens, width=self.head_size, temperature=self.selection_temperature)


@register_layer("multi_memory", options=MultiMemoryOptions)
class MultiMemoryLayer(CompressiveLayer):
    """Independent memories, written in turn, one segment each; a read selects among them by attention to their z.

    Selection has no parameters, and each token's weights depend only on the past.

    Arguments are those of `CompressiveLayer`; the memory has `num_heads` heads by default.
    """

    index_key: ClassVar[str] = "current_memory_idx"
    attention_type: ClassVar[type[CompressiveAttention]] = MultiMemoryAttention
