"""The parallel adapter on a model: equal to its base with α = 0, learning, and its memory."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from new_llm import TransformerLM, create_model
from new_llm.config import TrainConfig, UserError
from new_llm.evaluation.doctor.memory_checks import check_gates
from new_llm.models import save_model
from new_llm.models.hf.infini_adapter import add_parallel_infini, create_pythia_with_parallel_infini, split_weights
from new_llm.models.layers.parallel_infini import AdapterConfig
from new_llm.training.preparation import group_parameters
from tiny import make_shape

SHAPE = make_shape(vocab_size=128, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.2)
PIECES = (3, 1, 1, 16, 9)


def make_base(dtype: torch.dtype = torch.float32) -> TransformerLM:
    torch.manual_seed(0)
    return create_model("pythia", SHAPE, segment_length=8).to(dtype).eval()


def make_adapted(dtype: torch.dtype = torch.float32, **options) -> TransformerLM:
    base = make_base(dtype)
    torch.manual_seed(1)
    return add_parallel_infini(base, AdapterConfig(**options))


@pytest.fixture
def ids() -> Tensor:
    text = b"The Constitution requires that the President shall give to the Congress information."
    return torch.tensor([list(text[:30]), list(text[30:60])])


def read_in_pieces(model: TransformerLM, ids: Tensor) -> Tensor:
    stream = model.open_stream(ids.shape[0])
    return torch.cat([stream.feed(piece) for piece in ids.split(PIECES, dim=1)], dim=1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": (0, 2), "num_memory_heads": 4, "num_memory_banks": 2},
        {"layers": (1,), "use_alibi": True, "use_delta_rule": False},
        {"initial_alpha": 1.0, "zero_init_dense": True},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_at_first_the_adapted_model_is_its_base_bit_for_bit(options, dtype, ids):
    base, model = make_base(dtype), make_adapted(dtype, **options)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :5] = False
    for _ in range(2):  # the second time from a memory that is filled
        assert torch.equal(model(ids, update_memory=True), base(ids))
        assert torch.equal(model(ids, mask)[mask], base(ids, mask)[mask])
        assert torch.equal(read_in_pieces(model, ids), read_in_pieces(base, ids))
    assert model.get_memory_state()[options.get("layers", (0,))[0]]["token_counts"].sum() == 2 * ids.numel()
    chosen, _ = model.generate(ids, max_new_tokens=12)
    expected, _ = base.generate(ids, max_new_tokens=12)
    assert torch.equal(chosen, expected)


def test_with_alpha_the_memory_carries_what_segments_before_said(ids):
    model = make_adapted(initial_alpha=0.7)
    assert not torch.allclose(model(ids), make_base()(ids), atol=1e-2)
    changed = ids.clone()
    changed[:, 0] += 1
    apart = (model(ids) - model(changed)).abs().amax(dim=(0, 2))
    assert float(apart[8:].detach().min()) > 1e-6  # memory is the only path to the segments after the first
    assert float((make_base()(ids) - make_base()(changed)).abs()[:, 8:].max()) == 0


def test_alpha_of_one_layer_is_a_number_and_of_several_a_dictionary(ids):
    assert make_adapted(initial_alpha=0.25).get_alpha() == 0.25
    several = make_adapted(initial_alpha=-0.5, layers=(2, 0))
    assert several.get_alpha() == {0: -0.5, 2: -0.5}
    assert several.alpha_values()[2] == -0.5
    assert set(several.gate_values()) == {"layers.0", "layers.2"}
    with pytest.raises(ValueError, match="no parallel adapter"):
        make_base().get_alpha()


def test_the_doctor_names_adapters_whose_alpha_is_0():
    model = make_adapted(layers=(0, 2), gate_init=-0.5)
    torch.nn.init.constant_(model.layers[0].get_parameter("alpha"), 0.3)
    found = check_gates(SimpleNamespace(own_model=model))
    assert found.level == "warning"
    assert "α of layer 2 is 0" in found.found
    assert found.found.startswith("gates range from 0.378 to 0.378;")  # α is no gate


def test_alpha_trains_with_the_gates_and_the_base_not_at_all():
    model = make_adapted(layers=(0, 1), num_memory_banks=2)
    train = TrainConfig(gate_learning_rate=0.02)
    groups = {group["name"]: group for group in group_parameters(model, train)}
    gates = [parameter for index in (0, 1) for parameter in model.layers[index].gate_parameters()]
    assert {id(p) for p in groups["gates"]["params"]} == {id(p) for p in gates}
    assert len(gates) == 6
    assert groups["gates"]["lr"] == 0.02
    base, adapter = split_weights(model)
    assert sum(len(group["params"]) for group in groups.values()) == len(adapter)
    assert set(base) == set(make_base().state_dict())


def test_at_alpha_0_alpha_alone_has_a_gradient_and_with_a_zero_projection_the_projection_alone(ids):
    def find_moved(model: TransformerLM) -> set[str]:
        model.compute_loss(ids, ids)[0].backward()
        named = model.layers[0].named_parameters()
        return {name for name, p in named if p.grad is not None and bool(p.grad.abs().max() > 0)}

    assert find_moved(make_adapted()) == {"alpha"}
    assert find_moved(make_adapted(initial_alpha=1.0, zero_init_dense=True)) == {
        "attention.dense.weight",
        "attention.dense.bias",
    }


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_the_memory_begins_with_the_projections_of_its_base(heads, ids):
    layer = make_adapted(num_memory_heads=heads).layers[0]
    hidden = torch.randn(2, 5, 32)
    mine = layer.attention.query_key_value(layer.input_layernorm(hidden)).unflatten(-1, (heads, 3, -1))
    theirs = layer.base_layer.attention.query_key_value(layer.base_layer.input_layernorm(hidden))
    theirs = theirs.unflatten(-1, (4, 3, -1))
    for part in range(3):  # q, k, v of all heads together
        torch.testing.assert_close(mine[..., part, :].flatten(-2), theirs[..., part, :].flatten(-2))
    assert torch.equal(layer.attention.dense.weight, layer.base_layer.attention.dense.weight)
    drawn = make_adapted(init="random", num_memory_heads=heads).layers[0]
    assert not torch.equal(drawn.attention.dense.weight, drawn.base_layer.attention.dense.weight)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": (3,)}, "the base has layers 0 to 2"),
        ({"layers": (0, 0)}, "names a layer twice"),
        ({"layers": ()}, "layers"),
        ({"num_memory_heads": 5}, "does not divide"),
        ({"num_memory_banks": 0}, "num_memory_banks"),
        ({"initial_alpha": float("nan")}, "initial_alpha"),
        ({"num_memory": 3}, "num_memory"),
        ({"init": "zeros"}, "init"),
    ],
)
def test_bad_options_are_named(options, said, tmp_path):
    save_model(make_base(), tmp_path)
    with pytest.raises(ValueError, match=said):
        create_pythia_with_parallel_infini(tmp_path, **options)


def test_an_adapter_stands_beside_pythia_layers_alone():
    model = create_model("infini", SHAPE, segment_length=8)
    with pytest.raises(UserError, match=r"layer 0 is infini"):
        add_parallel_infini(model, AdapterConfig())
    with pytest.raises(UserError, match="has a parallel adapter already, at layers"):
        add_parallel_infini(make_adapted(), AdapterConfig())


def test_a_pythia_of_a_directory_gets_a_memory(tmp_path, ids):
    from new_llm.models.hf.gpt_neox import export_pythia

    base = make_base()
    save_model(base, tmp_path / "ours")
    export_pythia(base, tmp_path / "neox")
    for folder in ("ours", "neox"):
        model = create_pythia_with_parallel_infini(model_name=str(tmp_path / folder), layers=(0, 2), segment_length=4)
        assert model.segment_length == 4
        base.segment_length = 4
        assert torch.equal(model(ids), base(ids))
        assert not any(p.requires_grad for name, p in model.named_parameters() if name.startswith("embed"))
