"""Pure functions of compressive memory; each fast form has a naive form beside it, written from the equation."""

from new_llm.models.ops.delta_rule import read_memory, scan_delta_rule, scan_delta_rule_naive, solve_writes
from new_llm.models.ops.linear_attention import (
    feature_map,
    local_linear_attention,
    local_linear_attention_naive,
)
from new_llm.models.ops.memory import (
    add_outer_products,
    multiply_norms,
    read_memories,
    read_memories_naive,
    select_memories,
    select_memories_naive,
    sum_outer_products,
    weigh_memories,
    write_memory,
    write_memory_naive,
)
from new_llm.models.ops.memory_scan import ScannedReads, scan_memories, scan_memories_naive
from new_llm.models.ops.scan import scan_sums, scan_sums_naive

__all__ = [
    "ScannedReads",
    "add_outer_products",
    "feature_map",
    "local_linear_attention",
    "local_linear_attention_naive",
    "multiply_norms",
    "read_memories",
    "read_memories_naive",
    "read_memory",
    "scan_delta_rule",
    "scan_delta_rule_naive",
    "scan_memories",
    "scan_memories_naive",
    "scan_sums",
    "scan_sums_naive",
    "select_memories",
    "select_memories_naive",
    "solve_writes",
    "sum_outer_products",
    "weigh_memories",
    "write_memory",
    "write_memory_naive",
]
