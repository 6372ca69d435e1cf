"""The recurrent memory transformer: memory vectors that pass from segment to segment.

A segment's memory vectors come out of the last Pythia layer and go into the first one at the next segment. They involve
the whole stack, so the stack is a single `Layer` here, the only one of its model.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from new_llm.config import PythiaConfig
from new_llm.config.model import MAX_LAYERS, Size
from new_llm.config.sections import section, short
from new_llm.models.layers.base import Layer, Segments, register_layer
from new_llm.models.layers.pythia import PythiaLayer
from new_llm.models.state import LayerMemory


@section
class RecurrentMemoryOptions:
    """The options of a recurrent memory transformer."""

    num_memory_tokens: Annotated[Size, short("--num-memory-tokens")] = 16
    """m: number of memory vectors placed before each segment to be read, and after it to be written."""


@section
class StackOptions(RecurrentMemoryOptions):
    """The options of the stack as a `Layer`."""

    num_layers: Annotated[int, Field(gt=0, le=MAX_LAYERS)] = 1
    """Pythia layers in the stack."""


@dataclass(frozen=True)
class MemoryVectors(LayerMemory):
    """The vectors that the last segment wrote. They belong to a single text, so rows can't share them.

    Attributes:
        vectors: [R, m, D].
        num_segments: segments read, [R], int64; at 0, the learned initial vectors are read instead of `vectors`.
    """

    vectors: Tensor
    num_segments: Tensor

    can_add: ClassVar[bool] = False


@register_layer("rmt", options=StackOptions, model_type=False)
class RecurrentMemoryStack(Layer):
    """[·; Y_s; W_s] = Layers([M_s; X_s; M_s]), M_{s+1} = LN(W_s): causal layers over segment s between memory vectors.

    All tokens of the segment see the vectors in front; the vectors behind see the whole segment. M_1 is learned.
    Source: Recurrent Memory Transformer, arXiv:2207.06881, which has no LN and trains on one segment first, then on
    more (here `data.segment_curriculum`).

    Args:
        num_layers: number of Pythia layers in the stack; the remaining arguments are theirs.
        num_memory_tokens: m.
    """

    has_memory = True

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        num_layers: int = StackOptions.num_layers,
        num_memory_tokens: int = StackOptions.num_memory_tokens,
        rotary_pct: float = PythiaConfig.rotary_pct,
        rotary_emb_base: float = PythiaConfig.rotary_emb_base,
        layer_norm_eps: float = PythiaConfig.layer_norm_eps,
    ) -> None:
        super().__init__()
        StackOptions(num_layers=num_layers, num_memory_tokens=num_memory_tokens)
        self.hidden_size = hidden_size
        self.num_memory_tokens = num_memory_tokens
        rotary = {"rotary_pct": rotary_pct, "rotary_emb_base": rotary_emb_base, "layer_norm_eps": layer_norm_eps}
        self.layers = nn.ModuleList(
            PythiaLayer(hidden_size, num_heads, intermediate_size, **rotary) for _ in range(num_layers)
        )
        self.first_memory = nn.Embedding(num_memory_tokens, hidden_size)
        self.memory_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def empty_memory(self, rows: int, like: Tensor) -> MemoryVectors:
        """See `Layer.empty_memory`."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        vectors = torch.zeros(rows, self.num_memory_tokens, self.hidden_size, dtype=dtype, device=like.device)
        return MemoryVectors(vectors, torch.zeros(rows, dtype=torch.int64, device=like.device))

    def forward(
        self, hidden: Tensor, memory: MemoryVectors | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, MemoryVectors]:
        """See `Layer.forward`; segments run one after another, since each reads the previous one's output."""
        segments = segments or Segments()
        batch, num_segments, length, _ = hidden.shape
        before = self.empty_memory(batch, hidden) if memory is None else memory
        counts = segments.count_tokens(batch, num_segments, length, hidden.device)
        vectors, num_segments_read = before.vectors, before.num_segments
        outputs = []
        for i, x in enumerate(hidden.unbind(1)):
            is_first = (num_segments_read == 0)[:, None, None]
            read = torch.where(is_first, self.first_memory.weight, vectors.to(x.dtype)).to(x.dtype)
            if i + 1 == num_segments and not segments.write_last:
                outputs.append(self._run(torch.cat((read, x), 1))[:, self.num_memory_tokens :])
                continue
            # The vectors to write stand right behind each row's last token. Anything further right is padding, which
            # causal attention hides from them.
            ends = self.num_memory_tokens + counts[:, i, None]
            places = (ends + torch.arange(self.num_memory_tokens, device=x.device)).unsqueeze(-1).expand_as(read)
            mixed = self._run(torch.cat((read, x, torch.zeros_like(read)), 1).scatter(1, places, read))
            outputs.append(mixed[:, self.num_memory_tokens : self.num_memory_tokens + length])
            written = self.memory_norm(mixed.gather(1, places)).to(vectors.dtype)
            has_tokens = counts[:, i] > 0
            vectors = torch.where(has_tokens[:, None, None], written, vectors)
            num_segments_read = num_segments_read + has_tokens
        return torch.stack(outputs, 1), MemoryVectors(vectors, num_segments_read)

    def _run(self, x: Tensor) -> Tensor:
        """Apply all layers to [B, m + S (+ m), D] as one segment."""
        hidden = x.unsqueeze(1)
        for layer in self.layers:
            hidden, _ = cast(Any, layer)(hidden)
        return hidden.squeeze(1)
