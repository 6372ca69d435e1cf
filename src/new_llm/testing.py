"""Conformance checks for layers and models: what training, evaluation, streams and files rely on.

    from new_llm.testing import check_layer

    def test_my_layer():
        check_layer(lambda: MyLayer(hidden_size=32, num_heads=4, intermediate_size=64))

`check_layer` puts a layer into a small model; `check_model` checks a model of any layers. Each check is a separate
function, which raises an `AssertionError` that says what is wrong.
"""

import copy
import io
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from new_llm.models.inputs import is_integer
from new_llm.models.layers import LAYER_KINDS, Layer, Segments
from new_llm.models.state import LayerMemory
from new_llm.models.transformer import TransformerLM

VOCAB_SIZE = 61
SEGMENT_LENGTH = 5


def check_layer(make_layer: Callable[[], Layer]) -> None:
    """Check that a new layer fulfils the contract of `Layer`, in a small float64 model that draws its weights again."""
    layer = make_layer()
    check_form(layer)
    model = make_model(layer)
    check_model(model)
    ids = draw_ids(model, 3, 4 * SEGMENT_LENGTH - 2)
    with torch.no_grad():
        check_precision(model, ids)
    check_training(model, ids)
    check_registration(model.layer_list[0])


def check_model(model: TransformerLM) -> None:
    """Check that the layers of a float64 model fulfil their contract, with all passes; the model's memory is reset.

    Use a short `segment_length`, such as 5, since every check reads several segments.
    """
    ids = draw_ids(model, 3, 4 * model.segment_length - 2)
    model.reset_memory()
    with torch.no_grad():
        check_causality(model, ids)
        check_rows(model, ids)
        check_padding(model, ids)
        check_cuts(model, ids)
        check_streams(model, ids)
        check_state(model, ids)
        check_held_memory(model, ids)
    check_gradients(model, ids)


def make_model(layer: Layer) -> TransformerLM:
    """A float64 model with one layer, and with weights large enough for differences to show."""
    torch.manual_seed(0)
    return TransformerLM([layer], VOCAB_SIZE, SEGMENT_LENGTH, initializer_range=0.3).double().eval()


def check_form(layer: Layer) -> None:
    """Check the form of the layer's memory and of what `forward` returns, and that an empty memory is all zeros."""
    assert isinstance(getattr(layer, "hidden_size", None), int), "the layer must set self.hidden_size, its width"
    like = torch.zeros(2, 1, 3, layer.hidden_size, dtype=torch.float64)
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if layer.has_memory:
        empty = layer.empty_memory(2, like)
        assert isinstance(empty, LayerMemory), f"empty_memory returns a {type(empty).__name__}, not a LayerMemory"
        for name, value in empty.tensors().items():
            assert isinstance(value, Tensor), f"{name} of the memory is a {type(value).__name__}, not a tensor or None"
            assert value.shape[:1] == (2,), f"{name} of the memory has shape {tuple(value.shape)}; rows must come first"
            is_number = value.is_floating_point() or is_integer(value)
            assert is_number, f"{name} of the memory is {value.dtype}; must be floating-point numbers or counts"
            assert not value.any(), f"{name} of an empty memory is not all zeros"
        expected = _list_forms(empty)
    if layer.stands_before_head:
        return
    with torch.no_grad():
        given = layer.empty_memory(2, like) if layer.has_memory else None
        found = copy.deepcopy(layer).double()(like, given, Segments())
    is_pair = isinstance(found, tuple) and len(found) == 2
    assert is_pair, "forward must return a pair: the new hidden states, and the memory or None"
    hidden, memory = found
    assert hidden.shape == like.shape, f"forward maps {tuple(like.shape)} to {tuple(hidden.shape)}; must keep the shape"
    assert hidden.dtype == like.dtype, f"forward maps {like.dtype} to {hidden.dtype}; must keep the dtype"
    assert not like.any(), "forward changes its input in place"
    if given is not None:
        changed = [name for name, value in given.tensors().items() if value.any()]
        assert not changed, f"forward changes {', '.join(changed)} of the memory in place; must return a new memory"
        assert isinstance(memory, LayerMemory), f"forward returns a {type(memory).__name__}, not a LayerMemory"
        for name, form in _list_forms(memory.finish_call()).items():
            was = expected.get(name)
            assert form == was, f"{name} of the memory is {form} after a segment, but {was} when empty"


def _list_forms(memory: LayerMemory) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(value.shape), value.dtype) for name, value in memory.tensors().items()}


def find_tolerance(dtype: torch.dtype, *, is_rounded: bool = True) -> float:
    """How far two computations of the same values may differ, relative to the largest value, or to 1 if that is larger.

    Args:
        dtype: dtype of the model's weights.
        is_rounded: whether the computations differ in shapes, and therefore in the order of summation.
    """
    if dtype == torch.float64:
        return 1e-9
    return 5e-2 if dtype.itemsize < 4 else 1e-3 if is_rounded else 1e-5


def draw_ids(model: TransformerLM, rows: int, length: int) -> Tensor:
    """Random token ids, [rows, length], the same in every call."""
    return torch.randint(model.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def check_causality(model: TransformerLM, ids: Tensor, places: Iterable[int] | None = None) -> None:
    """Check that logits depend on the token itself but not on later ones, at `places` (None: everywhere)."""
    expected = model(ids)
    what = "two calls differ: outside training nothing is random or kept; logits"
    _assert_near(model, model(ids), expected, what, is_rounded=False)
    for place in range(ids.shape[1]) if places is None else places:
        changed = ids.clone()
        changed[:, place:] = (changed[:, place:] + 1) % model.vocab_size
        found = model(changed)
        _assert_near(
            model,
            found[:, :place],
            expected[:, :place],
            f"the future leaks: logits before changed token {place}",
            is_rounded=False,
        )
        assert not torch.allclose(found[:, place], expected[:, place]), f"token {place} does not change its logits"


def check_rows(model: TransformerLM, ids: Tensor) -> None:
    """Check that rows of a batch do not depend on each other, even with a shared memory that the call updates."""
    shared = None if model.rows_can_share else 1
    model.reset_memory(None if model.rows_can_share else len(ids))
    whole = model(ids, update_memory=True)
    for row in range(len(ids)):
        model.reset_memory(shared)
        _assert_near(
            model, model(ids[row : row + 1])[0], whole[row], f"rows mix: logits of row {row} alone and in a batch"
        )


def check_padding(model: TransformerLM, ids: Tensor) -> None:
    """Check that padding, on either side or between tokens, changes neither logits nor memory."""
    length = model.segment_length + 2
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, :length] = mask[1, -length:] = True
    mask[2, 1::2] = True
    model.reset_memory(len(ids))
    padded = model(ids, mask, update_memory=True)
    states = model.get_memory_state()
    for row in range(len(ids)):
        model.reset_memory(1)
        alone = model(ids[row][mask[row]].unsqueeze(0), update_memory=True)
        _assert_near(model, padded[row][mask[row]], alone[0], "logits of a padded row")
        for index, key, value in _list_tensors(model.get_memory_state()):
            _assert_near(model, states[index][key][row : row + 1], value, f"{key} of a padded row")
    model.reset_memory()


def check_cuts(model: TransformerLM, ids: Tensor) -> None:
    """Check that one call of n segments gives the same logits and memory as n calls with the memory carried."""
    model.reset_memory(len(ids))
    expected = model(ids, update_memory=True)
    states = model.get_memory_state()
    model.reset_memory(len(ids))
    pieces = [model(piece, update_memory=True) for piece in ids.split(model.segment_length, dim=1)]
    _assert_near(model, torch.cat(pieces, dim=1), expected, "logits of single segments with their memory carried")
    for index, key, value in _list_tensors(model.get_memory_state()):
        _assert_near(model, value, states[index][key], f"{key} of single segments")
    model.reset_memory()


def check_streams(model: TransformerLM, ids: Tensor) -> None:
    """Check that a stream gives the same logits and memory as one call, for any pieces and positions of rows."""
    segment_length = model.segment_length
    model.reset_memory(len(ids))
    model(ids[:, : segment_length + 1], update_memory=True)
    held = model.get_memory_state()
    expected = model(ids, update_memory=True)
    states = model.get_memory_state()
    for length in (1, 2, 3, segment_length, 2 * segment_length + 1):
        model.set_memory_state(held)
        stream = model.open_stream(len(ids))
        pieces = [stream.feed(piece) for piece in ids.split(length, dim=1)]
        stream.close(update_memory=True)
        _assert_near(model, torch.cat(pieces, dim=1), expected, f"logits of a stream of {length} tokens at a time")
        for index, key, value in _list_tensors(model.get_memory_state()):
            _assert_near(model, value, states[index][key], f"{key} after a stream of {length} tokens at a time")
    model.set_memory_state(held)
    stream = model.open_stream(len(ids))
    first = torch.ones_like(ids[:, :3])
    first[1, 1:] = 0
    stream.feed(ids[:, :3], first)
    later = stream.feed(ids[1:2, 1:4].expand(len(ids), -1))
    _assert_near(model, later[1], expected[1, 1:4], "logits of a stream whose rows have different positions")
    model.reset_memory()


def check_state(model: TransformerLM, ids: Tensor) -> None:
    """Check that a memory gives bit-identical logits after it is saved and loaded."""
    for rows in (None, len(ids)) if model.rows_can_share else (len(ids),):
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
    """Check that a call without update_memory does not change the held memory, and that memory affects the logits."""
    model.reset_memory(len(ids))
    model(ids[:, : model.segment_length], update_memory=True)
    before = model.get_memory_state()
    with_memory = model(ids)
    for index, key, value in _list_tensors(model.get_memory_state()):
        assert torch.equal(value, before[index][key]), "a call without update_memory changed the held memory"
    model.reset_rows(torch.ones(len(ids), dtype=torch.bool))
    emptied = model(ids)
    model.reset_memory()
    _assert_near(model, model(ids), emptied, "logits from memory None and from an empty memory")
    if model.memory_layers:
        assert not torch.equal(emptied, with_memory), "the layer has_memory, but its memory does not affect logits"


def check_precision(model: TransformerLM, ids: Tensor) -> None:
    """Check that a bfloat16 model's logits are finite and near float64's, and that its memory is at least float32."""
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    narrow.reset_memory(len(ids))
    logits = narrow(ids, update_memory=True)
    assert logits.dtype == torch.bfloat16, f"logits of a bfloat16 model are {logits.dtype}"
    assert bool(logits.isfinite().all()), "logits of a bfloat16 model are not finite"
    apart = (logits.double() - model(ids)).norm() / model(ids).norm()
    assert apart < 0.2, f"logits of a bfloat16 model differ from float64's by {float(apart):.2f} of their norm"
    for _, key, value in _list_tensors(narrow.get_memory_state()):
        is_wide = not value.is_floating_point() or value.dtype.itemsize >= 4
        assert is_wide, f"{key} of a bfloat16 model is {value.dtype}; must be at least float32"


def check_gradients(model: TransformerLM, ids: Tensor) -> None:
    """Check that gradients are finite and reach earlier segments only through memory, never another row."""
    length = model.segment_length
    inputs: list[Any] = []
    hook = model.embed_in.register_forward_hook(lambda _, __, output: inputs.append(output))
    labels = torch.full_like(ids, -100)
    labels[1, 2 * length :] = ids[1, 2 * length :]
    gradient = torch.empty(0)
    model.reset_memory(len(ids))
    for _ in range(2):  # a second backward must not reach into the first call's graph
        inputs.clear()
        loss, _ = model.compute_loss(ids, labels, update_memory=True)
        (gradient,) = torch.autograd.grad(loss, inputs[0])
    hook.remove()
    model.reset_memory()
    assert bool(gradient.isfinite().all()), "a gradient is not finite"
    assert not gradient[[0, 2]].any(), "a row's loss depends on another row"
    reaches = bool((gradient[1, :length] != 0).any())
    if any(layer.passes_gradients for layer in model.memory_layers.values()):
        assert reaches, "no gradient flows from a later segment to what an earlier one wrote"
    else:
        assert not reaches, "gradients reach an earlier segment, without memory or although passes_gradients is False"


def check_training(model: TransformerLM, ids: Tensor) -> None:
    """Check that a row's logits do not depend on other rows in training mode either; auxiliary losses may."""
    trained = copy.deepcopy(model).train()
    inputs: list[Any] = []
    trained.embed_in.register_forward_hook(lambda _, __, output: inputs.append(output))
    (gradient,) = torch.autograd.grad(trained(ids)[1].logsumexp(-1).sum(), inputs[0])
    assert not gradient[[0, 2]].any(), "in training a row's logits depend on another row"


def check_registration(layer: Layer) -> None:
    """Check that the layer is registered, and that its settings build an equal layer."""
    assert LAYER_KINDS.get(getattr(type(layer), "kind", "")) is type(layer), "decorate the layer with register_layer"
    again = type(layer)(**layer.settings)
    shapes = [{name: tuple(value.shape) for name, value in one.state_dict().items()} for one in (layer, again)]
    assert shapes[0] == shapes[1], "the layer's settings build a layer with other weights"


def _list_tensors(state: dict[int, dict[str, Any]]) -> list[tuple[int, str, Tensor]]:
    """The tensors of a memory state, as (layer, key, tensor)."""
    return [(i, key, value) for i, entry in state.items() for key, value in entry.items() if isinstance(value, Tensor)]


def _assert_near(model: TransformerLM, found: Tensor, expected: Tensor, what: str, *, is_rounded: bool = True) -> None:
    if found.numel():
        difference = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1)
        allowed = find_tolerance(next(model.parameters()).dtype, is_rounded=is_rounded)
        assert difference <= allowed, f"{what}: {difference:.2g} apart"
