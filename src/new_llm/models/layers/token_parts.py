"""Small parts of layers with memory: a short convolution over tokens, and how far each token lets a memory fade."""

import math

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
        self.size = size
        self.weight = nn.Parameter(torch.zeros(channels, size))

    @torch.no_grad()
    def draw(self) -> None:
        """Draw the weights, uniform in ±1/√size."""
        nn.init.uniform_(self.weight, -1, 1).div_(math.sqrt(self.size))

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """y of the next tokens x [B, T, C], and all inputs, those of `before` first.

        Args:
            x: [B, T, C].
            before: the inputs of the size − 1 tokens before them, [B, size − 1, C]; zeros where there are none.
        """
        inputs = torch.cat((before.to(x.dtype), x), dim=1)
        # channels are last in memory, and torch convolves such images without moving them
        y = F.conv2d(inputs.transpose(1, 2).unsqueeze(2), self.weight[:, None, None].to(x.dtype), groups=x.shape[2])
        return y.squeeze(2).transpose(1, 2), inputs

    def keep(self, inputs: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
        """The last size − 1 of all inputs after `counts` [B] new tokens, [B, size − 1, C]."""
        places = counts.unsqueeze(1) + torch.arange(self.size - 1, device=counts.device)
        return inputs.gather(1, places.unsqueeze(-1).expand(-1, -1, inputs.shape[2])).to(dtype)


class TokenDecay(nn.Module):
    """log α = −exp(A) softplus(W x + b), a number for each token and head.

    Source: Mamba-2, arXiv:2405.21060, section 7, and Gated DeltaNet, arXiv:2412.06464, section 3.4.

    Args:
        hidden_size: width D of x.
        num_heads: H.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, num_heads, bias=False)
        self.rate = nn.Parameter(torch.zeros(num_heads))
        self.bias = nn.Parameter(torch.zeros(num_heads))

    @torch.no_grad()
    def draw(self) -> None:
        """Draw A and b so that heads fade at different rates: exp(A) in 1 … 16, softplus(b) in 0.001 … 0.1."""
        nn.init.uniform_(self.rate, 1, 16).log_()
        steps = nn.init.uniform_(self.bias, math.log(0.001), math.log(0.1)).exp()
        self.bias.copy_(steps.expm1().log())  # the inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., H], float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return -self.rate.to(wide).exp() * F.softplus(self.linear(x).to(wide) + self.bias)
