"""The code blocks of the specification's section 1, as they stand there, on small shapes and a short text."""

import dataclasses
from typing import Any

import pytest
import torch

from new_llm import create_model
from new_llm.config import PythiaConfig, UserError
from new_llm.models import SelectiveOutputLM, save_model
from new_llm.models.factory import MODEL_KINDS, RECIPES
from new_llm.models.layers import InfiniLayer
from tiny import make_shape

SMALL = make_shape(num_attention_heads=4, initializer_range=0.2)


def test_models_by_name():
    with torch.device("meta"):  # the shapes of pythia-70m, without their memory
        model = create_model("pythia")
        assert [layer.kind for layer in model.layer_list] == ["pythia"] * 6
        assert model.num_parameters()["total"] == 70_426_624
        model = create_model("infini")
        assert [layer.kind for layer in model.layer_list] == ["infini", *["pythia"] * 5]
        model = create_model("multi_memory", num_memories=8)
        model = create_model("hierarchical", num_memories=4, use_delta_rule=False)
        assert sum(p.numel() for p in model.layers[0].attention.expansion_gate.parameters()) == 65_793
        model = create_model("infini", num_memory_banks=2, segments_per_bank=4)
        model = create_model("infini", PythiaConfig(), use_alibi=True, alibi_scale=1.0)
        model = create_model("selective", skip_interval=1)
        assert model.segment_length == 2048
        assert isinstance(model, SelectiveOutputLM)
        assert create_model("infini", size="14m").layers[0].hidden_size == 128


@pytest.mark.parametrize("use_selective", [True, False])
def test_selective_models_with_and_without_their_extra_passes(use_selective):
    torch.manual_seed(0)
    model = create_model("selective", SMALL, skip_interval=2, segment_length=8)
    plain = create_model("pythia", SMALL, segment_length=8)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("pass_projection")})
    ids = torch.arange(12).view(1, 12)
    loss, statistics = model.compute_loss(ids, ids, use_selective=use_selective)
    assert torch.equal(loss, plain.compute_loss(ids, ids)[0]) != use_selective
    found, made = model.generate(ids, max_new_tokens=50, use_selective=use_selective)
    assert torch.equal(found, plain.generate(ids, max_new_tokens=50)[0]) != use_selective
    assert statistics.passes == made.passes == (3 if use_selective else 1)


def test_one_set_of_defaults_and_named_recipes():
    torch.manual_seed(0)
    by_name = create_model("infini", SMALL)
    by_layer = InfiniLayer(32, 4, 64)
    assert by_name.layers[0].settings == by_layer.settings
    for kind, options in RECIPES["tuned"].items():
        assert set(options) <= set(MODEL_KINDS[kind].defaults)
        tuned = create_model(kind, SMALL, recipe="tuned")
        assert list(tuned.memory_layers) == [2 if kind == "token_memory" else 1]


HEADS: dict[str, Any] = {
    "quantized": lambda head: torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(head), {"0"})[0],
    "hooked": lambda head: head.register_forward_hook(lambda *call: 0.5 * call[-1]) and head,
    "parametrized": lambda head: torch.nn.utils.parametrizations.spectral_norm(head),
    "wrapped": lambda head: torch.nn.Sequential(head, torch.nn.Identity()),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("tied", [False, True])
def test_whatever_the_head_is_a_token_memory_reads_its_rows(kind, tied, tmp_path):
    """The hidden states are those of a plain head with the rows that the changed one has."""
    torch.manual_seed(0)
    shape = dataclasses.replace(SMALL, tie_word_embeddings=tied)
    model = create_model("token_memory", shape, segment_length=4).eval()
    model.embed_out = HEADS[kind](model.embed_out)
    plain = create_model("token_memory", SMALL, segment_length=4).eval()
    ids = torch.arange(13).view(1, 13)
    with torch.no_grad():
        rows = model.embed_out(torch.eye(32)).t()
        plain.load_state_dict({**model.state_dict(), "embed_out.weight": rows}, strict=False)
        hidden = plain.compute_hidden(ids)  # the head's input, which a read of its rows is part of
        torch.testing.assert_close(model.compute_hidden(ids), hidden, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.open_stream(1).feed_hidden(ids), hidden, atol=1e-4, rtol=1e-4)
    if kind != "hooked":
        with pytest.raises(UserError, match=r"embed_out is a .*; a model file holds its weight alone"):
            save_model(model, tmp_path)
