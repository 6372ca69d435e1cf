"""What a model costs: the size of its memory and stream state, its FLOPs per token, and whether it fits in memory."""

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
    """Number of values that one row carries between segments; 0 for Pythia layers, whose keys stay in the segment."""
    memories = (layer.empty_memory(1, model.embed_in.weight) for layer in model.memory_layers.values())
    return sum(t.numel() for memory in memories for t in memory.tensors().values() if t.is_floating_point())


def count_state(model: TransformerLM) -> int:
    """Maximum number of values that a one-row stream must hold: memories, and the sums or keys of an open segment.

    Counted in a stream that has read two segments but for one token. A softmax layer holds 2 D values for each token of
    the segment. A layer without a `step` of its own holds its inputs and recomputes the rest. If the open segment's
    state is the memory itself, updated at each token, then the memory from before the segment is no longer needed and
    does not count.
    """
    length = 2 * model.segment_length - 1
    with model.fresh_memory(1):
        stream = model.open_stream(1)
        stream.feed_hidden(torch.zeros(1, length, dtype=torch.int64, device=stream.device))
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    opened = {type(one) for states in stream.opened for one in states}
    read = [memory.finish_call() for memory in stream.memories if memory and type(memory) not in opened]
    kept = list_tensors([stream.opened, read])
    found = {t.data_ptr(): t.numel() for t in kept if t.is_floating_point()}  # count shared tensors once
    return sum(number for place, number in found.items() if place not in weights)


@torch.no_grad()
def count_flops(model: TransformerLM, num_tokens: int) -> float:
    """FLOPs per token of the forward pass over one row of `num_tokens` tokens, as actually executed.

    Only matrix products are counted, as two operations per multiply-add; elementwise operations are far fewer. Training
    takes about three times as many.
    """
    ids = torch.zeros(1, num_tokens, dtype=torch.int64, device=model.embed_in.weight.device)
    # The counter does not see the products inside a CPU's fused attention, so use the unfused one.
    with model.fresh_memory(1), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, update_memory=True)
    return counter.get_total_flops() / num_tokens


def check_fits(layers: Sequence[Layer], vocab_size: int) -> None:
    """Raise UserError if a model's weights and memory exceed this machine's memory; `layers` are on the meta device."""
    limit = read_memory_limit()
    weights = [weight for layer in layers for weight in layer.parameters()]
    needed = sum(weight.numel() * weight.element_size() for weight in weights)
    needed += 2 * vocab_size * layers[0].hidden_size * torch.get_default_dtype().itemsize
    if needed <= limit:  # otherwise the sizes of memories might not fit in 64 bits
        needed += sum(layer.memory_bytes for layer in layers)
    if needed > limit:
        raise UserError(
            f"too large: its weights and memory take at least {format_bytes(needed)}, but this process can use only "
            f"{format_bytes(limit)}"
        )


def read_memory_limit() -> int:
    """Bytes that this process can use: the machine's memory, or the user's limit if that is lower."""
    machine, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), read_address_limit()
    return machine if limit is None else min(machine, limit)
