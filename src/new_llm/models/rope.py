"""Rotary position embedding of GPT-NeoX: the first `rotary_dim` of a head's dimensions are rotated."""

import torch
from torch import Tensor


def compute_rotary_angles(positions: Tensor, rotary_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of p · base^(−2i / rotary_dim), i = 0 … rotary_dim / 2 − 1, each twice in a row of blocks.

    Source: RoFormer, arXiv:2104.09864, eq. 15, in the half-split layout of GPT-NeoX. Angles are computed in float32
    whatever the model's dtype, as Hugging Face does, so that logits agree in float64 too.

    Args:
        positions: token positions, [...], integers.
        rotary_dim: rotated dimensions of a head, even.
        base: base of the wavelengths.
        dtype: dtype of the result.

    Returns:
        cos and sin, each [..., rotary_dim].
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device) / rotary_dim
    angles = positions.to(torch.float32).unsqueeze(-1) * (1.0 / base**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of queries or keys [..., T, K] by cos and sin [..., T, rotary_dim]."""
    rotary_dim = cos.shape[-1]
    rotated, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    turned = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, passed), dim=-1)
