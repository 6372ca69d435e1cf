"""torch.compile takes each model with a memory, its Triton kernels included, as one graph, forwards and back."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from new_llm import create_model
from new_llm.models.ops import kernels
from tiny import ENVIRONMENT, make_shape

CONFIG = make_shape(vocab_size=32, hidden_size=16, num_hidden_layers=1, intermediate_size=16, max_position_embeddings=8)


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


KINDS = ("infini", "multi_memory", "hierarchical", "gated_delta", "token_memory", "transformer_xl", "rmt")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_kernels_is_one_graph(kind, monkeypatch):
    """What the kernels give does not matter here, only that they can't break the graph: stand-ins give shapes."""
    stand_ins = SimpleNamespace(
        sum_causally=sum_causally, write_with_delta=write_with_delta, write_sums=write_sums, invert=torch.clone
    )
    monkeypatch.setattr(kernels, "uses_triton", lambda t, *_: t.dtype == torch.float32)
    monkeypatch.setattr(kernels, "load_triton", lambda: stand_ins)
    torch._dynamo.reset()
    model = create_model(kind, CONFIG)
    ids = torch.arange(20).view(1, 20)
    logits = torch.compile(model, fullgraph=True, backend="aot_eager")(ids)
    logits.sum().backward()
    assert logits.shape == (1, 20, 32)
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
    subprocess.run([sys.executable, "-c", program], check=True, env=ENVIRONMENT)
