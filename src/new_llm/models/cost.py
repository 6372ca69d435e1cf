"""What a model costs: the state that reading on needs, the operations of a token, and whether it fits this machine."""

import os
from collections.abc import Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from new_llm.config import UserError
from new_llm.config.files import read_address_limit
from new_llm.formats import format_bytes
from new_llm.models.layers import Layer
from new_llm.models.state import list_tensors
from new_llm.models.transformer import TransformerLM


def count_memory(model: TransformerLM) -> int:
    """Numbers that a row carries from segment to segment: 0 for softmax layers, whose keys are those of the segment."""
    memories = (layer.empty_memory(1, model.embed_in.weight) for layer in model.memory_layers.values())
    return sum(t.numel() for memory in memories for t in memory.tensors().values() if t.is_floating_point())


def count_state(model: TransformerLM) -> int:
    """Numbers that a stream of one row needs at most to read on: memories, and the sums or keys of an open segment.

    They are counted in a stream that stands before the last token of its second segment. A softmax layer keeps 2 D
    numbers for each token of the segment. A layer without a fast `step` keeps its inputs and computes the rest again.
    Where the open segment's state is the memory itself, as it is after each token, the memory from before the segment
    is not read again, and does not count.
    """
    length = 2 * model.segment_length - 1
    with model.fresh_memory(1):
        stream = model.open_stream(1)
        stream.feed_hidden(torch.zeros(1, length, dtype=torch.int64, device=stream.device))
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    opened = {type(one) for states in stream.opened for one in states}
    read = [memory.finish_call() for memory in stream.memories if memory and type(memory) not in opened]
    kept = list_tensors([stream.opened, read])
    found = {t.data_ptr(): t.numel() for t in kept if t.is_floating_point()}  # some hold one tensor under two names
    return sum(number for place, number in found.items() if place not in weights)


@torch.no_grad()
def count_flops(model: TransformerLM, num_tokens: int) -> float:
    """Floating-point operations of the forward pass for each of so many tokens of one row, as they are run.

    Those of products are counted, two for a multiplication and addition: of elementwise operations, of which there are
    far fewer, none. Training takes about three times as many.
    """
    ids = torch.zeros(1, num_tokens, dtype=torch.int64, device=model.embed_in.weight.device)
    # What the counter knows of attention is its products; fused, on a CPU, it does not see them.
    with model.fresh_memory(1), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, update_memory=True)
    return counter.get_total_flops() / num_tokens


def check_fits(layers: Sequence[Layer], vocab_size: int) -> None:
    """Reject a model whose weights and memory are larger than this machine's memory.

    Args:
        layers: made on the meta device, where nothing is allocated.
        vocab_size: rows of the embedding and the head.

    Raises:
        UserError: says how large the model would be.
    """
    limit = read_memory_limit()
    weights = [weight for layer in layers for weight in layer.parameters()]
    needed = sum(weight.numel() * weight.element_size() for weight in weights)
    needed += 2 * vocab_size * layers[0].hidden_size * torch.get_default_dtype().itemsize
    if needed <= limit:  # only then do the sizes of memories fit 64 bits
        needed += sum(layer.memory_bytes for layer in layers)
    if needed > limit:
        raise UserError(
            f"too large: its weights and memory take at least {format_bytes(needed)}, but {format_bytes(limit)} are "
            "what this process may use"
        )


def read_memory_limit() -> int:
    """Bytes that this process can have: the machine's memory, or less where the user has set a limit."""
    machine, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), read_address_limit()
    return machine if limit is None else min(machine, limit)
