"""A training step and a generated token ask the device nothing and copy nothing that the host waits for.

The device is torch's `meta`: whatever needs a value (`.item()`, `bool(tensor)`, indices of a mask) raises there, and
copies from the host are seen as operations. A GPU's own count is in `benchmarks/gpu_check.py`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from new_llm.config.model import GenerationConfig
from new_llm.models import create_model
from new_llm.models.factory import MODEL_KINDS
from new_llm.models.sampling import TokenSampler
from tiny import make_shape

SHAPE = make_shape()
OPTIONS: dict[str, dict[str, Any]] = {
    "infini": {"use_alibi": True, "num_memory_banks": 2},
    "multi_memory": {"router": "top1"},
    "hierarchical": {"hierarchy": "fenwick"},
    "selective": {"skip_interval": 1, "earlier_pass_weight": 0.5},
}


class WatchCopies(TorchDispatchMode):
    """Collects copies from the host that are not `non_blocking`."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_meta:
            from_host = any(isinstance(arg, Tensor) and not arg.is_meta and arg.dim() for arg in args)
            is_free = (kwargs or {}).get("non_blocking") or (func._schema.name == "aten::copy_" and args[2:])
            if from_host and not is_free:
                self.found.append(str(func))
        return result


class WatchNumbers(TorchFunctionMode):
    """Collects tensors on the device that are made of Python's numbers."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and result.is_meta:
            self.found.append(str(func))
        return result


@contextlib.contextmanager
def watch() -> Iterator[list[str]]:
    """Inside the block: a list of what the host waits for."""
    found: list[str] = []
    is_off = {
        "autocast": lambda *arguments, **options: contextlib.nullcontext(),
        "is_autocast_enabled": lambda kind: False,
    }
    with mock.patch.multiple(torch, **is_off), WatchCopies(found), WatchNumbers(found):  # autocast knows no meta
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


@pytest.mark.parametrize(
    "kind", ["pythia", "infini", "hierarchical", "transformer_xl", "gated_delta", "rmt", "token_memory", "selective"]
)
def test_a_generated_token_waits_for_nothing(kind):
    """In the middle of a segment, with every option of drawing, after a prompt of more than a segment."""
    with torch.device("meta"):
        model = create_model(kind, SHAPE, segment_length=8)
    ids = torch.zeros(2, 11, dtype=torch.int64, device="meta")
    config = GenerationConfig(do_sample=True, top_p=0.9, repetition_penalty=1.2)
    sampler = TokenSampler(config, ids, torch.ones_like(ids, dtype=torch.bool), SHAPE.vocab_size)
    stream = model.open_stream(2)
    with watch() as found:
        hidden = stream.feed_hidden(ids)
        for _ in range(3):
            hidden = stream.feed_hidden(sampler.choose(model.embed_out(hidden[:, -1])).unsqueeze(1))
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
