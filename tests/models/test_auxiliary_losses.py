"""What joins the loss in training alone: what memory returns must predict by itself, and a router use all memories."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model_cases import HIDDEN_SIZE, LayerCase, build_model, text_ids

LENGTH = 5


def find_extra_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.train().compute_loss(ids, ids)[0] - model.eval().compute_loss(ids, ids)[0]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("infini", {}),
        ("multi_memory", {"router": "top1", "balance_weight": 0.0}),
        ("hierarchical", {"hierarchy": "fenwick"}),
    ],
)
def test_what_memory_returns_predicts_the_next_token_alone(kind, options):
    """In all segments but the first, which finds an empty memory."""
    model, ids = build_model([LayerCase(kind, {"read_loss_weight": 0.3, **options})]), text_ids(2, 4 * LENGTH)
    reads: list[torch.Tensor] = []
    hook = model.layers[0].attention.dense.register_forward_hook(lambda _, __, output: reads.append(output))
    extra = find_extra_loss(model, ids)
    hook.remove()
    logits = F.layer_norm(reads[0], (HIDDEN_SIZE,)) @ model.embed_out.weight.t()
    losses = -logits.log_softmax(-1).flatten(1, 2)[:, LENGTH:-1].gather(-1, ids[:, LENGTH + 1 :, None])
    torch.testing.assert_close(extra, 0.3 * losses.mean())


def test_a_router_is_drawn_to_equal_shares():
    options = {"router": "top1", "num_memories": 3, "balance_weight": 0.2}
    model, ids = build_model([LayerCase("multi_memory", options)]), text_ids(2, 4 * LENGTH)
    scores: list[torch.Tensor] = []
    attention = model.layers[0].attention
    route = attention.route
    attention.route = lambda *arguments: scores.append(route(*arguments)) or scores[-1]
    extra = find_extra_loss(model, ids)
    sent = F.one_hot(scores[0].argmax(-1), 3).double().flatten(0, 2).mean(0)  # the keys' scores come first
    torch.testing.assert_close(extra, 0.2 * 3 * (sent * scores[0].softmax(-1).flatten(0, 2).mean(0)).sum())
    extra.backward()
    assert bool(attention.router.weight.grad.any())
