"""Bad input: a ValueError of one line that names what is allowed."""

import dataclasses

import pytest
import torch

from model_cases import VOCAB_SIZE, get_model, text_ids
from new_llm.config import PythiaConfig, UserError
from new_llm.experiments.config import ModelConfig
from new_llm.models import ModelType, SelectiveOutputLM, TransformerLM, create_model, save_model
from new_llm.models.factory import MODEL_KINDS, RECIPES
from new_llm.models.layers import HierarchicalLayer, InfiniLayer, MultiMemoryLayer, PythiaLayer, TokenMemoryLayer
from tiny import make_shape, refused

CONFIG = make_shape(vocab_size=VOCAB_SIZE, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)
IDS = text_ids(2, 6)


def refuse(call, *words: str) -> None:
    with refused(kind=ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


TABLE = {  # DESIGN's: an option and the models that take it
    "use_delta_rule": ["infini", "multi_memory", "hierarchical", "token_memory"],
    "num_memories": ["multi_memory", "hierarchical"],
    "num_memory_banks": ["infini"],
    "segments_per_bank": ["infini"],
    "use_alibi": ["infini"],
    "alibi_scale": ["infini"],
    "num_memory_heads": ["infini", "multi_memory", "hierarchical", "token_memory"],
}
BAD_VALUES = {
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


def test_one_set_of_defaults_the_design_s_options_that_reach_the_layer_and_named_recipes():
    def read(kind: str, **options):
        layer = create_model(kind, CONFIG, **options).layers[0].attention
        return layer.num_memory_heads, layer.num_memories, layer.segments_per_memory, layer.use_delta_rule

    assert read("infini") == (1, 1, 4, True)
    assert read("infini", num_memory_banks=2, segments_per_bank=3) == (1, 2, 3, True)
    for kind in ("multi_memory", "hierarchical"):
        assert read(kind) == (4, 4, 1, True)
        assert read(kind, num_memories=8, num_memory_heads=2, use_delta_rule=False) == (2, 8, 1, False)
    model = create_model("infini", CONFIG)
    assert model.segment_length == CONFIG.max_position_embeddings
    assert model.layers[0].settings == InfiniLayer(32, 4, 48).settings
    for kind, options in RECIPES["tuned"].items():
        assert set(options) <= set(MODEL_KINDS[kind].defaults)
        assert list(create_model(kind, CONFIG, recipe="tuned").memory_layers) == [2 if kind == "token_memory" else 1]


@pytest.mark.parametrize("kind", ["infini", "multi_memory", "hierarchical"])
@pytest.mark.parametrize("places", [None, (1, 0), (-1,)])
def test_the_named_layers_have_memory_and_no_others(kind, places):
    model = create_model(kind, CONFIG, **({} if places is None else {"memory_layers": places}))
    expected = sorted(place % 2 for place in places or (0,))  # by default it is the first
    assert sorted(model.memory_layers) == [entry["layer"] for entry in model.memory_info()["per_layer"]] == expected
    assert [layer.kind for layer in model.layer_list] == [kind if i in expected else "pythia" for i in range(2)]


def test_other_types_lengths_and_places_are_refused_by_name():
    for model_type in ("", "multi-memory", None, 3):
        refuse(lambda kind=model_type: create_model(kind, CONFIG), repr(str(model_type)), *ModelType)
    for length in (0, 65, 6.5):
        options = {"segment_length": length}
        refuse(lambda o=options: create_model("infini", CONFIG, **o), "segment_length", str(length), "1 to", "64")
    for places in ((2,), (1, -1), ()):
        refuse(lambda p=places: create_model("infini", CONFIG, memory_layers=p), "memory_layers")
        with pytest.raises(UserError, match="memory_layers"):
            ModelConfig(num_hidden_layers=2, memory_layers=places).check_taken(["infini"])


NO_LAYER = {
    "unit keys are signed": lambda: InfiniLayer(16, 2, 24, key_features="unit"),
    "can't be divided by their sum": lambda: InfiniLayer(
        16, 2, 24, key_features="unit", use_normalizer=False, normalize_keys=True
    ),
    "diverges on keys longer than 1": lambda: InfiniLayer(16, 2, 24, use_normalizer=False),
    "don't work with router top1": lambda: MultiMemoryLayer(16, 2, 24, router="top1", use_token_decay=True),
    "or hierarchy fenwick": lambda: HierarchicalLayer(16, 2, 24, hierarchy="fenwick", use_token_decay=True),
    "top1 is for multi_memory only": lambda: HierarchicalLayer(16, 2, 24, router="top1"),
    "30 is not a multiple of num_attention_heads (4)": lambda: PythiaConfig(hidden_size=30, num_attention_heads=4),
    "num_heads: 0 does not divide hidden_size 32": lambda: PythiaLayer(32, 0, 48),
    "num_memory_heads: 3": lambda: InfiniLayer(32, 4, 48, num_memory_heads=3),
    "rotary_pct: 0.4": lambda: PythiaLayer(32, 4, 48, rotary_pct=0.4),
    "layers: at least one": lambda: TransformerLM([]),
    "hidden sizes [16, 32] differ": lambda: TransformerLM([PythiaLayer(32, 4, 48), InfiniLayer(16, 2, 24)]),
    "token_memory stands before the head": lambda: TransformerLM([TokenMemoryLayer(32), PythiaLayer(32, 4, 48)]),
    "runs only inside a TransformerLM": lambda: TokenMemoryLayer(6)(torch.zeros(1, 1, 4, 6)),
    "vocab_size: 0": lambda: TransformerLM([PythiaLayer(32, 4, 48)], vocab_size=0),
    "segment_length: -3": lambda: TransformerLM([PythiaLayer(32, 4, 48)], segment_length=-3),
}


@pytest.mark.parametrize(("words", "build"), NO_LAYER.items(), ids=NO_LAYER)
def test_what_makes_no_layer_and_no_model(words, build):
    refuse(build, words)


BAD_IDS = [
    (IDS[0], ("input_ids", "(6,)", "[batch, tokens]")),
    (IDS[:, :0], ("input_ids", "(2, 0)", "at least one token")),
    (torch.tensor([[VOCAB_SIZE]]), (f"{VOCAB_SIZE}", f"0 to {VOCAB_SIZE - 1}")),
    (IDS - 100, ("input_ids", "-68", "0 to")),
    (IDS.float(), ("input_ids", "float32", "integers")),
    (IDS > 100, ("input_ids", "bool", "integers")),
]
BAD_LABELS = [
    (IDS[:, :5], ("5", "6 or 7")),
    (text_ids(2, 8), ("8", "6 or 7")),
    (IDS[0], ()),
    (IDS[:1], ()),
    (IDS + VOCAB_SIZE, ()),
    (IDS - 200, ()),
]


def test_ids_masks_and_labels_that_do_not_fit():
    model = get_model("mixed")
    for ids, words in BAD_IDS:
        refuse(lambda i=ids: model(i), *words)
        refuse(lambda i=ids: model.open_stream(2).feed(i), *words[:1])
        refuse(lambda i=ids: model.token_losses(i, IDS))
    for shape in ((6,), (2, 5), (1, 6), (2, 6, 1)):
        mask = torch.ones(shape)
        for call in (model, model.open_stream(2).feed, lambda ids, mask: model.token_losses(ids, IDS, mask)):
            refuse(lambda c=call, m=mask: c(IDS, m), "attention_mask", str(shape), "(2, 6)")
    for labels, words in BAD_LABELS:
        refuse(lambda one=labels: model.compute_loss(IDS, one), "labels", *words)
    for dtype in (torch.bool, torch.int64, torch.float32):  # masks of any dtype fit
        mask = torch.ones(2, 6, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(model(IDS, mask), model(IDS))
            mask[0, 3:] = 0
            assert torch.equal(model(IDS, mask), model(IDS, mask.bool()))


# The code blocks of the specification's section 1, as they stand there, on small shapes and a short text


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


HEADS = {
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
        with pytest.raises(UserError, match=r"embed_out is a .*; a model file can only hold a plain weight"):
            save_model(model, tmp_path)
