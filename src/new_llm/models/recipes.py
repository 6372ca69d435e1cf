"""Named recipes: options that a study found to work better than the defaults, or that a mechanism's authors use.

`create_model("infini", recipe="tuned")` and `--recipe tuned` use them; options given explicitly override them.
"""

from typing import Any

_TUNED_MEMORY: dict[str, Any] = {
    # In the last layer a read reaches the head directly. The figures are in docs/experiments/memory.md, "All tables".
    "memory_layers": (-1,),
    # Gates start open, at 0.88, where training takes them.
    "gate_init": 2.0,
    # A query finds what followed similar contexts.
    "use_key_shift": True,
    # Few features of a token are large and W_k starts as W_q, so that only similar tokens match ("plain-start").
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
    # Each mechanism as its authors have it, where the default is the specification's form.
    "published": {
        "infini": {"local_attention": "softmax"},  # arXiv:2404.07143
        "multi_memory": {"router": "top1"},  # arXiv:2502.13685
        "hierarchical": {"hierarchy": "fenwick"},  # arXiv:2506.04761
        # arXiv:2604.21106: the map between passes begins as the identity, and each pass sees the tokens and has a loss.
        "selective": {"projection_init": "identity", "add_embedding": True, "earlier_pass_weight": 1.0},
    },
}
"""Options by recipe and model type; model types that a recipe does not name keep their defaults."""
