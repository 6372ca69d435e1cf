"""The Infini layer: banks of one compressive memory, written in turn, mixed by weights learned per head."""

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from new_llm.config.model import Size
from new_llm.config.sections import section, short
from new_llm.models.layers.base import check_divides, register_layer
from new_llm.models.layers.compressive import CompressiveAttention, CompressiveLayer, MemoryOptions
from new_llm.models.ops import read_memories
from new_llm.models.state import MemoryState


@section
class InfiniOptions(MemoryOptions):
    """The options of an Infini layer."""

    num_memory_heads: Size = 1  # pyright: ignore[reportIncompatibleVariableOverride]
    """Memory heads H, which divide the hidden size; a single head is as wide as the model."""
    num_memory_banks: Annotated[Size, short("--num-memory-banks")] = 1
    """Banks of the memory, written in turn."""
    segments_per_bank: Annotated[Size, short("--segments-per-bank")] = 4
    """Segments written into one bank before the next."""
    use_alibi: Annotated[bool, short("--alibi")] = False
    """Decay the memory by exp(−slope · alibi_scale) at every segment's write."""
    alibi_scale: Annotated[float, Field(ge=0), short("--alibi-scale")] = 1.0
    """Scale of the decay."""


class InfiniAttention(CompressiveAttention):
    """A_mem = Σ_b softmax_b(bank weights) σ(q) M_b / max(σ(q) z_b, ε); one bank has no weights."""

    options_type: ClassVar[type[MemoryOptions]] = InfiniOptions

    def __init__(self, hidden_size: int, num_memory_heads: int, options: InfiniOptions) -> None:
        heads, banks = num_memory_heads, options.num_memory_banks
        check_divides("num_memory_heads", heads, hidden_size)
        decay = [math.exp(-slope * options.alibi_scale) for slope in compute_alibi_slopes(heads)]
        super().__init__(
            hidden_size,
            heads,
            options,
            num_memories=banks,
            segments_per_memory=options.segments_per_bank,
            decay=decay if options.use_alibi else None,
        )
        self.bank_weights = nn.Parameter(torch.zeros(heads, banks)) if banks > 1 else None

    def gate_parameters(self) -> list[nn.Parameter]:
        """β and the bank weights."""
        return [self.gate] if self.bank_weights is None else [self.gate, self.bank_weights]

    def read(self, q: Tensor, memory: MemoryState) -> Tensor:
        """[B, H, S, K] to [B, H, S, V]; all banks are mixed, empty ones add 0."""
        weights = None
        if self.bank_weights is not None:
            weights = self.bank_weights.to(memory.norms.dtype).softmax(-1).t()[None, :, :, None]
        return read_memories(q, memory.memories, memory.norms, epsilon=self.epsilon, weights=weights)

    def weigh(self, products: Tensor, num_tokens: Tensor) -> Tensor | None:
        """The bank weights, [H, 1, N]: the same for every token."""
        return None if self.bank_weights is None else self.bank_weights.to(products.dtype).softmax(-1).unsqueeze(1)


@register_layer("infini", options=InfiniOptions)
class InfiniLayer(CompressiveLayer):
    """Infini-attention (arXiv:2404.07143) with linear attention in place of the local softmax; no positions.

    M ← w M + Σ σ(k)ᵀ(v − r) at each segment's end, A_mem = σ(q) M / max(σ(q) z, ε) before it.

    Arguments are those of `CompressiveLayer`; the memory has one head by default.
    """

    index_key: ClassVar[str] = "current_bank"
    attention_type: ClassVar[type[CompressiveAttention]] = InfiniAttention
    can_step_in_place = True


def compute_alibi_slopes(num_heads: int) -> list[float]:
    """Slopes 2^(−8i/H), i = 1 … H; where H is not a power of 2, interleaved as in ALiBi.

    Source: ALiBi, arXiv:2108.12409, section 3 and its published code for other numbers of heads.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    if power < num_heads:
        slopes += [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * power + 1, 2)][: num_heads - power]
    return slopes
