"""The Gated DeltaNet layer: one memory per head, decayed and updated at every token."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from new_llm.config.model import MAX_SIZE
from new_llm.config.sections import section
from new_llm.models.layers.base import Attention, Block, Segments, Step, check_divides, register_layer
from new_llm.models.layers.memory_layer import ShortConvolution, TokenDecay
from new_llm.models.ops import convolve_heads, gate_heads, gated_delta_rule, map_features
from new_llm.models.state import LayerMemory, MemoryFacts

EPSILON = 1e-5
"""Added to the mean square that what is read is divided by."""


@section
class GatedDeltaOptions:
    """The options of a Gated DeltaNet layer; each part can be switched off."""

    num_memory_heads: Annotated[int | None, Field(gt=0, le=MAX_SIZE)] = None
    """Number of memory heads H, a divisor of the hidden size; None: as many as softmax attention heads."""
    key_features: Literal["unit", "elu", "softmax"] = "unit"
    """Feature map of queries and keys: "elu", ELU + 1; "unit", signed and of length 1; "softmax", a softmax over K."""
    use_token_decay: bool = True
    """Decay the memory at each token, by a learned factor α per token and head."""
    convolution_size: Annotated[int, Field(ge=0, le=MAX_SIZE)] = 4
    """Width in tokens of a causal convolution over q, k and v; 0: no convolution."""
    use_output_gate: bool = True
    """Multiply what is read from memory by SiLU(W_g x)."""


@dataclass(frozen=True)
class GatedDeltaMemory(LayerMemory):
    """The memory and the convolution's last inputs. They belong to a single text, so rows can't share them.

    Attributes:
        memories: M, [R, 1, H, K, V], float32 or wider.
        inputs: the convolution's input (q, k and v) at the last size − 1 tokens, [R, size − 1, 3 D].
        num_tokens: tokens read, [R], int64.
    """

    memories: Tensor
    inputs: Tensor
    num_tokens: Tensor

    can_add: ClassVar[bool] = False


class GatedDeltaAttention(Attention):
    """W_o (RMSNorm(q_t M_t) ⊙ SiLU(W_g x_t)), M_t = α_t (M_{t−1} − k_tᵀ β_t k_t M_{t−1}) + k_tᵀ β_t v_t.

    q, k and v are SiLU(Conv(W x)), with q and k scaled to length 1. With "elu" or "softmax" as `key_features`, q and k
    are those features of Conv(W x) instead; "elu" is also divided by its sum over K. Each token and head has its own
    β = sigmoid(W_β x) and α = exp(−exp(A) softplus(W_α x + b)). q is multiplied by 1 / √K.
    Source: Gated DeltaNet, arXiv:2412.06464, eq. 10 and figure 1.

    Args:
        hidden_size: D.
        num_heads: H, a divisor of D.
        options: which parts to use.
    """

    has_memory = True

    def __init__(self, hidden_size: int, num_heads: int, options: GatedDeltaOptions) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_size = check_divides("num_memory_heads", num_heads, hidden_size)
        self.key_features = options.key_features
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.strength = nn.Linear(hidden_size, num_heads, bias=False)
        self.convolution = None
        if options.convolution_size:
            self.convolution = ShortConvolution(3 * hidden_size, options.convolution_size)
        self.token_decay = TokenDecay(hidden_size, num_heads) if options.use_token_decay else None
        self.output_gate = nn.Linear(hidden_size, hidden_size, bias=False) if options.use_output_gate else None
        self.norm = nn.RMSNorm(self.head_size, eps=EPSILON)
        self.dense = nn.Linear(hidden_size, hidden_size, bias=False)

    def empty_memory(self, rows: int, like: Tensor) -> GatedDeltaMemory:
        """See `Layer.empty_memory`."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        size = 0 if self.convolution is None else self.convolution.size - 1
        return GatedDeltaMemory(
            torch.zeros(rows, 1, self.num_heads, self.head_size, self.head_size, dtype=dtype, device=like.device),
            torch.zeros(rows, size, 3 * self.dense.in_features, dtype=dtype, device=like.device),
            torch.zeros(rows, dtype=torch.int64, device=like.device),
        )

    def forward(
        self, hidden: Tensor, memory: GatedDeltaMemory | None, segments: Segments
    ) -> tuple[Tensor, GatedDeltaMemory]:
        """Read a row's segments as one sequence; segment boundaries matter only if `write_last` is False."""
        batch, num_segments, length, _ = hidden.shape
        num_writes = num_segments - (not segments.write_last)
        mixed, memory = self._read(
            hidden.flatten(1, 2),
            self.empty_memory(batch, hidden) if memory is None else memory,
            None if segments.valid is None else segments.valid.flatten(1),
            segments.count_tokens(batch, num_writes, length, hidden.device).sum(1),
            num_writes * length,
        )
        return mixed.view_as(hidden), memory

    def _read(
        self, x: Tensor, memory: GatedDeltaMemory, valid: Tensor | None, counts: Tensor, num_written: int
    ) -> tuple[Tensor, GatedDeltaMemory]:
        """Read x [B, T, D]. The memory returned contains the first `num_written` tokens, `counts` [B] of them real."""
        inputs, wide = self.query_key_value(x), memory.memories.dtype
        gate = None if self.output_gate is None else self.output_gate(x)
        beta = self.strength(x).to(wide).sigmoid()
        log_decay = torch.zeros_like(beta) if self.token_decay is None else self.token_decay(x)
        if valid is not None:  # a masked token neither writes nor decays the memory
            beta, log_decay = beta * valid.unsqueeze(-1), log_decay * valid.unsqueeze(-1)
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = self._split_heads(inputs, memory.inputs, wide)
            kept = memory.inputs
            if self.convolution is not None:
                kept = self.convolution.keep(inputs, memory.inputs, counts)
            rates = beta.transpose(1, 2), log_decay.transpose(1, 2)
            reads, written = gated_delta_rule(q, k, v, *rates, memory.memories[:, 0], num_written=num_written)
            mixed = gate_heads(reads, self.norm.weight, gate, EPSILON)
        return self.dense(mixed), GatedDeltaMemory(written.unsqueeze(1), kept, memory.num_tokens + counts)

    def _split_heads(self, x: Tensor, before: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, H, T, K] of x [B, T, 3 D], after the convolution and SiLU; q multiplied by 1 / √K."""
        scale = self.head_size**-0.5
        if self.convolution is not None and self.key_features == "unit":
            found = convolve_heads(x, before, self.convolution.weight, self.num_heads, scale)
            if found is not None:
                return found
        if x.device.type == "cpu":  # 16-bit convolutions and SiLU's backward are several times slower on a CPU
            x = x.to(wide)
        x = x if self.convolution is None else self.convolution(x, before)
        q, k, v = x.unflatten(-1, (3, self.num_heads, self.head_size)).permute(2, 0, 3, 1, 4).unbind(0)
        return self._map(q.to(wide)) * scale, self._map(k.to(wide)), F.silu(v)

    def _map(self, x: Tensor) -> Tensor:
        """Map queries or keys to features of length at most 1, which keeps the delta rule stable."""
        features = map_features(F.silu(x) if self.key_features == "unit" else x, self.key_features)
        return features / features.sum(-1, keepdim=True) if self.key_features == "elu" else features

    def step(
        self, hidden: Tensor, opened: GatedDeltaMemory | None, memory: GatedDeltaMemory | None, step: Step
    ) -> tuple[Tensor, GatedDeltaMemory]:
        """See `Layer.step`; the open segment's state is the memory itself, updated at each token."""
        begun = opened
        if opened is None or step.start is None or step.start == 0:
            begun = self.empty_memory(len(hidden), hidden) if memory is None else memory
            if opened is not None and step.start is None:
                begun = begun.select_rows(step.offsets == 0, opened)
        assert begun is not None
        return self._read(hidden, begun, step.valid, step.count_tokens(), hidden.shape[1])

    def end_segments(
        self, opened: GatedDeltaMemory, memory: GatedDeltaMemory | None, ended: Tensor
    ) -> tuple[GatedDeltaMemory, GatedDeltaMemory]:
        """See `Layer.end_segments`; the ended rows' state becomes their memory, where the next segment starts."""
        return opened, opened.select_rows(ended, opened.emptied() if memory is None else memory)


@register_layer("gated_delta", options=GatedDeltaOptions)
class GatedDeltaLayer(Block):
    """x + GatedDelta(LN₁ x) + MLP(LN₂ x): Gated DeltaNet's mixer (arXiv:2412.06464) in a GPT-NeoX block.

    Memory is written and read at every token; segment boundaries make no difference. The arguments are `Block`'s.
    There are no positions, so the rotary arguments have no effect; `num_heads` is used if `num_memory_heads` is None.
    """

    has_memory = True
    can_step_in_place = True

    def make_attention(self, options: Any, hidden_size: int, num_heads: int, *_: Any) -> GatedDeltaAttention:
        """See `Block.make_attention`."""
        return GatedDeltaAttention(hidden_size, options.num_memory_heads or num_heads, options)

    @property
    def memory_facts(self) -> MemoryFacts:
        """See `Layer.memory_facts`."""
        return MemoryFacts(layer_kind=self.kind, keys={"num_tokens": "token_counts"})
