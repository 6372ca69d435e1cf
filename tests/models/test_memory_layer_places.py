"""`memory_layers`: which layers of a model have memory."""

import pytest

from new_llm import create_model
from new_llm.cli.main import main
from new_llm.config import PythiaConfig, UserError
from new_llm.experiments.config import ModelConfig

SHAPE = PythiaConfig(
    vocab_size=64, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32
)  # fmt: skip


@pytest.mark.parametrize("kind", ["infini", "multi_memory", "hierarchical"])
@pytest.mark.parametrize("places", [None, (3, 0), (-1, 0), (0, 1, 2, 3)])
def test_the_named_layers_have_memory_and_no_others(kind, places):
    model = create_model(kind, SHAPE, **({} if places is None else {"memory_layers": places}))
    places = {place % 4 for place in places or (0,)}  # by default it is the first
    assert [layer.kind for layer in model.layer_list] == [kind if i in places else "pythia" for i in range(4)]
    assert sorted(model.memory_layers) == sorted(places)
    assert [entry["layer"] for entry in model.memory_info()["per_layer"]] == sorted(places)


@pytest.mark.parametrize("places", [(4,), (1, -3), ()])
def test_other_places_are_refused_by_name(places):
    with pytest.raises(ValueError, match="memory_layers"):
        create_model("infini", SHAPE, memory_layers=places)
    with pytest.raises(UserError, match="memory_layers"):
        ModelConfig(num_hidden_layers=4, memory_layers=places).check_taken(["infini"])


def test_the_command_refuses_them_too(capsys):
    assert main(["experiment", "--models", "infini", "--memory-layers", "2", "9"]) == 2
    error = capsys.readouterr().err
    assert "memory_layers: [2, 9]: the layers are 0 to 5" in error
    assert error.count("\n") == 1


def test_the_tuned_recipe_is_the_same_from_python_and_in_an_experiment() -> None:
    config = ModelConfig(recipe="tuned", num_hidden_layers=4)
    assert config.options_of("infini")["memory_layers"] == (-1,)
    assert ModelConfig(recipe="tuned", memory_layers=(0, 1)).options_of("infini")["memory_layers"] == (0, 1)
    assert ModelConfig().options_of("infini")["memory_layers"] == (0,)
    for model in (
        create_model("infini", SHAPE, recipe="tuned"),
        create_model("infini", SHAPE, **config.options_of("infini")),
    ):
        assert list(model.memory_layers) == [SHAPE.num_hidden_layers - 1]
        assert model.layers[-1].attention.use_key_shift
