"""A head that is the embedding itself: GPT-NeoX's `tie_word_embeddings`."""

from typing import Any

from torch import nn

HEAD_WEIGHT = "embed_out.weight"
EMBEDDING_WEIGHT = "embed_in.weight"


def tie_embeddings(model: nn.Module) -> None:
    """Make the head's weight the embedding's, one parameter; a state dict then holds it once, as the embedding.

    Source: Using the Output Embedding to Improve Language Models, arXiv:1608.05859.

    Args:
        model: has `embed_in`, `embed_out` of one shape, and `tie_word_embeddings`, by which it can be untied later.
    """
    embedding: Any = model.embed_in
    head: Any = model.embed_out
    head.weight = embedding.weight
    model.register_state_dict_post_hook(_leave_out_head)
    model.register_load_state_dict_pre_hook(_add_head)


def _leave_out_head(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    if module.tie_word_embeddings:
        state.pop(prefix + HEAD_WEIGHT, None)


def _add_head(module: Any, state: dict[str, Any], prefix: str, *others: Any) -> None:
    embedding = state.get(prefix + EMBEDDING_WEIGHT)
    if module.tie_word_embeddings and embedding is not None:
        state.setdefault(prefix + HEAD_WEIGHT, embedding)
