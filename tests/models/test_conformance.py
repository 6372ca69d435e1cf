"""Every built-in layer and selective output keep the contract; broken layers are found."""

import copy
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model_cases import (
    LAYER_CASES,
    MIXED_STACKS,
    STACKS,
    VOCAB_SIZE,
    LayerCase,
    assert_states_equal,
    build_model,
    build_selective,
    get_model,
    text_ids,
)
from new_llm.models import TransformerLM, create_model, save_memory_file, save_model
from new_llm.models.decoding import cast_weights_once
from new_llm.models.layers import Attention, InfiniLayer, Layer, ReadTokens, Segments, register_layer
from new_llm.models.layers.infini import InfiniOptions
from new_llm.models.state import LayerMemory
from new_llm.testing import check_layer, check_model, draw_ids
from tiny import make_shape

CASES = {
    "pythia": LayerCase("pythia", {"rotary_pct": 0.5}),
    **LAYER_CASES,
    "parallel_infini": LayerCase("parallel_infini", {"initial_alpha": 0.7}),
    "transformer_xl": LayerCase("transformer_xl", {"memory_tokens": 7}),
    "transformer_xl-none": LayerCase("transformer_xl", {"memory_tokens": 0}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_built_in_layers(case):
    check_layer(case.build)


@pytest.mark.parametrize("name", ["token_memory", "infini-alibi", "gated_delta"])
def test_decaying_layers_stream_without_a_step(name, monkeypatch):
    def build():
        layer = CASES[name].build()
        for part in layer.modules():
            for method in ("step", "end_segments") if isinstance(part, Attention) else ():
                monkeypatch.setattr(type(part), method, getattr(Layer, method))
        return layer

    check_layer(build)


def test_the_layer_of_the_recall_study(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "studies")
    from taught_recall import OPTIONS, FactLayer

    monkeypatch.setitem(OPTIONS, "memory_key_size", 16)
    check_layer(lambda: FactLayer(32, **OPTIONS))


CONTINUE = """
import sys, torch
from new_llm.models import load_memory_file, load_model

folder = sys.argv[1]
sys.path += sys.argv[2:]
import test_conformance  # registers the layer of its own

model = load_model(folder)
load_memory_file(model, f"{folder}/memory.safetensors")
torch.save((model.get_memory_state(), model(torch.load(f"{folder}/ids.pt"))), f"{folder}/found.pt")
"""


def test_another_process_continues_a_saved_memory_bit_for_bit(tmp_path):
    """Every built-in memory in one model, and one of a layer of the user's own, go by one memory file."""
    layers = [make_own(), *(case.build() for case in CASES.values())]
    layers.sort(key=lambda layer: layer.stands_before_head)
    model = TransformerLM(layers, 64, 5, initializer_range=0.1).double()
    model.reset_memory(3)
    ids = draw_ids(model, 3, 17)
    model(ids, update_memory=True)
    save_model(model, tmp_path)
    save_memory_file(model, tmp_path / "memory.safetensors")
    torch.save(ids, tmp_path / "ids.pt")
    here = Path(__file__).parent
    subprocess.run([sys.executable, "-c", CONTINUE, *map(str, (tmp_path, here, here.parent))], check=True)
    state, logits = torch.load(tmp_path / "found.pt")
    assert_states_equal(state, model.get_memory_state())
    assert torch.equal(logits, model(ids))


@pytest.mark.parametrize("name", [*MIXED_STACKS, "pythia"])
def test_mixed_models(name):
    check_model(get_model(name))


def run(model: TransformerLM, ids: Tensor) -> Tensor:
    model.reset_memory(len(ids))
    with torch.no_grad():
        return torch.cat([model(ids, update_memory=True), model(ids)], dim=1).float()


@pytest.mark.parametrize("name", [*MIXED_STACKS, "pythia"])
def test_autocast_keeps_memory_in_float32(name):
    """Training in bf16 is autocast over float32 weights."""
    model = build_model(STACKS[name], dtype=torch.float32)
    ids = text_ids(2, 33)
    expected = run(model, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(model, ids)
        model.reset_memory()
        with cast_weights_once(model):
            assert torch.equal(run(model, ids), actual)
        model.reset_memory()
        loss, _ = model.compute_loss(ids, ids, update_memory=True)
    loss.backward()
    assert float((actual - expected).norm() / expected.norm()) < 0.05
    for entry in model.get_memory_state().values():
        tensors = [t for t in entry.values() if isinstance(t, Tensor) and t.is_floating_point()]
        assert all(t.dtype == torch.float32 and bool(t.any()) for t in tensors)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@register_layer("own", options=InfiniOptions)
class OwnLayer(InfiniLayer):
    def forward(self, hidden: Tensor, memory=None, segments: Segments | None = None):
        self.auxiliary_loss = self.mlp.dense_4h_to_h.weight.square().mean() if self.training else None
        return super().forward(hidden, memory, segments)


def make_own(layer_type: type[OwnLayer] = OwnLayer) -> OwnLayer:
    return layer_type(16, 2, 24)


def test_auxiliary_losses_reach_training_and_no_evaluation_and_checkpointing_draws_the_same_numbers_again():
    model, ids = TransformerLM([make_own()], 64, 4), torch.arange(10).view(1, 10)
    extra = model.layers[0].mlp.dense_4h_to_h.weight.square().mean()
    trained, statistics = model.train().compute_loss(ids, ids)
    measured, _ = model.eval().compute_loss(ids, ids)
    torch.testing.assert_close(trained, measured + extra)
    assert statistics.total_nll == pytest.approx(9 * measured.item(), rel=1e-6)
    torch.testing.assert_close(model.train().total_loss(ids, ids), 9 * (measured + extra))
    model.layers[0].mlp.register_forward_hook(lambda _, __, out: torch.nn.functional.dropout(out))
    found = []
    for model.gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        found.append(torch.autograd.grad(model.compute_loss(ids, ids)[0], model.embed_in.weight)[0])
    assert torch.equal(*found)


def test_auxiliary_losses_are_averaged_over_the_segments_of_several_passes_and_not_copied():
    layer = LayerCase("multi_memory", {"router": "top1", "balance_weight": 1.0})
    model = TransformerLM([layer.build()], VOCAB_SIZE, 4, initializer_range=0.3, skip_interval=1).double()
    ids = text_ids(1, 8)

    def find_extra(part: Tensor) -> Tensor:
        held, losses = model.keep_memory(), []
        for is_training in (True, False):
            model.restore_memory(held)
            losses.append(model.train(is_training).compute_loss(part, part, update_memory=True)[0])
        return losses[0] - losses[1]

    parts = [find_extra(part) for part in ids.split(4, dim=1)]
    model.reset_memory()
    torch.testing.assert_close(find_extra(ids), (parts[0] + parts[1]) / 2)
    model.train()(ids)
    copy.deepcopy(model)


@dataclass(frozen=True)
class Total(LayerMemory):
    total: Tensor


@register_layer("bare")
class Bare(Layer):
    has_memory, hidden_size = True, 16

    def empty_memory(self, rows, like):
        return Total(torch.zeros(rows, 16, dtype=torch.float64))

    def forward(self, hidden, memory=None, segments=None):
        total = self.empty_memory(len(hidden), hidden).total if memory is None else memory.total
        return hidden + total[:, None, None].to(hidden), Total(total + hidden.mean((1, 2)))


def test_a_layer_without_weights_keeps_a_memory_of_its_own_precision():
    model, ids = TransformerLM([Bare()], 64, 4), torch.arange(10).view(2, 5)
    model(ids, update_memory=True)
    before = model.get_memory_state()
    model(ids)
    assert_states_equal(model.get_memory_state(), before)
    assert before[0]["total"].dtype == torch.float64
    assert model.memory_info()["total_bytes"] == 16 * 8


FAULTS = {
    "future": "the future leaks: logits before changed token 1",
    "rows": "rows mix: logits of row 0 alone and in a batch",
    "batch-norm": "in training a row's logits depend on another row",
    "padding": "of a padded row",
    "write": "the layer has_memory, but its memory does not affect logits|logits of single segments",
    "full": "memories of an empty memory is not all zeros",
    "in-place": "forward changes norms of the memory in place",
    "number": "num_tokens of the memory is a int, not a tensor",
    "alone": "forward must return a pair",
    "none": "forward returns a NoneType, not a LayerMemory",
    "narrow": r"forward maps \(2, 1, 3, 16\) to \(2, 1, 3, 8\)",
    "dtype": "forward maps torch.float64 to torch.float32",
    "input": "forward changes its input in place",
    "random": "two calls differ",
    "begin": "logits from memory None and from an empty memory",
    "flags": "num_tokens of the memory is torch.bool",
    "width": "the layer must set self.hidden_size, its width",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_layers_are_found(fault):
    class Broken(OwnLayer):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            self.normalize = torch.nn.BatchNorm1d(args[0])
            if fault == "width":
                del self.hidden_size

        def empty_memory(self, rows, like):
            empty = super().empty_memory(rows, like)
            flags = {"num_tokens": empty.num_tokens.bool()}
            wrong = {"full": {"memories": empty.memories + 1}, "number": {"num_tokens": 0}, "flags": flags}
            return replace(empty, **wrong.get(fault, {}))

        def forward(self, hidden, memory=None, segments=None):
            if fault == "padding":
                segments = Segments(None, segments.write_last)
            if fault == "begin" and memory is None:  # in place of a learned one that an emptied memory reads, too
                memory = replace(empty := super().empty_memory(len(hidden), hidden), norms=empty.norms + 1)
            out, written = super().forward(hidden, memory, segments)
            if fault == "random":
                out = torch.nn.functional.dropout(out)
            if fault == "input":
                hidden += 1
            if fault in ("future", "rows"):
                out = out + hidden.mean(2 if fault == "future" else 0, keepdim=True)
            if fault == "batch-norm":
                out = self.normalize(out.flatten(0, 2)).view_as(out)
            if fault == "in-place" and memory is not None:
                memory.norms.add_(1)
            returned = {"alone": out, "none": (out, None), "narrow": (out[..., :8], written)}
            returned["dtype"] = out.float(), written
            return returned.get(fault, (out, written.emptied() if fault == "write" else written))

    with pytest.raises(AssertionError, match=FAULTS[fault]):
        check_layer(lambda: make_own(Broken))


# Transformer-XL: Pythia where it has no memory


def build_xl(**options) -> TransformerLM:
    layer = LayerCase("transformer_xl" if options else "pythia", {"rotary_pct": 0.5, **options})
    return build_model([layer, layer], dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_memory_it_is_pythia_bit_for_bit_and_with_one_rows_do_not_share_it(dtype):
    ids, found = text_ids(2, 19), []
    for model in (build_xl().to(dtype), build_xl(memory_tokens=0).to(dtype)):
        loss, _ = model.compute_loss(ids, ids, update_memory=True)
        loss.backward()
        found.append((model(ids), loss, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])))
        assert not model.memory_layers
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    # One row may write into the shared memory; the sum of several rows' keys would be no one's.
    model = build_xl(memory_tokens=7).to(dtype)
    model(ids[:1], update_memory=True)
    before = model.get_memory_state()
    with pytest.raises(ValueError, match=r"call reset_memory\(batch_size\) first"):
        model(ids, update_memory=True)
    assert_states_equal(model.get_memory_state(), before)


# Selective output: several passes through the layers, causal, exact in every cut, the plain model with none


CONFIG = make_shape(vocab_size=VOCAB_SIZE, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)
SEGMENT = 7
by_stack = pytest.mark.parametrize("stack", ["pythia", "infini-rule-banks", "mixed", "infini-tokens"])


def make_plain(model_type: str, **options) -> TransformerLM:
    torch.manual_seed(3)
    return create_model(model_type, CONFIG, segment_length=SEGMENT, **options)


@by_stack
@pytest.mark.parametrize(("skip_interval", "add_embedding"), [(1, False), (2, False), (2, True)])
def test_passes_are_the_layers_again_segment_by_segment(stack, skip_interval, add_embedding):
    """Against a loop over segments and passes that is written out here; the last pass alone writes."""
    model, ids = build_selective(stack, skip_interval, SEGMENT, add_embedding=add_embedding), text_ids(2, 3 * SEGMENT)
    memories = [None] * len(model.layers)
    expected: list[Tensor] = []
    for begin in range(0, ids.shape[1], SEGMENT):
        part = ids[:, begin : begin + SEGMENT]
        hidden = model.embed_in(part)[:, None]
        segments = Segments(tokens=ReadTokens(part[:, None], model.embed_out.weight))
        for number in range(skip_interval + 1):
            if number:
                assert model.pass_projection is not None
                hidden = model.pass_projection(hidden) + add_embedding * model.embed_in(part)[:, None]
            after = []
            for layer, memory in zip(model.layer_list, memories, strict=True):
                if layer.kind == "token_memory":
                    hidden = model.final_layer_norm(hidden)
                hidden, written = layer(hidden, memory, segments)
                after.append(written)
        memories = after
        is_normed = model.layer_list[-1].kind == "token_memory"
        expected.append(model.embed_out(hidden if is_normed else model.final_layer_norm(hidden))[:, 0])
    torch.testing.assert_close(model(ids), torch.cat(expected, 1), atol=1e-10, rtol=1e-10)


@by_stack
@pytest.mark.parametrize(("skip_interval", "add_embedding"), [(1, True), (2, False)])
def test_every_pass_keeps_the_contract(stack, skip_interval, add_embedding):
    check_model(build_selective(stack, skip_interval, SEGMENT, add_embedding=add_embedding))


@pytest.mark.parametrize(("stack", "weight"), [("mixed", 0.5), ("tokens", 1.0)])
def test_training_weighs_the_loss_after_every_pass(stack, weight):
    model, ids = build_selective(stack, 2, SEGMENT, earlier_pass_weight=weight), text_ids(2, 18)
    targets = model.find_targets(ids, ids)
    losses = [model.score_passes([hidden], targets) for hidden in model.compute_passes(ids)]
    assert torch.equal(losses[-1], model.token_losses(ids, ids))
    first = model.token_losses(ids[:, :SEGMENT], ids[:, :SEGMENT], use_selective=False)
    torch.testing.assert_close(losses[0][:, : SEGMENT - 1], first[:, :-1], atol=1e-10, rtol=1e-10)
    powers = [weight**2, weight, 1.0]
    expected = sum(power * loss for power, loss in zip(powers, losses, strict=True)) / sum(powers)
    torch.testing.assert_close(model.train().token_losses(ids, ids), expected)


def test_without_extra_passes_it_is_the_plain_model_and_deep_pythia_has_as_many_layers_as_run():
    deep, selective = make_plain("deep_pythia", skip_interval=2), make_plain("selective", skip_interval=2)
    assert len(deep.layers) == len(selective.layers) * selective.count_passes()
    plain, without, ids = make_plain("pythia"), make_plain("selective", skip_interval=0), text_ids(2, 20)
    assert plain.num_parameters() == without.num_parameters()
    assert torch.equal(plain(ids), without(ids))
