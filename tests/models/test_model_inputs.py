"""Bad input: a ValueError of one line that names what is allowed."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from model_cases import VOCAB_SIZE, get_model, text_ids
from new_llm.config import PythiaConfig, UserError
from new_llm.experiments.config import ModelConfig
from new_llm.models import ModelType, TransformerLM, create_model
from new_llm.models.factory import MODEL_KINDS
from new_llm.models.layers import HierarchicalLayer, InfiniLayer, MultiMemoryLayer, PythiaLayer, TokenMemoryLayer
from tiny import make_shape

CONFIG = make_shape(vocab_size=VOCAB_SIZE, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)
IDS = text_ids(2, 6)


def refuse(call: Callable[[], Any], *words: str) -> None:
    """The call raises a ValueError of one line that holds every word."""
    with pytest.raises(ValueError, match=r".") as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# create_model

TABLE: dict[str, list[str]] = {  # DESIGN's: an option and the models that take it
    "use_delta_rule": ["infini", "multi_memory", "hierarchical", "token_memory"],
    "num_memories": ["multi_memory", "hierarchical"],
    "num_memory_banks": ["infini"],
    "segments_per_bank": ["infini"],
    "use_alibi": ["infini"],
    "alibi_scale": ["infini"],
    "num_memory_heads": ["infini", "multi_memory", "hierarchical", "token_memory"],
}
BAD_VALUES: dict[str, Any] = {
    "selection_temperature": float("nan"),
    "num_memories": 1.5,
    "num_memory_banks": 0,
    "alibi_scale": -0.5,
    "memory_key_size": -1,
    "retention_init": 1.0,
    "skip_interval": -1,
    "earlier_pass_weight": 1.5,
}


@pytest.mark.parametrize("model_type", ModelType)
def test_each_model_takes_its_options_in_range_and_no_others(model_type):
    taken = set(MODEL_KINDS[model_type].defaults)
    if model_type in ("pythia", "infini", "multi_memory", "hierarchical", "token_memory"):
        assert taken & TABLE.keys() == {option for option, kinds in TABLE.items() if model_type in kinds}
    for option in {o for kind in MODEL_KINDS.values() for o in kind.defaults} - taken | {"num_memorys"}:
        refuse(lambda o=option: create_model(model_type, CONFIG, **{o: 1}), option, "segment_length", *taken)
    for option in taken & BAD_VALUES.keys():
        options = {option: BAD_VALUES[option]}
        refuse(lambda options=options: create_model(model_type, CONFIG, **options), option, str(BAD_VALUES[option]))


@pytest.mark.parametrize("length", [0, 65, 6.5])
def test_segment_length_out_of_range(length):
    refuse(lambda: create_model("infini", CONFIG, segment_length=length), "segment_length", str(length), "1 to", "64")


@pytest.mark.parametrize("model_type", ["", "multi-memory", None, 3])
def test_unknown_model_type(model_type):
    refuse(lambda: create_model(model_type, CONFIG), repr(str(model_type)), *ModelType)


def test_the_defaults_are_the_design_s_and_options_reach_the_layer():
    def read(kind: str, **options: Any) -> tuple[Any, ...]:
        layer = create_model(kind, CONFIG, **options).layers[0].attention
        return layer.num_memory_heads, layer.num_memories, layer.segments_per_memory, layer.use_delta_rule

    assert read("infini") == (1, 1, 4, True)
    assert read("infini", num_memory_banks=2, segments_per_bank=3) == (1, 2, 3, True)
    for kind in ("multi_memory", "hierarchical"):
        assert read(kind) == (4, 4, 1, True)
        assert read(kind, num_memories=8, num_memory_heads=2, use_delta_rule=False) == (2, 8, 1, False)
    assert create_model("infini", CONFIG).segment_length == CONFIG.max_position_embeddings


@pytest.mark.parametrize("kind", ["infini", "multi_memory", "hierarchical"])
@pytest.mark.parametrize("places", [None, (1, 0), (-1,)])
def test_the_named_layers_have_memory_and_no_others(kind, places):
    model = create_model(kind, CONFIG, **({} if places is None else {"memory_layers": places}))
    expected = sorted(place % 2 for place in places or (0,))  # by default it is the first
    assert sorted(model.memory_layers) == [entry["layer"] for entry in model.memory_info()["per_layer"]] == expected
    assert [layer.kind for layer in model.layer_list] == [kind if i in expected else "pythia" for i in range(2)]


@pytest.mark.parametrize("places", [(2,), (1, -1), ()])
def test_other_places_are_refused_by_name(places):
    refuse(lambda: create_model("infini", CONFIG, memory_layers=places), "memory_layers")
    with pytest.raises(UserError, match="memory_layers"):
        ModelConfig(num_hidden_layers=2, memory_layers=places).check_taken(["infini"])


# Shapes and rules


UNIT: dict[str, Any] = {"key_features": "unit"}
NO_LAYER: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "signed keys": (lambda: InfiniLayer(16, 2, 24, **UNIT), ("unit keys are signed",)),
    "signed keys, divided by their sum": (
        lambda: InfiniLayer(16, 2, 24, **UNIT, use_normalizer=False, normalize_keys=True),
        ("unit keys are signed",),
    ),
    "long keys": (lambda: InfiniLayer(16, 2, 24, use_normalizer=False), ("diverges on keys longer than 1",)),
    "a router that decays": (
        lambda: MultiMemoryLayer(16, 2, 24, router="top1", use_token_decay=True),
        ("not router top1 or hierarchy fenwick",),
    ),
    "a tree without z": (
        lambda: HierarchicalLayer(16, 2, 24, hierarchy="fenwick", use_normalizer=False, key_features="softmax"),
        ("not router top1 or hierarchy fenwick",),
    ),
    "a width that heads do not divide": (
        lambda: PythiaConfig(hidden_size=30, num_attention_heads=4),
        ("hidden_size", "30", "num_attention_heads", "4"),
    ),
    "no heads": (lambda: PythiaLayer(32, 0, 48), ("heads", "0", "32")),
    "three memory heads": (lambda: InfiniLayer(32, 4, 48, num_memory_heads=3), ("num_memory_heads", "3")),
    "odd rotation": (lambda: PythiaLayer(32, 4, 48, rotary_pct=0.4), ("rotary_pct", "0.4", "even")),
    "no layers": (lambda: TransformerLM([]), ("layers", "at least one")),
    "two widths": (lambda: TransformerLM([PythiaLayer(32, 4, 48), InfiniLayer(16, 2, 24)]), ("16", "32")),
    "a head's memory below": (
        lambda: TransformerLM([TokenMemoryLayer(32), PythiaLayer(32, 4, 48)]),
        ("token_memory", "can only be among the last"),
    ),
    "no words": (lambda: TransformerLM([PythiaLayer(32, 4, 48)], vocab_size=0), ("vocab_size", "0")),
    "no segment": (lambda: TransformerLM([PythiaLayer(32, 4, 48)], segment_length=-3), ("segment_length", "-3")),
}


@pytest.mark.parametrize(("build", "words"), NO_LAYER.values(), ids=NO_LAYER)
def test_what_makes_no_layer_and_no_model(build, words):
    refuse(build, *words)


# Calls

BAD_IDS: dict[str, tuple[torch.Tensor, tuple[str, ...]]] = {
    "one dimension": (IDS[0], ("input_ids", "(6,)", "[batch, tokens]")),
    "no tokens": (IDS[:, :0], ("input_ids", "(2, 0)", "at least one token")),
    "just too large": (torch.tensor([[VOCAB_SIZE]]), (f"{VOCAB_SIZE}", f"0 to {VOCAB_SIZE - 1}")),
    "negative": (IDS - 100, ("input_ids", "-68", "0 to")),
    "floats": (IDS.float(), ("input_ids", "float32", "integers")),
    "flags": (IDS > 100, ("input_ids", "bool", "integers")),
}


@pytest.mark.parametrize(("ids", "words"), BAD_IDS.values(), ids=BAD_IDS)
def test_ids_out_of_range(ids, words):
    model = get_model("mixed")
    refuse(lambda: model(ids), *words)
    refuse(lambda: model.open_stream(2).feed(ids), *words[:1])
    refuse(lambda: model.token_losses(ids, IDS))


@pytest.mark.parametrize("shape", [(6,), (2, 5), (1, 6), (2, 6, 1)])
def test_masks_of_the_wrong_shape(shape):
    model = get_model("mixed")
    for call in (
        lambda: model(IDS, torch.ones(shape)),
        lambda: model.open_stream(2).feed(IDS, torch.ones(shape)),
        lambda: model.token_losses(IDS, IDS, torch.ones(shape)),
    ):
        refuse(call, "attention_mask", re.sub(r"\s+", " ", str(shape)), "(2, 6)")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_masks_of_any_dtype(dtype):
    model = get_model("mixed")
    mask = torch.ones(2, 6, dtype=dtype)
    mask[0, 3:] = 0
    with torch.no_grad():
        assert torch.equal(model(IDS, mask), model(IDS, mask.bool()))
        assert torch.equal(model(IDS, torch.ones(2, 6, dtype=dtype)), model(IDS))


BAD_LABELS: dict[str, tuple[torch.Tensor, tuple[str, ...]]] = {
    "one column": (IDS[:, :1], ("1", "6 or 7")),
    "too few columns": (IDS[:, :5], ("5", "6 or 7")),
    "too many columns": (text_ids(2, 8), ("8", "6 or 7")),
    "one dimension": (IDS[0], ()),
    "one row": (IDS[:1], ()),
    "too large": (IDS + VOCAB_SIZE, ()),
    "negative": (IDS - 200, ()),
}


@pytest.mark.parametrize(("labels", "words"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_that_do_not_fit_the_ids(labels, words):
    refuse(lambda: get_model("mixed").compute_loss(IDS, labels), "labels", *words)
