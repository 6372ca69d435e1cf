"""`model.save` and `load_model`: the same model, bit for bit, or one clear line."""

import copy
import functools

import pytest
import torch
from safetensors.torch import load_file, save_file

from disk_faults import edit_json, flip, tear
from model_cases import STACKS, build_model, get_model, text_ids
from new_llm.config import TrainConfig, UserError
from new_llm.models import TransformerLM, load_model, save_model
from new_llm.models.layers import PythiaLayer
from new_llm.processes import ALONE
from new_llm.training.preparation import make_optimizer, shard_weights
from tiny import make_model, refused


def test_saving_again_replaces_the_model_by_equal_bytes(tmp_path):
    for seed in (0, 1):
        save_model(build_model(STACKS["mixed"], seed=seed), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    assert torch.equal(load_model(tmp_path).embed_in.weight, build_model(STACKS["mixed"], seed=1).embed_in.weight)
    save_model(build_model(STACKS["mixed"], seed=1), tmp_path / "again")
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()

    class OwnLayer(PythiaLayer):
        kind = "own"

    with pytest.raises(ValueError, match=r"layer 0: OwnLayer is not registered"):  # it could not be loaded
        save_model(TransformerLM([OwnLayer(16, 2, 24)], vocab_size=128), tmp_path / "model")
    assert not (tmp_path / "model").exists()


edit = functools.partial(edit_json, "model.json")


def edit_weights(keep):
    def change(folder) -> None:
        kept = {name: keep(name, t) for name, t in load_file(folder / "model.safetensors").items()}
        save_file({name: t for name, t in kept.items() if t is not None}, folder / "model.safetensors")

    return change


BROKEN = {
    "model.json is missing": lambda folder: (folder / "model.json").unlink(),
    "model.safetensors is missing": lambda folder: (folder / "model.safetensors").unlink(),
    "not valid JSON": lambda folder: (folder / "model.json").write_text("{"),
    "format_version: input should be 1": edit(format_version=9),
    "unknown layer kind 'mamba'.*hierarchical": edit(layers=[{"kind": "mamba"}]),
    "unknown key 'width'": edit(layer={"width": 3}),
    "vocab_size is 64, but embed_in.weight": edit(vocab_size=64),
    "vocab_size: input should be a valid integer": edit(vocab_size=8.5),
    "layer_norm_eps: input should be greater than 0": edit(layer={"layer_norm_eps": -1.0}),
    "use_delta_rule: input should be a valid bool": edit(layer={"use_delta_rule": "no"}),
    "unknown key 'colour'": edit(colour="red"),
    "has dtype I32; weights are floats": edit_weights(lambda name, t: t.to(torch.int32)),
    r"do not fit.*layers\.0\.attention\.gate": edit_weights(lambda name, t: None if "0.attention.gate" in name else t),
    "corrupted": lambda folder: flip(folder / "model.safetensors"),
    "truncated": lambda folder: tear(folder / "model.safetensors"),
    "not a safetensors file but a pickle": lambda folder: torch.save({}, folder / "model.safetensors"),
}


@pytest.mark.parametrize(("message", "spoil"), BROKEN.items(), ids=BROKEN)
def test_a_broken_folder_is_refused_with_one_line(message, spoil, tmp_path):
    save_model(get_model("mixed"), tmp_path)
    spoil(tmp_path)
    with refused(message) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


# Tied embeddings: one parameter for embedding and head, saved once, and untied where a format needs two


IDS = text_ids(2, 20)
make_tied = functools.partial(make_model, segment_length=8, tied=True)


@pytest.mark.parametrize("kind", ["pythia", "infini", "selective", "token_memory"])
def test_the_head_is_the_embedding_through_training(kind):
    model = make_tied(kind)
    parts = model.num_parameters()
    assert parts["lm_head"] == 0
    assert parts["total"] == parts["embedding"] + parts["transformer"] == sum(p.numel() for p in model.parameters())
    optimizer = make_optimizer(model, TrainConfig(learning_rate=0.1))
    before = model.embed_in.weight.detach().clone()
    model.compute_loss(IDS, IDS)[0].backward()
    optimizer.step()
    assert model.embed_out.weight is model.embed_in.weight
    assert (model.embed_in.weight != before).any()
    torch.testing.assert_close(model(IDS), model.compute_hidden(IDS) @ model.embed_in.weight.t())
    with pytest.raises(UserError, match=r"fsdp: tied embeddings.*ddp"):
        shard_weights(model, model, torch.device("cpu"), "fp32", ALONE)


@pytest.mark.parametrize("kind", ["pythia", "selective", "token_memory"])
def test_saved_copied_or_loaded_it_stays_tied_until_it_is_untied(kind, tmp_path):
    model = make_tied(kind).eval()
    assert "embed_out.weight" not in model.state_dict()
    save_model(model, tmp_path)
    others = [load_model(tmp_path).eval(), copy.deepcopy(model)]
    for assign in (False, True):
        others.append(make_tied(kind))
        torch.nn.init.zeros_(others[-1].embed_in.weight)
        others[-1].load_state_dict(model.state_dict(), assign=assign)
    for other in others:
        assert other.embed_out.weight is other.embed_in.weight
        assert torch.equal(other(IDS), model(IDS))
    logits = model(IDS)
    model.untie_embeddings()
    assert model.embed_out.weight is not model.embed_in.weight
    assert "embed_out.weight" in model.state_dict()
    assert torch.equal(model(IDS), logits)
