"""The compiled step and products equal the model's own, are used where they can be, and leave the model as it was."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from model_cases import MIXED_STACKS, STACKS, build_model, text_ids
from new_llm.models import TransformerLM
from new_llm.models.decoding import MAX_PACKED_ROWS, DecodingWeights, can_pack, choose_forward
from new_llm.models.layers import PythiaLayer
from new_llm.models.ops.kernels import native
from new_llm.models.ops.kernels.native import MAX_ROWS, MAX_STEP_ROWS, PythiaStep


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    if not native.has_kernels():
        pytest.skip("no C compiler here")
    seen: list[int] = []
    run = PythiaStep.run
    monkeypatch.setattr(
        PythiaStep, "run", lambda self, hidden, *rest: seen.append(len(hidden)) or run(self, hidden, *rest)
    )
    return seen


def make_weights(model: TransformerLM, num_rows: int = 1) -> DecodingWeights:
    return DecodingWeights(model, num_rows=num_rows, packs=True)


@torch.no_grad()
def read_by_steps(model: TransformerLM, ids: Tensor, mask: Tensor | None = None, first: int = 1) -> Tensor:
    """Logits of a stream that is fed `first` tokens and then one at a time."""
    stream = model.open_stream(len(ids))
    cuts = [0, *range(first, ids.shape[1] + 1)]
    pieces = [slice(begin, end) for begin, end in itertools.pairwise(cuts)]
    return torch.cat([stream.feed(ids[:, cut], None if mask is None else mask[:, cut]) for cut in pieces], dim=1)


@pytest.mark.parametrize("rows", [1, 3, MAX_STEP_ROWS])
@pytest.mark.parametrize(("heads", "rotary_pct"), [(1, 0.0), (2, 0.25), (3, 1.0)])
@pytest.mark.parametrize(("first", "share"), [(1, 1.0), (9, 0.7)])
def test_a_step_in_single_precision_is_the_layers_own(rows, heads, rotary_pct, first, share, calls):
    """Also where rows stand at different places of their segments, since masked tokens take none."""
    torch.manual_seed(0)
    layers = [PythiaLayer(24 * heads, heads, 70, rotary_pct=rotary_pct) for _ in range(2)]
    model = TransformerLM(layers, 128, 16, initializer_range=0.3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        ids, mask = text_ids(rows, 35), torch.rand(rows, 35, generator=torch.Generator().manual_seed(1)) < share
        expected = read_by_steps(model, ids, mask, first)
        assert not calls
        with make_weights(model, rows).in_use():
            found = read_by_steps(model, ids, mask, first)
    assert calls
    assert share < 1 or calls == [rows] * 70
    torch.testing.assert_close(found[mask], expected[mask], atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("name", ["pythia", *MIXED_STACKS])
def test_a_step_in_16_bits_is_as_near_the_exact_logits_as_the_layers_own(name):
    exact = build_model(STACKS[name], segment_length=8)
    model = build_model(STACKS[name], segment_length=8, dtype=torch.float32).to(torch.bfloat16)
    exact.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    ids = text_ids(2, 21)
    with torch.no_grad():
        expected = exact(ids)
        own = read_by_steps(model, ids)
        with make_weights(model, 2).in_use():
            found = read_by_steps(model, ids)
    assert found.dtype == torch.bfloat16
    errors = [float((logits.double() - expected).norm() / expected.norm()) for logits in (found, own)]
    assert errors[0] < min(0.03, 1.2 * errors[1])


@pytest.mark.parametrize("num_rows", [1, 2])
def test_generation_takes_the_compiled_step_and_says_what_it_says_without(num_rows, calls, monkeypatch):
    model = build_model(MIXED_STACKS["mixed"], dtype=torch.float32)
    found, _ = model.generate(text_ids(num_rows, 7), max_new_tokens=30)
    assert len(calls) >= 29
    steps = len(calls)
    monkeypatch.setattr(native, "load_kernels", lambda: None)
    without, _ = model.generate(text_ids(num_rows, 7), max_new_tokens=30)
    assert len(calls) == steps
    assert torch.equal(found, without)


class Doubling(PythiaLayer):
    def step(self, *arguments):
        hidden, opened = super().step(*arguments)
        return hidden * 2, opened


CHANGES = {
    "another module": lambda layer: setattr(layer.mlp, "dense_4h_to_h", nn.Sequential(layer.mlp.dense_4h_to_h)),
    "a hook": lambda layer: layer.attention.dense.register_forward_hook(lambda module, inputs, out: out * 3),
    "no bias": lambda layer: setattr(layer.attention.dense, "bias", None),
    "another class": lambda layer: setattr(layer, "__class__", Doubling),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_layer_that_is_changed_keeps_its_step_and_weights_are_read_in_place(change, calls):
    model = build_model(STACKS["pythia"], dtype=torch.float32)
    change(model.layers[0])
    weights = make_weights(model)
    model.layers[1].mlp.dense_h_to_4h.weight.data.mul_(-1)
    with weights.in_use():
        found = read_by_steps(model, text_ids(1, 9))
    assert len(calls) == 9  # of the other layer
    torch.testing.assert_close(found, read_by_steps(model, text_ids(1, 9)), atol=1e-5, rtol=1e-5)


def test_autocast_and_gradients_run_the_layers_own_step(calls):
    model = build_model(STACKS["pythia"], dtype=torch.float32)
    with make_weights(model).in_use():
        with torch.autocast("cpu", torch.bfloat16):
            assert read_by_steps(model, text_ids(1, 9)).dtype == torch.bfloat16
        loss, _ = model.compute_loss(text_ids(1, 5), text_ids(1, 5))
        loss.backward()
    assert not calls
    assert model.embed_out.weight.grad is not None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_packed_products_are_the_usual_ones_and_gradients_go_the_usual_way(dtype, tolerance):
    assert not can_pack(torch.zeros(1, dtype=torch.float64))
    if not can_pack(torch.zeros(1, dtype=dtype)):
        pytest.skip("no oneDNN here for this dtype")
    for shape, bias in (((1, 48), True), ((3, 2, 48), False), ((MAX_PACKED_ROWS + 1, 48), True)):
        linear = nn.Linear(48, 80, bias=bias).to(dtype)
        x = torch.randn(shape).to(dtype)
        packed = choose_forward(linear, max(MAX_ROWS.values()) + 1, packs=True)
        with torch.no_grad():
            torch.testing.assert_close(packed(x), linear(x), atol=tolerance, rtol=tolerance)
        packed(x).sum().backward()
        assert linear.weight.grad is not None
