"""Pythia models against Hugging Face's GPTNeoXForCausalLM with the same random weights."""

from typing import Any

import pytest
import torch
from neox_folders import SHAPE, disk_weights, make_neox
from transformers import GPTNeoXForCausalLM

from model_cases import assert_near, text_ids
from new_llm.config import PythiaConfig
from new_llm.models import TransformerLM, create_model

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-7}
HALF: dict[str, Any] = {
    "hidden_size": 48, "num_attention_heads": 3, "rotary_pct": 0.5, "rotary_emb_base": 10_000, "layer_norm_eps": 1e-3,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "quarter-rotary": {"rotary_pct": 0.25},
    "half-rotary": HALF,
    "full-rotary": {"num_attention_heads": 2, "rotary_pct": 1.0},
    "one-head-one-layer": {"hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1},
}


def our_name(name: str) -> str:
    """Our name of a weight; the head's depends on the version of transformers."""
    return name.removeprefix("gpt_neox.").replace("lm_head", "embed_out")


def make_pair(dtype: torch.dtype, **shape: Any) -> tuple[TransformerLM, GPTNeoXForCausalLM]:
    """Hugging Face's model with random weights, biases and norms, and ours with the same."""
    theirs = make_neox(**shape)
    ours = create_model("pythia", PythiaConfig(**{**SHAPE, "rotary_pct": 0.5, "rotary_emb_base": 500, **shape}))
    ours.load_state_dict({our_name(name): value for name, value in disk_weights(theirs).items()})
    return ours.to(dtype).eval(), theirs.to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_equal_hugging_face(shape, dtype):
    ours, theirs = make_pair(dtype, **shape)
    for batch, length in ((1, 1), (2, 7), (3, 33), (1, 64)):
        ids = text_ids(batch, length)
        with torch.no_grad():
            assert_near(ours(ids), theirs(ids).logits, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_segments_equal_separate_calls_of_hugging_face(dtype):
    """The baseline of an experiment: positions restart and nothing is seen across a segment's end."""
    ours, theirs = make_pair(dtype, rotary_pct=0.25)
    ours.segment_length = 12
    ids = text_ids(2, 29)
    with torch.no_grad():
        expected = torch.cat([theirs(piece).logits for piece in ids.split(12, dim=1)], dim=1)
        assert_near(ours(ids), expected, TOLERANCES[dtype])


def test_gradients_equal_hugging_face():
    ours, theirs = make_pair(torch.float64, **HALF)
    ids = text_ids(2, 21)
    loss, statistics = ours.compute_loss(ids, ids)
    their_loss = theirs(ids, labels=ids).loss
    torch.testing.assert_close(loss, their_loss.double(), atol=1e-6, rtol=1e-6)  # theirs is a float32 loss
    assert statistics.num_tokens == 2 * 20
    expected = torch.autograd.grad(theirs(ids).logits.square().mean(), list(theirs.parameters()))
    names = [our_name(name) for name, _ in theirs.named_parameters()]
    parameters = dict(ours.named_parameters())
    assert names
    assert parameters.keys() == set(names)
    actual = torch.autograd.grad(ours(ids).square().mean(), [parameters[name] for name in names])
    for one, other in zip(actual, expected, strict=True):
        assert_near(one, other, 1e-7)
