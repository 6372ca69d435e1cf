"""Whether a model fits this machine, asked before any of it is allocated."""

import os
from collections.abc import Sequence

import torch

from new_llm.config import UserError
from new_llm.config.files import read_address_limit
from new_llm.formats import format_bytes
from new_llm.models.layers import Layer


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
