"""Named recipes: options that a study found to work better than the defaults, for those who ask for them by name.

`create_model("infini", recipe="tuned")` and `--recipe tuned` take them; options that are given override them.
"""

from typing import Any

_TUNED_MEMORY: dict[str, Any] = {
    # In the last layer what is read comes straight to the head: docs/experiments/memory.md, "where the memory is".
    "memory_layers": (-1,),
    # Gates begin open, at 0.88: that is where training takes them ("gates" there).
    "gate_init": 2.0,
    # A query for a context finds what followed its like ("what is written, and how it is found").
    "use_key_shift": True,
    # Few features of a token are large and W_k begins as W_q, so that only similar tokens meet ("plain-start").
    "query_key_init_scale": 6.0,
    "query_key_init_bias": -3.0,
    "match_query_key_init": True,
}

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "tuned": {
        "infini": _TUNED_MEMORY,
        "multi_memory": _TUNED_MEMORY,
        "hierarchical": _TUNED_MEMORY,
        # studies/token-ablations.yaml: its "plain-start" loses.
        "token_memory": {"query_key_init_scale": 6.0},
    },
}
"""Options by recipe and model type; a model type that a recipe does not name keeps its defaults."""
