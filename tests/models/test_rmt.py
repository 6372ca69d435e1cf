"""The recurrent memory transformer against its equation, row by row and segment by segment."""

import pytest
import torch
from torch import Tensor

from model_cases import randomize
from new_llm import create_model
from new_llm.models.layers import RecurrentMemoryStack, Segments
from tiny import make_shape

SIZES = (16, 2, 24)


def read_row(stack: RecurrentMemoryStack, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """One row's tokens [T, D]: what comes out, and the memory after the last segment."""
    memory, outputs = stack.first_memory.weight, []
    for segment in x.split(length):
        whole = torch.cat((memory, segment, memory))[None, None]
        for layer in stack.layers:
            whole, _ = layer(whole)
        read, written = whole[0, 0][len(memory) : -len(memory)], whole[0, 0][-len(memory) :]
        memory = stack.memory_norm(written)
        outputs.append(read)
    return torch.cat(outputs), memory


@pytest.mark.parametrize("num_memory_tokens", [1, 3])
def test_the_stack_equals_its_equation(num_memory_tokens):
    """Row 0 has a short last segment; row 1 is whole."""
    stack = RecurrentMemoryStack(*SIZES, num_layers=2, num_memory_tokens=num_memory_tokens)
    randomize(stack)
    stack.double()
    x = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(0)).double()
    valid = torch.arange(4) < torch.tensor([[4, 4, 2], [4, 4, 4]]).unsqueeze(-1)
    with torch.no_grad():
        found, memory = stack(x, None, Segments(valid=valid))
        for row in range(2):
            expected, vectors = read_row(stack, x[row][valid[row]], 4)
            torch.testing.assert_close(found[row][valid[row]], expected, atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(memory.vectors[row], vectors, atol=1e-10, rtol=1e-10)
    assert memory.num_segments.tolist() == [3, 3]


def test_the_model_has_pythias_layers_inside():
    shape = make_shape(hidden_size=16, num_hidden_layers=3, intermediate_size=24)
    model, pythia = create_model("rmt", shape, num_memory_tokens=5), create_model("pythia", shape)
    added = 5 * 16 + 2 * 16  # the first vectors, and a LayerNorm
    assert model.num_parameters()["total"] == pythia.num_parameters()["total"] + added
    assert model.memory_info()["total_bytes"] == 4 * 5 * 16
