"""The parallel adapter: a memory beside a whole Pythia layer, which it leaves as it is."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from new_llm.config import AdapterLayerConfig, MemoryConfig, PythiaConfig
from new_llm.models.layers.base import Segments, Step, register_layer
from new_llm.models.layers.compressive import OpenSegment
from new_llm.models.layers.infini import InfiniAttention, InfiniLayer
from new_llm.models.layers.memory_layer import MemoryLayer
from new_llm.models.layers.pythia import KeyValueCache, PythiaLayer
from new_llm.models.state import MemoryState


@dataclass(frozen=True)
class OpenBranches:
    """What the two branches keep of the open segments."""

    base: KeyValueCache | None
    infini: OpenSegment | None


@register_layer
class ParallelInfiniLayer(MemoryLayer):
    """Base(x) + α · Infini(LN x): a GPT-NeoX layer, and beside it an Infini attention that reads the same input.

    Infini is that of `InfiniLayer`: compressive memory, local linear attention, gates, and an output projection. With
    α = 0 the layer's output is the base layer's, bit for bit; what it holds in memory never changes that.

    Args:
        hidden_size: D.
        num_heads: heads of the base layer's softmax attention.
        intermediate_size: width of the base layer's MLP.
        rotary_pct: share of each head of the base layer that is rotated.
        rotary_emb_base: base of its rotary wavelengths.
        layer_norm_eps: ε of all LayerNorms.
        num_memory_heads: H; None: one head, as wide as the model.
        num_memory_banks: banks, written in turn.
        segments_per_bank: segments written into one bank before the next.
        use_delta_rule: write v − r in place of v.
        use_key_shift: file each value under the key of the token before it in the segment.
        normalize_keys: divide each key's features by their sum.
        use_alibi: decay the memory at each write by w = exp(−slope · alibi_scale) a head.
        alibi_scale: scale of the decay.
        gate_init: initial β; g = sigmoid(β) is the share of memory in Infini's output.
        query_key_init_scale: W_q and W_k begin so many times as large as other weights.
        query_key_init_bias: the initial bias of q and k; below 0 few features of a token are large.
        match_query_key_init: W_k begins as W_q, so that alike tokens find one another.
        memory_epsilon: ε, the least divisor of a read.
        initial_alpha: α at the start.
        base_name: the directory or hub name that the base layer's weights come from, for the record.

    Raises:
        ValueError: heads that do not divide the hidden size, or a count that is not positive.
    """

    kind: ClassVar[str] = "parallel_infini"
    index_key: ClassVar[str] = InfiniLayer.index_key

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        rotary_pct: float = PythiaConfig.rotary_pct,
        rotary_emb_base: float = PythiaConfig.rotary_emb_base,
        layer_norm_eps: float = PythiaConfig.layer_norm_eps,
        num_memory_heads: int | None = None,
        num_memory_banks: int = MemoryConfig.num_memory_banks,
        segments_per_bank: int = MemoryConfig.segments_per_bank,
        use_delta_rule: bool = MemoryConfig.use_delta_rule,
        use_key_shift: bool = MemoryConfig.use_key_shift,
        normalize_keys: bool = MemoryConfig.normalize_keys,
        use_alibi: bool = MemoryConfig.use_alibi,
        alibi_scale: float = MemoryConfig.alibi_scale,
        gate_init: float = MemoryConfig.gate_init,
        query_key_init_scale: float = MemoryConfig.query_key_init_scale,
        query_key_init_bias: float = MemoryConfig.query_key_init_bias,
        match_query_key_init: bool = MemoryConfig.match_query_key_init,
        memory_epsilon: float = MemoryConfig.memory_epsilon,
        initial_alpha: float = AdapterLayerConfig.initial_alpha,
        base_name: str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not Layer's: the norms and the MLP around the base's attention are the base's own
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.base_name = base_name
        self.base_layer = PythiaLayer(
            hidden_size,
            num_heads,
            intermediate_size,
            rotary_pct=rotary_pct,
            rotary_emb_base=rotary_emb_base,
            layer_norm_eps=layer_norm_eps,
        )
        self.input_layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.attention = InfiniAttention(
            hidden_size,
            num_memory_heads,
            num_memory_banks=num_memory_banks,
            segments_per_bank=segments_per_bank,
            use_delta_rule=use_delta_rule,
            use_key_shift=use_key_shift,
            normalize_keys=normalize_keys,
            use_alibi=use_alibi,
            alibi_scale=alibi_scale,
            gate_init=gate_init,
            query_key_init_scale=query_key_init_scale,
            query_key_init_bias=query_key_init_bias,
            match_query_key_init=match_query_key_init,
            epsilon=memory_epsilon,
        )
        self.alpha = nn.Parameter(torch.tensor(float(initial_alpha)))

    def read_segments(
        self, hidden: Tensor, memory: MemoryState | None, segments: Segments
    ) -> tuple[Tensor, MemoryState | None]:
        """Whole segments through both branches; see `Layer.forward`."""
        base, _ = self.base_layer(hidden, None, segments)
        recalled, memory = self.attention(self.input_layernorm(hidden), memory, segments)
        return self._add(base, recalled), memory

    def step(
        self, hidden: Tensor, opened: OpenBranches | None, memory: MemoryState | None, step: Step
    ) -> tuple[Tensor, OpenBranches]:
        """Some more tokens through both branches; see `Layer.step`."""
        opened = opened or OpenBranches(None, None)
        base, cache = self.base_layer.step(hidden, opened.base, None, step)
        recalled, sums = self.attention.step(self.input_layernorm(hidden), opened.infini, memory, step)
        return self._add(base, recalled), OpenBranches(cache, sums)

    def end_segments(
        self, opened: OpenBranches | None, memory: MemoryState | None, ended: Tensor
    ) -> tuple[Any, MemoryState | None]:
        """Write and clear the open segments of some rows; see `Layer.end_segments`."""
        if opened is None:
            return None, memory
        sums, memory = self.attention.end_segments(opened.infini, memory, ended)
        cache, _ = self.base_layer.end_segments(opened.base, None, ended)
        return OpenBranches(cache, sums), memory

    def _add(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        return hidden + self.alpha.to(mixed.dtype) * mixed

    def gate_parameters(self) -> list[nn.Parameter]:
        """β, the bank weights and α."""
        return [*super().gate_parameters(), self.alpha]

    def adapter_state(self) -> dict[str, Tensor]:
        """The layer's own weights by name: all but the base layer's."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("base_layer.")}
