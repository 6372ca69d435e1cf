"""Tied embeddings: one parameter for embedding and head, saved once, and untied where a format needs two."""

import copy

import pytest
import torch

from new_llm.config import TrainConfig, UserError
from new_llm.models import TransformerLM, create_model, load_model, save_model
from new_llm.processes import ALONE
from new_llm.training.preparation import make_optimizer, shard_weights
from tiny import make_shape

SHAPE = make_shape(vocab_size=40, hidden_size=16, intermediate_size=32, tie_word_embeddings=True)


def make(kind: str = "infini") -> TransformerLM:
    torch.manual_seed(0)
    return create_model(kind, SHAPE, segment_length=8).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["pythia", "infini", "selective", "token_memory"])
def test_the_head_is_the_embedding_through_training(kind, ids):
    model = make(kind).train()
    parts = model.num_parameters()
    assert parts["lm_head"] == 0
    assert parts["total"] == parts["embedding"] + parts["transformer"] == sum(p.numel() for p in model.parameters())
    optimizer = make_optimizer(model, TrainConfig(learning_rate=0.1))
    before = model.embed_in.weight.detach().clone()
    model.compute_loss(ids, ids)[0].backward()
    optimizer.step()
    assert model.embed_out.weight is model.embed_in.weight
    assert (model.embed_in.weight != before).any()
    torch.testing.assert_close(model(ids), model.compute_hidden(ids) @ model.embed_in.weight.t())
    with pytest.raises(UserError, match=r"fsdp: tied embeddings.*ddp"):
        shard_weights(model, model, torch.device("cpu"), "fp32", ALONE)


@pytest.mark.parametrize("kind", ["pythia", "selective", "token_memory"])
def test_saved_copied_or_loaded_it_stays_tied_until_it_is_untied(kind, ids, tmp_path):
    model = make(kind)
    assert "embed_out.weight" not in model.state_dict()
    save_model(model, tmp_path)
    others = [load_model(tmp_path).eval(), copy.deepcopy(model)]
    for assign in (False, True):
        others.append(make(kind))
        torch.nn.init.zeros_(others[-1].embed_in.weight)
        others[-1].load_state_dict(model.state_dict(), assign=assign)
    for other in others:
        assert other.embed_out.weight is other.embed_in.weight
        assert torch.equal(other(ids), model(ids))
    logits = model(ids)
    model.untie_embeddings()
    assert model.embed_out.weight is not model.embed_in.weight
    assert "embed_out.weight" in model.state_dict()
    assert torch.equal(model(ids), logits)
