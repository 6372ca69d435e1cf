"""Pure functions of compressive memory; each fast form has a naive form beside it, written from the equation."""

from new_llm.models.ops.linear_attention import (
    feature_map,
    local_linear_attention,
    local_linear_attention_naive,
)
from new_llm.models.ops.memory import (
    add_outer_products,
    read_memories,
    read_memories_naive,
    select_memories,
    select_memories_naive,
    sum_outer_products,
    write_memory,
    write_memory_naive,
)

__all__ = [
    "add_outer_products",
    "feature_map",
    "local_linear_attention",
    "local_linear_attention_naive",
    "read_memories",
    "read_memories_naive",
    "select_memories",
    "select_memories_naive",
    "sum_outer_products",
    "write_memory",
    "write_memory_naive",
]
