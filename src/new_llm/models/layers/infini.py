"""The Infini layer: compressive memory in one or more banks, written in turn and mixed by weights learned per head.

Also the parallel adapter, which adds such a memory to an unchanged Pythia layer.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from new_llm.config import PythiaConfig, UserError
from new_llm.config.model import Size
from new_llm.config.sections import section, short
from new_llm.models.layers.base import Segments, Step, check_divides, register_layer
from new_llm.models.layers.compressive import CompressiveAttention, CompressiveLayer, MemoryOptions, OpenSegment
from new_llm.models.layers.memory_layer import MemoryLayer
from new_llm.models.layers.pythia import KeyValueCache, PythiaLayer
from new_llm.models.state import MemoryState


@section
class InfiniOptions(MemoryOptions):
    """The options of an Infini layer."""

    num_memory_heads: Size = 1  # pyright: ignore[reportIncompatibleVariableOverride]
    """Number of memory heads H, a divisor of the hidden size; a single head is as wide as the model."""
    num_memory_banks: Annotated[Size, short("--num-memory-banks")] = 1
    """Number of memory banks, written in turn."""
    segments_per_bank: Annotated[Size, short("--segments-per-bank")] = 4
    """Number of segments written to one bank before moving on to the next."""
    use_alibi: Annotated[bool, short("--alibi")] = False
    """Decay a bank by exp(−slope · alibi_scale) whenever a segment is written to it, with ALiBi's slope per head."""
    alibi_scale: Annotated[float, Field(ge=0), short("--alibi-scale")] = 1.0
    """Scale of use_alibi's decay; 0: no decay."""


class InfiniAttention(CompressiveAttention):
    """A_mem = Σ_b softmax_b(bank weights) σ(q) M_b / max(σ(q) z_b, ε); a single bank needs no weights."""

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

    def weigh(self, products: Tensor, num_tokens: Tensor) -> Tensor | None:
        """The bank weights, [H, 1, N], the same for every token. Empty banks are included; they contribute 0."""
        return None if self.bank_weights is None else self.bank_weights.to(products.dtype).softmax(-1).unsqueeze(1)


@register_layer("infini", options=InfiniOptions)
class InfiniLayer(CompressiveLayer):
    """Infini-attention (arXiv:2404.07143) with linear attention in place of the local softmax; no positions.

    Within a segment A_mem = σ(q) M / max(σ(q) z, ε); at its end M ← w M + Σ σ(k)ᵀ(v − r).

    The arguments are `Block`'s; the memory has one head by default.
    """

    index_key: ClassVar[str] = "current_bank"
    attention_type: ClassVar[type[CompressiveAttention]] = InfiniAttention


def compute_alibi_slopes(num_heads: int) -> list[float]:
    """ALiBi's slopes 2^(−8i/H), i = 1 … H.

    Source: ALiBi, arXiv:2108.12409, section 3. If H is not a power of 2, the slopes for the next lower power are
    followed by every second slope for twice that power, as in the published code.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    if power < num_heads:
        slopes += [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * power + 1, 2)][: num_heads - power]
    return slopes


# The parallel adapter


@section
class ParallelInfiniOptions(InfiniOptions):
    """The options of a memory branch: Base(x) + α · Infini(LN x)."""

    initial_alpha: Annotated[float, short("--initial-alpha")] = 0.0
    """Initial α; with 0 the adapted model starts out bit-identical to the base."""


@section
class AdapterConfig(ParallelInfiniOptions):
    """The adapter section: which layers of a GPT-NeoX get a memory branch, and how it starts."""

    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), short("--layers")] = (0,)
    """Indices of the layers that get a memory branch."""
    init: Annotated[Literal["base", "random"], short("--init")] = "base"
    """Initial weights of the branch: a copy of the base layer's attention weights, or random ones."""
    zero_init_dense: Annotated[bool, short("--zero-init-dense")] = False
    """Initialise the output projection to zero, so that the adapted model starts equal to the base with any α."""
    freeze_base_model: Annotated[bool, short("--freeze")] = True
    """Train only the adapter's weights."""

    def __post_init__(self) -> None:
        if len(set(self.layers)) != len(self.layers):
            raise UserError(f"adapter.layers: {list(self.layers)} names a layer twice")


@dataclass(frozen=True)
class OpenBranches:
    """Both branches' states of the open segments."""

    base: KeyValueCache | None
    infini: OpenSegment | None


@register_layer("parallel_infini", options=ParallelInfiniOptions, model_type=False)
class ParallelInfiniLayer(MemoryLayer):
    """Base(x) + α · Infini(LN x): a GPT-NeoX layer with a parallel Infini attention on the same input.

    Infini is the attention of `InfiniLayer`, with its memory, local attention, gates and output projection. With α = 0
    the output equals the base layer's bit for bit, whatever the memory holds.

    The arguments are `Block`'s, for the base layer, the options fields of `ParallelInfiniOptions`. `base_name`, the
    directory or hub name of the base layer's weights, is only recorded.
    """

    index_key: ClassVar[str] = InfiniLayer.index_key
    can_step_in_place = True

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        rotary_pct: float = PythiaConfig.rotary_pct,
        rotary_emb_base: float = PythiaConfig.rotary_emb_base,
        layer_norm_eps: float = PythiaConfig.layer_norm_eps,
        base_name: str | None = None,
        **options: Any,
    ) -> None:
        chosen = ParallelInfiniOptions(**options)
        super().__init__()
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.base_name = base_name
        rotary = {"rotary_pct": rotary_pct, "rotary_emb_base": rotary_emb_base, "layer_norm_eps": layer_norm_eps}
        self.base_layer = PythiaLayer(hidden_size, num_heads, intermediate_size, **rotary)
        self.input_layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.attention = InfiniAttention(hidden_size, chosen.num_memory_heads, chosen)
        self.attention.set_positions(rotary_pct, rotary_emb_base)
        self.alpha = nn.Parameter(torch.tensor(float(chosen.initial_alpha)))

    def forward(
        self, hidden: Tensor, memory: MemoryState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, MemoryState | None]:
        """See `Layer.forward`."""
        segments = segments or Segments()
        base, _ = self.base_layer(hidden, None, segments)
        recalled, memory = self.attention(self.input_layernorm(hidden), memory, segments)
        return self.add(base, recalled), memory

    def step(
        self, hidden: Tensor, opened: OpenBranches | None, memory: MemoryState | None, step: Step
    ) -> tuple[Tensor, OpenBranches]:
        """See `Layer.step`."""
        opened = opened or OpenBranches(None, None)
        base, cache = self.base_layer.step(hidden, opened.base, None, step)
        recalled, sums = self.attention.step(self.input_layernorm(hidden), opened.infini, memory, step)
        return self.add(base, recalled), OpenBranches(cache, sums)

    def end_segments(
        self, opened: OpenBranches, memory: MemoryState | None, ended: Tensor
    ) -> tuple[OpenBranches, MemoryState | None]:
        """See `Layer.end_segments`."""
        sums, memory = self.attention.end_segments(opened.infini, memory, ended)
        cache, _ = self.base_layer.end_segments(opened.base, None, ended)
        return OpenBranches(cache, sums), memory

    def add(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """Base(x) + α · Infini(LN x)."""
        return hidden + self.alpha.to(mixed.dtype) * mixed

    def gate_parameters(self) -> list[nn.Parameter]:
        """α; the attention has gates of its own."""
        return [self.alpha]
