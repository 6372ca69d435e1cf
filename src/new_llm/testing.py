"""The conformance check of layers: what training, evaluation, streams and files rely on.

    from new_llm.testing import check_layer

    def test_my_layer():
        check_layer(lambda: MyLayer(hidden_size=32, num_heads=4, intermediate_size=64))

Each check is a function of its own, and fails with an `AssertionError` that says what was expected.
"""

import copy
import io
from collections.abc import Callable

import torch
from torch import Tensor

from new_llm.models.layers import LAYER_KINDS, Layer
from new_llm.models.transformer import TransformerLM

VOCAB_SIZE = 61
SEGMENT_LENGTH = 5
TOLERANCE = 1e-9
"""In float64; what two ways of computing one thing may differ by."""


def check_layer(make_layer: Callable[[], Layer]) -> None:
    """Check that a layer keeps the contract of `Layer`, inside a small model in float64.

    Args:
        make_layer: makes a new layer with weights of any kind; they are drawn anew.

    Raises:
        AssertionError: names the first part of the contract that the layer breaks.
    """
    model = make_model(make_layer())
    ids = draw_ids(3, 4 * SEGMENT_LENGTH - 2)
    with torch.no_grad():
        check_causality(model, ids)
        check_rows(model, ids)
        check_padding(model, ids)
        check_cuts(model, ids)
        check_streams(model, ids)
        check_state(model, ids)
        check_held_memory(model, ids)
        check_precision(model, ids)
    check_gradients(model, ids)
    check_registration(model.layer_list[0])


def make_model(layer: Layer) -> TransformerLM:
    """A model of one layer in float64, with weights large enough for differences to show."""
    torch.manual_seed(0)
    return TransformerLM([layer], VOCAB_SIZE, SEGMENT_LENGTH, initializer_range=0.3).double().eval()


def draw_ids(rows: int, length: int) -> Tensor:
    """Token ids [rows, length], always the same."""
    return torch.randint(VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(1))


def check_causality(model: TransformerLM, ids: Tensor) -> None:
    """Logits do not depend on later tokens."""
    expected = model(ids)
    for place in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[:, place:] = (changed[:, place:] + 1) % VOCAB_SIZE
        _assert_near(model(changed)[:, :place], expected[:, :place], f"logits before token {place}, which changed")


def check_rows(model: TransformerLM, ids: Tensor) -> None:
    """Rows of a batch do not depend on one another."""
    whole = model(ids)
    for row in range(len(ids)):
        _assert_near(model(ids[row : row + 1])[0], whole[row], f"logits of row {row} alone and in a batch")


def check_padding(model: TransformerLM, ids: Tensor) -> None:
    """A padded row gives the logits, and writes the memory, of the row without its padding."""
    length = SEGMENT_LENGTH + 2
    mask = torch.ones_like(ids)
    mask[1, length:] = 0
    model.reset_memory(len(ids))
    padded = model(ids, mask, update_memory=True)
    states = model.get_memory_state()
    model.reset_memory(1)
    _assert_near(padded[1:2, :length], model(ids[1:2, :length], update_memory=True), "logits of a padded row")
    for index, entry in model.get_memory_state().items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                _assert_near(states[index][key][1:2], value, f"{key} of a padded row")
    model.reset_memory()


def check_cuts(model: TransformerLM, ids: Tensor) -> None:
    """One call of n segments gives the logits of n calls with the memory carried."""
    expected = model(ids)
    model.reset_memory(len(ids))
    pieces = [model(piece, update_memory=True) for piece in ids.split(SEGMENT_LENGTH, dim=1)]
    model.reset_memory()
    _assert_near(torch.cat(pieces, dim=1), expected, "logits of single segments with their memory carried")


def check_streams(model: TransformerLM, ids: Tensor) -> None:
    """A stream gives the logits of one call, however the text is cut, also where rows stand at different places."""
    expected = model(ids)
    for length in (1, 2, 3, SEGMENT_LENGTH, 2 * SEGMENT_LENGTH + 1):
        stream = model.open_stream(len(ids))
        pieces = [stream.feed(piece) for piece in ids.split(length, dim=1)]
        _assert_near(torch.cat(pieces, dim=1), expected, f"logits of a stream of {length} tokens at a time")
    stream = model.open_stream(len(ids))
    first = torch.ones(len(ids), 3, dtype=torch.int64)
    first[1, 1:] = 0
    stream.feed(ids[:, :3], first)
    later = stream.feed(torch.cat((ids[1:2, 1:4], ids[1:2, 1:4], ids[1:2, 1:4])))
    _assert_near(later[1], expected[1, 1:4], "logits of a stream whose rows stand at different places")


def check_state(model: TransformerLM, ids: Tensor) -> None:
    """A memory that is saved and loaded continues bit for bit."""
    for rows in (None, len(ids)):
        model.reset_memory(rows)
        model(ids, update_memory=True)
        buffer = io.BytesIO()
        torch.save(model.get_memory_state(), buffer)
        expected = model(ids)
        model.reset_memory()
        model.set_memory_state(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
        assert torch.equal(model(ids), expected), "a memory that was saved and loaded gives other logits"
    model.reset_memory()


def check_held_memory(model: TransformerLM, ids: Tensor) -> None:
    """A call without update_memory leaves the held memory as it was; a layer with memory writes with it."""
    model(ids[:, :SEGMENT_LENGTH], update_memory=True)
    before = model.get_memory_state()
    model(ids)
    after = model.get_memory_state()
    for index, entry in before.items():
        same = all(torch.equal(value, after[index][key]) for key, value in entry.items() if isinstance(value, Tensor))
        assert same, "a call without update_memory changed the held memory"
    if model.layer_list[0].has_memory:
        with_memory = model(ids)
        model.reset_memory()
        assert not torch.equal(model(ids), with_memory), "the layer has_memory, but what it read changes nothing"
    model.reset_memory()


def check_precision(model: TransformerLM, ids: Tensor) -> None:
    """bfloat16 computes, finite and near float64; its memory stays float32 at least."""
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    narrow.reset_memory(len(ids))
    logits = narrow(ids, update_memory=True)
    assert logits.dtype == torch.bfloat16, f"logits of a bfloat16 model are {logits.dtype}"
    assert bool(logits.isfinite().all()), "logits of a bfloat16 model are not finite"
    apart = (logits.double() - model(ids)).norm() / model(ids).norm()
    assert apart < 0.2, f"logits of a bfloat16 model are {float(apart):.2f} of their size away from float64's"
    for entry in narrow.get_memory_state().values():
        for key, value in entry.items():
            is_wide = not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype.itemsize >= 4
            assert is_wide, f"{key} of a bfloat16 model is {getattr(value, 'dtype', None)}: float32 is needed"


def check_gradients(model: TransformerLM, ids: Tensor) -> None:
    """Gradients are finite; of a layer with memory they flow from a later segment through the write of an earlier."""
    inputs: list[Tensor] = []
    hook = model.embed_in.register_forward_hook(lambda _, __, output: inputs.append(output))
    labels = ids.clone()
    labels[:, : 2 * SEGMENT_LENGTH] = -100
    loss, _ = model.compute_loss(ids, labels)
    hook.remove()
    (gradient,) = torch.autograd.grad(loss, inputs)
    assert bool(gradient.isfinite().all()), "a gradient is not finite"
    reaches = bool((gradient[:, :SEGMENT_LENGTH] != 0).any())
    if model.layer_list[0].has_memory:
        assert reaches, "no gradient flows from a later segment through what an earlier one wrote"
    else:
        assert not reaches, "a layer without memory lets a later segment depend on an earlier one"


def check_registration(layer: Layer) -> None:
    """The layer is registered, and its settings make an equal layer."""
    assert LAYER_KINDS.get(getattr(type(layer), "kind", "")) is type(layer), "decorate the layer with register_layer"
    again = type(layer)(**layer.settings)
    shapes = [{name: tuple(value.shape) for name, value in one.state_dict().items()} for one in (layer, again)]
    assert shapes[0] == shapes[1], "the layer's settings make a layer with other weights"


def _assert_near(found: Tensor, expected: Tensor, what: str) -> None:
    apart = float((found.double() - expected.double()).abs().max()) if found.numel() else 0.0
    assert apart <= TOLERANCE, f"{what}: {apart:.2g} apart"
