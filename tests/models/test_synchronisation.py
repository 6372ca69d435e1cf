"""A training step and a generated token ask the device nothing and copy nothing that the host waits for.

The device is torch's `meta`: whatever needs a value (`.item()`, `bool(tensor)`, indices of a mask) raises there, and
copies from the host are seen as operations. A GPU's own count is in `benchmarks/gpu_check.py`.
"""

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from model_cases import STACKS, assert_near, assert_states_near, build_model, get_model, text_ids
from new_llm.config import PythiaConfig
from new_llm.config.model import GenerationConfig
from new_llm.models import create_model, generation
from new_llm.models.factory import MODEL_KINDS
from new_llm.models.ops import kernels
from new_llm.models.sampling import TokenSampler
from new_llm.models.state import list_tensors
from tiny import make_shape, run_python

SHAPE = make_shape()
OPTIONS = {
    "infini": {"use_alibi": True, "num_memory_banks": 2},
    "multi_memory": {"router": "top1"},
    "hierarchical": {"hierarchy": "fenwick"},
    "selective": {"skip_interval": 1, "earlier_pass_weight": 0.5},
}


@contextlib.contextmanager
def watch():
    """Inside the block: a list of what the host waits for."""
    found: list[str] = []

    class WatchCopies(TorchDispatchMode):
        """Copies from the host that are not `non_blocking`."""

        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.is_meta:
                from_host = any(isinstance(arg, Tensor) and not arg.is_meta and arg.dim() for arg in args)
                is_free = (kwargs or {}).get("non_blocking") or (func._schema.name == "aten::copy_" and args[2:])
                if from_host and not is_free:
                    found.append(str(func))
            return result

    class WatchNumbers(TorchFunctionMode):
        """Tensors on the device that are made of Python's numbers."""

        def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and result.is_meta:
                found.append(str(func))
            return result

    is_off = {
        "autocast": lambda *arguments, **options: contextlib.nullcontext(),
        "is_autocast_enabled": lambda kind: False,
    }
    with mock.patch.multiple(torch, **is_off), WatchCopies(), WatchNumbers():  # autocast knows no meta
        yield found


@pytest.mark.parametrize("kind", [kind for kind in MODEL_KINDS if kind != "deep_pythia"])
def test_a_training_step_waits_for_nothing(kind):
    with torch.device("meta"):
        model = create_model(kind, SHAPE, segment_length=8, **OPTIONS.get(kind, {}))
    ids = torch.zeros(2, 24, dtype=torch.int64, device="meta")
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[0, 19:] = False
    model.reset_memory(2)
    with watch() as found:
        for resets in ([False, False], [True, False]):
            before = model.keep_memory()
            model.reset_rows(torch.tensor(resets))
            model.total_loss(ids, ids, mask, update_memory=True).backward()
            model.restore_memory(before, torch.zeros((), dtype=torch.bool, device="meta"))
    assert not found


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in MODEL_KINDS if kind != "deep_pythia"])
def test_a_generated_token_waits_for_nothing(kind, in_place):
    """Past the end of a segment, with every option of drawing; steps in place find their tensors where they were."""
    with torch.device("meta"):
        model = create_model(kind, SHAPE, segment_length=8)
    ids = torch.zeros(2, 11, dtype=torch.int64, device="meta")
    config = GenerationConfig(do_sample=True, top_p=0.9, repetition_penalty=1.2)
    sampler = TokenSampler(config, ids, torch.ones_like(ids, dtype=torch.bool), SHAPE.vocab_size)
    stream = model.open_stream(2)
    in_place = in_place and stream.can_step_in_place
    places = []
    with watch() as found:
        hidden = stream.feed_hidden(ids)
        if in_place:
            stream.begin_steps(20)
        for _ in range(13 if in_place else 3):
            token = sampler.choose(model.embed_out(hidden[:, -1])).unsqueeze(1)
            hidden = stream.read_token(token) if in_place else stream.feed_hidden(token)
            if in_place:
                assert stream.count_token()
                places.append([id(t) for t in list_tensors((stream.opened, stream.memories))])
    assert all(place == places[0] for place in places)
    assert not found


def test_what_waits_is_seen():
    there = torch.zeros(2, device="meta")
    with watch() as found:
        torch.ones(2).to("meta", non_blocking=True)
        assert not found
        torch.ones(2).to("meta")
        there.new_tensor([1.0, 2.0])
        there.copy_(torch.ones(2))
        assert len(found) == 3
        for ask in (lambda: bool(there.any()), lambda: there[there > 0], lambda: there.nonzero()):
            with pytest.raises((RuntimeError, NotImplementedError)):
                ask()


# Steps that a CUDA graph can hold, here without one: the same results, at the same places, asking nothing


@pytest.mark.parametrize("name", [name for name in STACKS if "top1" not in name])
def test_hidden_states_and_memory_equal_those_of_the_stream(name: str) -> None:
    """After a prompt of other lengths in each row, over the ends of segments, from a memory that is held."""
    model = get_model(name)
    with torch.no_grad():
        model(text_ids(1, 8, start=60), update_memory=model.rows_can_share)
    ids = text_ids(2, 20)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    states = []
    for in_place in (False, True):
        held = model.keep_memory()
        stream = model.open_stream(2)
        stream.feed(ids[:, :7], mask)
        if in_place:
            assert stream.can_step_in_place
            stream.begin_steps(13)
        found = []
        for t in range(7, 20):
            token = ids[:, t : t + 1]
            found.append(stream.read_token(token) if in_place else stream.feed_hidden(token))
            if in_place:
                stream.count_token()
        before = model.get_memory_state()
        if model.rows_can_share:
            stream.close(update_memory=True)
        states.append((torch.cat(found, 1), before, model.get_memory_state(), stream.num_tokens))
        model.restore_memory(held)
    (expected, held_then, memory, count), (found, held_now, memory_now, count_now) = states
    assert_near(found, expected, 1e-10)
    assert_states_near(held_now, held_then, 0)  # steps in place leave what the model holds alone
    assert_states_near(memory_now, memory, 1e-9)
    assert count_now == count


@pytest.mark.parametrize("name", ["pythia", "mixed", "infini-tokens", "infini-alibi"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.2}])
@pytest.mark.parametrize("update_memory", [False, True])
def test_generation_is_the_same(name: str, options: dict, update_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_model(name)
    prompt, mask = text_ids(2, 9), torch.arange(9) >= torch.tensor([[0], [3]])
    options = {"max_new_tokens": 20, "update_memory": update_memory} | options
    free, _ = model.generate(prompt, mask, **options)
    found = []
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(generation, "STEPS_IN_PLACE", devices)
        monkeypatch.setitem(generation.LOOK_EVERY, "cpu", 5 if devices else 1)
        model.reset_memory()
        ids, statistics = model.generate(prompt, mask, eos_token_id=int(free[0, 13]), **options)
        found.append((ids, statistics.row_tokens, model.get_memory_state()))
    assert torch.equal(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]
    assert_states_near(found[1][2], found[0][2], 1e-9)


def test_a_layer_that_runs_its_segment_again_does_not_step_in_place() -> None:
    for name in ("multi_memory-top1", "pythia"):
        assert build_model(STACKS[name]).open_stream(1).can_step_in_place == (name == "pythia")
    assert not create_model("rmt", PythiaConfig(**vars(SHAPE))).open_stream(1).can_step_in_place


# torch.compile takes each model with a memory, its Triton kernels included, as one graph, forwards and back


def check_memory(t: Tensor) -> None:
    """A launch takes addresses, which a tensor has not while torch.compile traces."""
    t.data_ptr()


def sum_causally(x: Tensor, y: Tensor, z: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    check_memory(z)
    return torch.zeros_like(z), z.new_ones(z.shape[:2])


def write_with_delta(state: Tensor, states: Tensor, keys: Tensor, *_: object, **__: object) -> Tensor:
    check_memory(states.zero_())
    return keys.new_zeros(*keys.shape[:-1], state.shape[-1])


def write_sums(state: Tensor, states: Tensor, *_: object, **__: object) -> None:
    check_memory(states.zero_())


@pytest.mark.parametrize(
    "kind", ["infini", "multi_memory", "hierarchical", "gated_delta", "token_memory", "transformer_xl", "rmt"]
)
def test_a_model_with_kernels_is_one_graph(kind, monkeypatch):
    """What the kernels give does not matter here, only that they can't break the graph: stand-ins give shapes."""
    stand_ins = SimpleNamespace(
        sum_causally=sum_causally, write_with_delta=write_with_delta, write_sums=write_sums, invert=torch.clone
    )
    monkeypatch.setattr(kernels, "uses_triton", lambda t, *_: t.dtype == torch.float32)
    monkeypatch.setattr(kernels, "load_triton", lambda: stand_ins)
    torch._dynamo.reset()
    model = create_model(kind, make_shape(num_hidden_layers=1, max_position_embeddings=8))
    logits = torch.compile(model, fullgraph=True, backend="aot_eager")(torch.arange(20).view(1, 20))
    logits.sum().backward()
    assert logits.shape == (1, 20, 64)
    assert all(p.grad is not None for layer in model.layers for p in layer.parameters() if p.requires_grad)


def test_rotary_tables_are_the_same_compiled_and_only_then_import_the_compiler():
    """In another process, as this one has imported it."""
    program = (
        "import sys, torch\n"
        "from new_llm import create_model\n"
        "model, ids = create_model('pythia', size='14m'), torch.arange(9)[None]\n"
        "before = model(ids)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "for layer in model.layers: layer.compile(fullgraph=True, backend='aot_eager')\n"
        "assert torch.equal(model(ids), before)\n"
    )
    run_python("-c", program)
