"""A Pythia layer with a short convolution and no recurrence: a baseline of docs/experiments/addresses.md.

`gated_delta` is better than softmax attention even with an empty memory. This layer tells whether that is due to its
convolution.
"""

from typing import Any

from torch import Tensor

from new_llm.models.layers.base import Block, Layer, Segments, register_layer
from new_llm.models.layers.memory_layer import ShortConvolution
from new_llm.models.layers.pythia import SoftmaxAttention

KERNEL_SIZE = 4  # as in gated_delta


class ConvolvedAttention(SoftmaxAttention):
    """softmax(q kᵀ / √K) v within the segment, where q, k and v are Conv(W x), before rotation.

    Source: Primer, arXiv:2109.08668, section 4 ("multi-dconv-head attention"); the convolution begins anew in each
    segment.
    """

    step, end_segments = Layer.step, Layer.end_segments  # a stream runs the open segment again

    def __init__(self, hidden_size: int, *sizes: Any) -> None:
        super().__init__(hidden_size, *sizes)
        self.convolution = ShortConvolution(3 * hidden_size, KERNEL_SIZE)

    def forward(self, hidden: Tensor, memory: Any, segments: Segments) -> tuple[Tensor, None]:
        mixed = self.query_key_value(hidden.flatten(0, 1))
        mixed = self.convolution(mixed, mixed.new_zeros(len(mixed), KERNEL_SIZE - 1, mixed.shape[2]))
        attended = self.attend(*self.split(mixed))
        return self.dense(attended.transpose(1, 2).reshape(hidden.shape)), memory


@register_layer("convolved_pythia")
class ConvolvedPythia(Block):
    """x + Attention(LN₁ x) + MLP(LN₂ x), with a `ConvolvedAttention`."""

    def make_attention(self, options: Any, *sizes: Any) -> ConvolvedAttention:
        return ConvolvedAttention(*sizes)
