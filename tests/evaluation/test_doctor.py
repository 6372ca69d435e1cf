"""The doctor raises no false alarm on any kind of model, and finds each planted fault."""

import contextlib
import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from doctor_subjects import (
    CONFIG,
    SEGMENT,
    check_only,
    examine,
    list_levels,
    make_data,
    make_tokenizer,
    make_trained,
    make_untrained,
)

from new_llm.config import EvalConfig
from new_llm.config.model import CacheConfig
from new_llm.evaluation import CachedModel, HuggingFaceLM, Subject
from new_llm.evaluation.doctor import CHECKS, Doctor
from new_llm.evaluation.scoring import evaluation_mode
from new_llm.models import ModelType
from new_llm.models.factory import RECIPES
from new_llm.models.inputs import align_labels

KINDS = [(kind, "default", True) for kind in ModelType] + [(kind, "tuned", True) for kind in RECIPES["tuned"]]
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


def test_the_model_is_left_as_it_was():
    model = make_trained().train()
    model.reset_memory(2)
    model(torch.arange(64).view(2, 32), update_memory=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held = model.get_memory_state()
    report = examine(model)
    assert list(report) == list(CHECKS)
    assert all(module.training for module in model.modules())
    assert (model.segment_length, model.memory_rows) == (SEGMENT, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for index, entry in model.get_memory_state().items():
        assert all(torch.equal(v, held[index][k]) for k, v in entry.items() if isinstance(v, torch.Tensor))


# Planted faults: each takes a trained model and spoils it


def wrap(owner, name, change):
    """Replace a method of one object by change(original)."""
    setattr(owner, name, change(getattr(owner, name)))


def hidden(change, layer=0):
    """Changes what one layer reads; `change` takes it and the layer."""

    def plant(model, monkeypatch):
        owner = model.layers[layer]
        wrap(owner, "forward", lambda forward: lambda hidden, *rest: forward(change(hidden, owner), *rest))

    return plant


def written(**changes):
    """Changes tensors of the memory that the memory layer leaves behind."""

    def changed(forward, *arguments):
        hidden, memory = forward(*arguments)
        return hidden, memory and dataclasses.replace(memory, **{key: f(memory) for key, f in changes.items()})

    def plant(model, monkeypatch):
        (layer,) = model.memory_layers.values()
        wrap(layer, "forward", lambda forward: functools.partial(changed, forward))

    return plant


def write_in(name):
    """A call that should leave the memory alone writes into it."""

    def plant(model, monkeypatch):
        wrap(model, name, lambda read: lambda *a, **k: read(*a, **{**k, "update_memory": True}))

    return plant


def mix_memories(model, monkeypatch):
    def mean(t):
        return t.double().mean(0, keepdim=True).to(t.dtype).expand_as(t).clone()

    def average(hold):
        def changed(rows, start):
            is_mixed = model.memory_rows is not None
            return hold([None if m is None else m.map(mean) for m in rows] if is_mixed else rows, start)

        return changed

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
    def weaken(step):
        def changed(*arguments):
            hidden, opened = step(*arguments)
            return 0.9 * hidden, opened

        return changed

    wrap(model.layers[0], "step", weaken)


def drop_the_prompt(model, monkeypatch):
    def drop(generate):
        def changed(ids, **options):
            made, statistics = generate(ids[:, :1], **options)
            return torch.cat([ids, made[:, 1:]], 1), statistics

        return changed

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

FAULTS = [
    (look_one_ahead, "infini", "default", "causality", "logits before changed token"),
    (look_into_later_segments, "infini", "tuned", "causality", "logits before changed token"),
    (mix_rows, "infini", "default", "rows", "alone and in a batch"),
    (mix_memories, "infini", "tuned", "rows", "of a padded row"),
    (shift_labels_twice, "infini", "default", "labels", "from those of the next token"),
    (write_in("forward"), "infini", "default", "evaluation", "memory was changed by a call"),
    (write_in("token_losses"), "infini", "default", "evaluation", "memory was changed by token_losses"),
    (forget_the_mode, "infini", "default", "evaluation", "mode was changed by sliding-window perplexity"),
    (always_drop, "infini", "default", "modes", "random in evaluation"),
    (drop_in_training, "infini", "default", "modes", "training mode changes logits"),
    (scale_by_tokens, "infini", "default", "memory", "M and z have different scales"),
    (scale_by_tokens, "hierarchical", "tuned", "memory", "M and z have different scales"),
    (overflow, "token_memory", "default", "memory", "not finite"),
    (miscount, "multi_memory", "default", "memory", "counts"),
    (weaken_steps, "infini", "default", "calls", "depend on how the text is cut"),
    (drop_the_prompt, "infini", "default", "generation", "not that of the trained model"),
    (break_a_weight, "pythia", "default", "weights", "embed_out"),
    (put_gates_back, "multi_memory", "tuned", "gates", "gates have not moved"),
    (put_gates_back, "token_memory", "default", "gates", "gates have not moved"),
]


@pytest.mark.parametrize(("plant", "kind", "recipe", "check", "words"), FAULTS)
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


def test_a_hugging_face_model():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    model, text = HuggingFaceLM(GPT2LMHeadModel(config)), make_data().validation
    result = Doctor().run(Subject(model, make_tokenizer(), text, EvalConfig(doctor=CONFIG)))
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


def test_the_page_lists_every_check():
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\w+) \| (?!finds)", page, flags=re.MULTILINE) == list(CHECKS)
