"""The parallel adapter: equal to its base with α = 0, its memory, and its file, of which nothing is believed."""

from types import SimpleNamespace

import pytest
import torch

from disk_faults import edit_tensors
from model_cases import text_ids
from new_llm import TransformerLM, create_model
from new_llm.config import TrainConfig, UserError
from new_llm.evaluation.doctor.model_checks import check_gates
from new_llm.models import save_model
from new_llm.models.hf import export_pythia, infini_adapter
from new_llm.models.layers.infini import AdapterConfig
from new_llm.models.tensor_files import fingerprint_weights
from new_llm.training.preparation import group_parameters
from tiny import make_shape, refused

SHAPE = make_shape(vocab_size=128, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.2)
IDS = text_ids(2, 30)


def make_base(dtype: torch.dtype = torch.float32, seed: int = 0) -> TransformerLM:
    torch.manual_seed(seed)
    return create_model("pythia", SHAPE, segment_length=8).to(dtype).eval()


def make_adapted(dtype: torch.dtype = torch.float32, base_name: str | None = None, **options) -> TransformerLM:
    base = make_base(dtype)
    torch.manual_seed(1)
    return infini_adapter.add_parallel_infini(base, AdapterConfig(**options), base_name=base_name)


def read_in_pieces(model: TransformerLM, ids):
    stream = model.open_stream(ids.shape[0])
    return torch.cat([stream.feed(piece) for piece in ids.split((3, 1, 1, 16, 9), dim=1)], dim=1)


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
def test_at_first_the_adapted_model_is_its_base_bit_for_bit(options, dtype):
    base, model = make_base(dtype), make_adapted(dtype, **options)
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[0, :5] = False
    for _ in range(2):  # the second time from a memory that is filled
        assert torch.equal(model(IDS, update_memory=True), base(IDS))
        assert torch.equal(model(IDS, mask)[mask], base(IDS, mask)[mask])
        assert torch.equal(read_in_pieces(model, IDS), read_in_pieces(base, IDS))
    assert model.get_memory_state()[options.get("layers", (0,))[0]]["token_counts"].sum() == 2 * IDS.numel()


def test_alpha_of_one_layer_is_a_number_and_of_several_a_dictionary():
    assert make_adapted(initial_alpha=0.25).get_alpha() == 0.25
    several = make_adapted(initial_alpha=-0.5, layers=(2, 0))
    assert several.get_alpha() == several.alpha_values() == {0: -0.5, 2: -0.5}
    assert set(several.gate_values()) == {"layers.0", "layers.2"}
    torch.nn.init.zeros_(several.layers[2].get_parameter("alpha"))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    exam = SimpleNamespace(
        own_model=several, tokens=ids[0], take_rows=lambda *_: ids, read=several, probing=torch.no_grad
    )
    assert "α of layer 2 is 0" in check_gates(exam).found  # by the doctor
    with pytest.raises(ValueError, match="no parallel adapter"):
        make_base().get_alpha()


def test_alpha_trains_with_the_gates_and_the_base_not_at_all():
    """At α = 0 α alone has a gradient, and with a zero projection the projection alone."""
    model = make_adapted(layers=(0, 1), num_memory_banks=2)
    train = TrainConfig(gate_learning_rate=0.02)
    groups = {group["name"]: group for group in group_parameters(model, train)}
    parts = [part for layer in model.layers[:2] for part in (layer, layer.attention)]
    gates = [parameter for part in parts for parameter in part.gate_parameters()]
    assert {id(p) for p in groups["gates"]["params"]} == {id(p) for p in gates}
    assert len(gates) == 6
    assert groups["gates"]["lr"] == 0.02
    base, adapter = infini_adapter.split_weights(model)
    assert sum(len(group["params"]) for group in groups.values()) == len(adapter)
    assert set(base) == set(make_base().state_dict())

    def find_moved(model: TransformerLM) -> set[str]:
        model.compute_loss(IDS, IDS)[0].backward()
        named = model.layers[0].named_parameters()
        return {name for name, p in named if p.grad is not None and bool(p.grad.abs().max() > 0)}

    assert find_moved(make_adapted()) == {"alpha"}
    assert find_moved(make_adapted(initial_alpha=1.0, zero_init_dense=True)) == {
        "attention.dense.weight",
        "attention.dense.bias",
    }


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_the_memory_begins_with_the_projections_of_its_base(heads):
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


def test_what_can_not_be_adapted_is_named():
    for options, said in (
        ({"layers": (3,)}, "the base has layers 0 to 2"),
        ({"layers": (0, 0)}, "names a layer twice"),
        ({"num_memory_heads": 5}, "does not divide"),
        ({"num_memory": 3}, "num_memory"),
    ):
        with pytest.raises(ValueError, match=said):
            make_adapted(**options)
    with pytest.raises(UserError, match=r"layer 0 is infini"):
        infini_adapter.add_parallel_infini(create_model("infini", SHAPE, segment_length=8), AdapterConfig())
    with pytest.raises(UserError, match="already has a parallel adapter, at layers"):
        infini_adapter.add_parallel_infini(make_adapted(), AdapterConfig())


def test_a_pythia_of_a_directory_gets_a_memory(tmp_path):
    base = make_base()
    save_model(base, tmp_path / "ours")
    export_pythia(base, tmp_path / "neox")
    base.segment_length = 4
    for folder in ("ours", "neox"):
        model = infini_adapter.create_pythia_with_parallel_infini(
            model_name=str(tmp_path / folder), layers=(0, 2), segment_length=4
        )
        assert model.segment_length == 4
        with pytest.raises(ValueError, match="segment_length: -4"):
            infini_adapter.load_base(tmp_path / folder, segment_length=-4)
        assert torch.equal(model(IDS), base(IDS))
        assert not any(p.requires_grad for name, p in model.named_parameters() if name.startswith("embed"))


# An adapter's file: written and read alone, and nothing is believed of it

FORMATS = ("adapter.pt", "adapter.safetensors")


def make_two(**options) -> TransformerLM:
    return make_adapted(**({"initial_alpha": 0.5, "layers": (0, 2)} | options))


@pytest.mark.parametrize("name", FORMATS)
def test_an_adapter_comes_back_on_its_base(tmp_path, name):
    save_model(make_base(), tmp_path / "base")
    model = make_two(num_memory_banks=2, use_alibi=True, base_name=str(tmp_path / "base"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.segment_length = 4
    infini_adapter.save_adapter(model, tmp_path / name)
    again = infini_adapter.load_adapted_model(tmp_path / name)
    assert again.segment_length == 4
    assert torch.equal(again(IDS), model(IDS))
    assert again.get_alpha() == model.get_alpha()
    weights = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert (tmp_path / name).stat().st_size < weights + 20_000
    (tmp_path / "base").rename(tmp_path / "moved")
    assert torch.equal(infini_adapter.load_adapted_model(tmp_path / name, tmp_path / "moved")(IDS), model(IDS))
    infini_adapter.save_adapter(make_two(), tmp_path / name)
    with pytest.raises(UserError, match="does not say which base"):
        infini_adapter.load_adapted_model(tmp_path / name)


def test_an_adapter_of_other_weights_needs_force(tmp_path):
    infini_adapter.save_adapter(make_two(base_name="runs/base"), tmp_path / "a.pt")
    stranger = make_base(seed=5)
    before = fingerprint_weights(stranger)
    with refused(r"trained on another base \(runs/base, fingerprint"):
        infini_adapter.attach_adapter(stranger, tmp_path / "a.pt")
    assert fingerprint_weights(stranger) == before
    assert infini_adapter.attach_adapter(stranger, tmp_path / "a.pt", force=True).get_alpha() == {0: 0.5, 2: 0.5}


BROKEN = {
    "NaN or infinite": edit_tensors(tensors={"0.alpha": float("nan")}),
    "has shape": edit_tensors(tensors={"0.attention.gate": torch.zeros(3)}),
    "missing or unknown tensors": edit_tensors(tensors={"2.alpha": None}),
    "not a tensor of floats": edit_tensors(tensors={"0.attention.gate": torch.zeros(1, dtype=torch.int64)}),
    "not a parallel adapter file": edit_tensors(format="new-llm-memory"),
    "format version 99; this program reads 1": edit_tensors(format_version="99"),
    "broken metadata": edit_tensors(layers="[" * 100_000),
    "num_memory_banks": edit_tensors({"num_memory_banks": 10**12}),
    "does not fit this base": edit_tensors({"num_memory_heads": 7}),
    "use_delta_rule": edit_tensors({"use_delta_rule": "yes"}),
    "has layers 0 to 2": edit_tensors(layers='{"7": {}}'),
    "corrupted": edit_tensors(tensors={"0.alpha": 0.75}, digest=False),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("said", "change"), BROKEN.items(), ids=BROKEN)
def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path, name, said, change):
    infini_adapter.save_adapter(make_two(), tmp_path / name)
    change(tmp_path / name)
    model = make_base()
    before = fingerprint_weights(model)
    with refused(said) as caught:
        infini_adapter.attach_adapter(model, tmp_path / name)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 500
    assert fingerprint_weights(model) == before
