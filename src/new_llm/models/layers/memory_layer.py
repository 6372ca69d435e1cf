"""A layer with compressive memory: the description of what it holds."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from new_llm.models.layers.base import Layer
from new_llm.models.layers.memory_attention import MemoryAttention
from new_llm.models.state import MemoryFacts, MemoryState
from new_llm.processes import gather_tensor


class MemoryLayer(Layer):
    """A layer around `MemoryAttention`: what it adds is the description of its memory."""

    attention: MemoryAttention
    key_prefix: ClassVar[str] = ""
    """What stands before `memories` in the keys of the layer's state."""
    index_key: ClassVar[str]
    """The key of the memory that is written next."""

    def empty_memory(self, rows: int, like: Tensor) -> MemoryState:
        """Empty memories for `rows` rows, on the device of `like` and in its dtype, float32 at least."""
        return self.attention.empty_memory(rows, like)

    @property
    def memory_bytes(self) -> int:
        """Bytes of one memory (M and z of all N) in the layer's precision, float32 at least."""
        attention = self.attention
        dtype = torch.promote_types(attention.gate.dtype, torch.float32)
        numbers = attention.num_memory_heads * attention.head_size * (attention.value_size + 1)
        return attention.num_memories * numbers * dtype.itemsize

    @property
    def memory_facts(self) -> MemoryFacts:
        """What the layer's memory dictionary says beside its tensors."""
        attention = self.attention
        return MemoryFacts(
            layer_kind=self.kind,
            key_prefix=self.key_prefix,
            index_key=self.index_key,
            use_delta_rule=attention.use_delta_rule,
            additive=not attention.use_delta_rule and attention.decay is None,
            segments_per_memory=attention.segments_per_memory,
        )

    def gate_parameters(self) -> list[nn.Parameter]:
        """Parameters that train at the gates' learning rate, without decay."""
        return self.attention.gate_parameters()

    def gate_values(self) -> list[float]:
        """g = sigmoid(β) of each head."""
        return torch.sigmoid(gather_tensor(self.attention.gate.detach()).float()).tolist()


def describe_memory_options(layer: Any) -> dict[str, Any]:
    """Settings of a memory layer that a memory file records."""
    attention = layer.attention
    return {
        "num_memories": attention.num_memories,
        "num_memory_heads": attention.num_memory_heads,
        "head_size": attention.head_size,
        "value_size": attention.value_size,
        "segments_per_memory": attention.segments_per_memory,
        "use_delta_rule": attention.use_delta_rule,
        "decay": None if attention.decay is None else list(attention.decay),
    }
