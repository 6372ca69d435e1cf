"""A short causal convolution of each channel: it lets a key depend on the few tokens before its own."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """y_t = Σ_i w_i ⊙ x_{t−i}, i = 0 … size − 1, a weight for each channel and distance, no bias.

    Source: H3, arXiv:2212.14052, section 3; of this size as in Mamba, arXiv:2312.00752, and Gated DeltaNet.

    Args:
        channels: width C of x.
        size: tokens that each output sees, its own included.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, size))

    def forward(self, x: Tensor, before: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Read the next tokens of a row.

        Args:
            x: [B, T, C].
            before: the inputs of the size − 1 tokens before them, [B, size − 1, C]; zeros where there are none.
            counts: tokens after which the returned inputs are taken, [B].

        Returns:
            y [B, T, C], and the last size − 1 inputs after `counts` tokens, as `before`.
        """
        stream = torch.cat((before.to(x.dtype), x), dim=1)
        # channels are last in memory, and torch convolves such images without moving them
        y = F.conv2d(stream.transpose(1, 2).unsqueeze(2), self.weight[:, None, None].to(x.dtype), groups=x.shape[2])
        places = counts.unsqueeze(1) + torch.arange(before.shape[1], device=x.device)
        kept = stream.gather(1, places.unsqueeze(-1).expand_as(before))
        return y.squeeze(2).transpose(1, 2), kept.to(before.dtype)
