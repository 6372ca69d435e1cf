"""Each planted fault is caught by its check, and a healthy model passes all."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from doctor_subjects import (
    CONFIG,
    SEGMENT,
    check_fault,
    examine,
    find_tokenizer,
    find_weights,
    list_levels,
    make_data,
    make_trained,
)

from new_llm.config import UserError
from new_llm.config.doctor import DoctorConfig
from new_llm.evaluation.doctor import CHECKS, examine_model
from new_llm.evaluation.hugging_face import HuggingFaceLM
from new_llm.evaluation.scoring import evaluation_mode
from new_llm.models.loss import align_labels


def wrap(owner, name, change):
    """Put change(original) in the place of a method of one object."""
    setattr(owner, name, change(getattr(owner, name)))


@pytest.mark.parametrize("kind", ["pythia", "infini", "multi_memory", "hierarchical", "selective", "token_memory"])
def test_a_healthy_model_passes_all_and_is_left_as_it_was(kind):
    model = make_trained(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    held = model.reset_memory(2) or model(torch.arange(64).view(2, 32), update_memory=True)
    held = model.get_memory_state()
    report = examine(model)
    assert list_levels(report, "warning", "fault") == set()
    skipped = list_levels(report, "skipped")
    assert skipped == (set() if model.memory_layers else {"memory", "gates"})
    assert [finding.check for finding in report.findings] == [check.name for check in CHECKS]
    assert all(module.training for module in model.modules())
    assert model.segment_length == SEGMENT
    assert model.memory_rows == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for index, entry in model.get_memory_state().items():
        assert all(torch.equal(v, held[index][k]) for k, v in entry.items() if isinstance(v, torch.Tensor))
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("kind", ["pythia", "infini"])
def test_a_layer_that_looks_one_token_ahead(kind):
    model = make_trained(kind)

    def look_ahead(forward):
        def changed(hidden, *arguments):
            ahead = F.pad(hidden, (0, 0, 0, 1))[..., 1:, :]
            return forward(hidden + 0.1 * ahead, *arguments)

        return changed

    wrap(model.layers[1], "forward", look_ahead)
    report = examine(model)
    check_fault(report, "causality", "is seen at")
    assert {"calls", "generation"} <= list_levels(report, "skipped")


def test_a_look_into_the_next_segment():
    model = make_trained("infini")

    def leak(forward):
        def changed(hidden, *arguments):  # a statistic over all tokens of the call
            return forward(hidden + 0.01 * hidden.mean((1, 2), keepdim=True), *arguments)

        return changed

    wrap(model.layers[0], "forward", leak)
    check_fault(examine(model), "causality", "is seen at")


def test_labels_that_the_loss_shifts_twice(monkeypatch):
    def shift_twice(labels, num_positions):
        targets = align_labels(labels, num_positions)
        return F.pad(targets[:, 1:], (0, 1), value=-100)

    monkeypatch.setattr("new_llm.models.transformer.align_labels", shift_twice)
    check_fault(examine(make_trained()), "labels", "not that of the next token")


def test_a_model_trained_with_doubly_shifted_labels():
    report = examine(make_trained("infini", shift=2))
    check_fault(report, "shift", "the least is at 2")
    assert "skill" in list_levels(report, "skipped")


@pytest.mark.parametrize("kind", ["infini", "hierarchical"])
def test_a_memory_shared_by_rows(kind):
    model = make_trained(kind)

    def share(hold):
        def changed(rows, start):
            if model.memory_rows is not None:
                mean = [None if m is None else m._map(lambda t: _mean_over_rows(t)) for m in rows]
                return hold(mean, start)
            return hold(rows, start)

        return changed

    wrap(model, "_hold", share)
    check_fault(examine(model), "rows", "through a memory of its own")


def test_rows_that_see_one_another_in_a_call():
    model = make_trained("infini")

    def share(forward):
        def changed(hidden, *arguments):
            return forward(hidden + 0.01 * hidden.mean(0, keepdim=True), *arguments)

        return changed

    wrap(model.layers[0], "forward", share)
    check_fault(examine(model), "rows", "rows of a batch see one another")


def _mean_over_rows(t):
    return t.double().mean(0, keepdim=True).to(t.dtype).expand_as(t).clone()


@pytest.mark.parametrize("method", ["forward", "token_losses"])
def test_memory_written_in_evaluation(method):
    model = make_trained("infini")

    def write(read):
        def changed(*arguments, **options):
            return read(*arguments, **{**options, "update_memory": True})

        return changed

    wrap(model, method, write)
    check_fault(examine(model), "evaluation", "evaluation writes memory")


def test_evaluation_that_leaves_the_model_in_evaluation_mode(monkeypatch):
    import contextlib

    @contextlib.contextmanager
    def forget(model, autocast=contextlib.nullcontext):
        with evaluation_mode(model, autocast):
            yield
        for module in model.modules():
            module.training = False

    monkeypatch.setattr("new_llm.evaluation.tally.evaluation_mode", forget)
    check_fault(examine(make_trained()), "evaluation", "left in another mode by sliding-window")


@pytest.mark.parametrize("always", [True, False])
def test_dropout(always):
    model = make_trained("infini")
    layer = model.layers[0]

    def drop(forward):
        def changed(hidden, *arguments):
            return forward(F.dropout(hidden, 0.1, training=always or layer.training), *arguments)

        return changed

    wrap(layer, "forward", drop)
    check_fault(examine(model), "modes", "not deterministic" if always else "in training is another one")


def change_written(model, change):
    """Have the first layer leave another memory behind."""

    def wrapped(forward):
        def changed(*arguments):
            hidden, memory = forward(*arguments)
            return hidden, None if memory is None else change(memory)

        return changed

    (layer,) = model.memory_layers.values()
    wrap(layer, "forward", wrapped)


def test_a_memory_scaled_by_its_tokens_while_z_is_not():
    model = make_trained("infini")
    change_written(model, lambda m: dataclasses.replace(m, memories=m.memories / m.num_tokens.sum().clamp_min(1)))
    check_fault(examine(model), "memory", "grow unlike")


@pytest.mark.parametrize("kind", ["infini", "token_memory"])
def test_a_memory_that_overflows(kind):
    model = make_trained(kind)
    change_written(model, lambda m: dataclasses.replace(m, memories=m.memories * 1e30))
    report = examine(model, config=dataclasses.replace(CONFIG, checks=("memory",)))
    check_fault(report, "memory", "not finite")


def test_a_stream_that_is_not_the_parallel_path():
    model = make_trained("infini")

    def weaken(step):
        def changed(*arguments):
            hidden, opened = step(*arguments)
            return 0.9 * hidden, opened

        return changed

    wrap(model.layers[0], "step", weaken)
    check_fault(examine(model), "calls", "cut into calls")


def test_generation_that_drops_the_prompt():
    model = make_trained("infini")

    def drop(generate):
        def changed(ids, **options):
            made, statistics = generate(ids[:, -1:], **options)
            return torch.cat([ids, made[:, 1:]], 1), statistics

        return changed

    wrap(model, "generate", drop)
    check_fault(examine(model), "generation", "drops the prompt")


def test_gates_that_have_not_moved_are_a_warning():
    model = make_trained("infini")
    torch.nn.init.constant_(model.layers[0].attention.gate, -0.1)  # 0.475
    report = examine(model)
    assert (list_levels(report, "warning"), report.has_fault) == ({"gates"}, False)


def test_untrained_weights_are_warned_of():
    model = make_trained("infini")
    torch.manual_seed(1)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.02)
    report = examine(model)
    assert {"skill", "gates"} <= list_levels(report, "warning")
    assert list_levels(report, "fault") == set()
    finding = next(finding for finding in report.findings if finding.check == "skill")
    assert finding.meaning == "these weights are not trained"


def test_weights_that_are_not_numbers_end_the_examination():
    model = make_trained("pythia")
    with torch.no_grad():
        model.embed_out.weight[3] = torch.nan
    report = examine(model)
    check_fault(report, "weights", "embed_out")
    assert "causality" in list_levels(report, "skipped")


def test_a_hugging_face_model_gets_the_checks_that_make_sense():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    data = make_data()
    report = examine_model(HuggingFaceLM(GPT2LMHeadModel(config)), find_tokenizer(), data.validation, config=CONFIG)
    assert list_levels(report, "fault") == set()
    assert list_levels(report, "warning") == {"modes", "shift", "skill"}  # it has dropout, and is untrained
    assert {"labels", "causality", "rows", "evaluation"} <= list_levels(report, "ok")


def test_bad_requests_are_one_line():
    with pytest.raises(UserError, match=r"checks: 'labls' is unknown; known are weights"):
        examine(find_weights("pythia"), config=DoctorConfig(checks=("labls",)))
    with pytest.raises(UserError, match=r"the text holds \d+ tokens; at least \d+ are needed"):
        examine(find_weights("pythia"), make_data(validation=["too short"]))
    only = examine(find_weights("pythia"), config=dataclasses.replace(CONFIG, checks=("causality", "labels")))
    assert [finding.check for finding in only.findings] == ["labels", "causality"]
