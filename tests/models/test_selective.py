"""Selective output: several passes through the layers, causal, exact in every cut, the plain model with none."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model_cases import VOCAB_SIZE, build_selective, text_ids
from new_llm.models import TransformerLM, create_model
from new_llm.models.layers import ReadTokens, Segments
from new_llm.testing import check_model
from tiny import make_shape

CONFIG = make_shape(vocab_size=VOCAB_SIZE, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)
SEGMENT = 7
by_stack = pytest.mark.parametrize("stack", ["pythia", "infini-rule-banks", "mixed", "infini-tokens"])


def make_plain(model_type: str, **options: Any) -> TransformerLM:
    torch.manual_seed(3)
    return create_model(model_type, CONFIG, segment_length=SEGMENT, **options)


@by_stack
@pytest.mark.parametrize(("skip_interval", "add_embedding"), [(1, False), (2, False), (2, True)])
def test_passes_are_the_layers_again_segment_by_segment(stack, skip_interval, add_embedding):
    """Against a loop over segments and passes that is written out here; the last pass alone writes."""
    model, ids = build_selective(stack, skip_interval, SEGMENT, add_embedding=add_embedding), text_ids(2, 3 * SEGMENT)
    memories: list[Any] = [None] * len(model.layers)
    expected: list[Tensor] = []
    for begin in range(0, ids.shape[1], SEGMENT):
        part = ids[:, begin : begin + SEGMENT]
        hidden = model.embed_in(part)[:, None]
        segments = Segments(tokens=ReadTokens(part[:, None], model.embed_out.weight))
        for number in range(skip_interval + 1):
            if number:
                assert model.pass_projection is not None
                hidden = model.pass_projection(hidden) + add_embedding * model.embed_in(part)[:, None]
            after = []
            for layer, memory in zip(model.layer_list, memories, strict=True):
                if layer.kind == "token_memory":
                    hidden = model.final_layer_norm(hidden)
                hidden, written = layer(hidden, memory, segments)
                after.append(written)
        memories = after
        is_normed = model.layer_list[-1].kind == "token_memory"
        expected.append(model.embed_out(hidden if is_normed else model.final_layer_norm(hidden))[:, 0])
    torch.testing.assert_close(model(ids), torch.cat(expected, 1), atol=1e-10, rtol=1e-10)


@by_stack
@pytest.mark.parametrize(("skip_interval", "add_embedding"), [(1, True), (2, False)])
def test_every_pass_keeps_the_contract(stack, skip_interval, add_embedding):
    check_model(build_selective(stack, skip_interval, SEGMENT, add_embedding=add_embedding))


def test_the_published_form_begins_with_what_the_pass_before_ended_with():
    model, ids = make_plain("selective", recipe="published", skip_interval=2), text_ids(1, 5)
    assert model.pass_projection is not None
    assert torch.equal(model.pass_projection.weight, torch.eye(32))
    hidden = model.embed_in(ids)
    assert torch.equal(model.begin_pass(hidden, hidden), 2 * hidden)
    assert model.earlier_pass_weight == 1.0


@pytest.mark.parametrize(("stack", "weight"), [("mixed", 0.5), ("tokens", 1.0)])
def test_training_weighs_the_loss_after_every_pass(stack, weight):
    model, ids = build_selective(stack, 2, SEGMENT, earlier_pass_weight=weight), text_ids(2, 18)
    targets = model.find_targets(ids, ids)
    losses = [model.score_passes([hidden], targets) for hidden in model.compute_passes(ids)]
    assert torch.equal(losses[-1], model.token_losses(ids, ids))
    first = model.token_losses(ids[:, :SEGMENT], ids[:, :SEGMENT], use_selective=False)
    torch.testing.assert_close(losses[0][:, : SEGMENT - 1], first[:, :-1], atol=1e-10, rtol=1e-10)
    powers = [weight**2, weight, 1.0]
    expected = sum(power * loss for power, loss in zip(powers, losses, strict=True)) / sum(powers)
    torch.testing.assert_close(model.train().token_losses(ids, ids), expected)


def test_without_extra_passes_it_is_the_plain_model_and_deep_pythia_has_as_many_layers_as_run():
    deep, selective = make_plain("deep_pythia", skip_interval=2), make_plain("selective", skip_interval=2)
    assert len(deep.layers) == len(selective.layers) * selective.count_passes()
    plain, without, ids = make_plain("pythia"), make_plain("selective", skip_interval=0), text_ids(2, 20)
    assert plain.num_parameters() == without.num_parameters()
    assert torch.equal(plain(ids), without(ids))
