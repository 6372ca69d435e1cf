"""Pure functions. Each fast implementation has a naive twin beside it, written straight from the equation.

`memory`: reads and writes of one segment. `memory_scan`: the recurrence over the segments of a call. `delta_rule`: the
token-by-token delta rule, where a segment reads the memory from before it. `gated_delta`: the delta rule with decay,
where each token reads what earlier tokens wrote. `local_attention`: feature maps, and attention within a segment.
`head_loss`: the head fused with its loss. `kernels`: the compiled implementations.
"""

from new_llm.models.ops.delta_rule import scan_delta_rule, scan_delta_rule_naive, sum_reads, write_delta_rule
from new_llm.models.ops.gated_delta import convolve_heads, gate_heads, gated_delta_rule, gated_delta_rule_naive
from new_llm.models.ops.local_attention import (
    feature_map,
    local_linear_attention,
    local_linear_attention_naive,
    map_features,
    scale_to_length,
)
from new_llm.models.ops.memory import (
    add_outer_products,
    multiply_norms,
    read_memories,
    read_memories_naive,
    scan_sums,
    scan_sums_naive,
    sum_outer_products,
    weigh_memories,
    weigh_memories_naive,
    write_memory,
    write_memory_naive,
)
from new_llm.models.ops.memory_scan import ScannedReads, scan_memories, scan_memories_naive

__all__ = [
    "ScannedReads",
    "add_outer_products",
    "convolve_heads",
    "feature_map",
    "gate_heads",
    "gated_delta_rule",
    "gated_delta_rule_naive",
    "local_linear_attention",
    "local_linear_attention_naive",
    "map_features",
    "multiply_norms",
    "read_memories",
    "read_memories_naive",
    "scale_to_length",
    "scan_delta_rule",
    "scan_delta_rule_naive",
    "scan_memories",
    "scan_memories_naive",
    "scan_sums",
    "scan_sums_naive",
    "sum_outer_products",
    "sum_reads",
    "weigh_memories",
    "weigh_memories_naive",
    "write_delta_rule",
    "write_memory",
    "write_memory_naive",
]
