"""Shifted keys: a value is filed under the key of the token before it."""

import torch
from torch import Tensor


def shift_keys(k: Tensor, first: Tensor | None = None) -> Tensor:
    """Each token's key becomes that of the token before it: what is filed under a word is the word that followed it.

    So a query for a context finds what came after such a context, in one layer. It is the shift of H3
    (arXiv:2212.14052, section 3), here of keys.

    Args:
        k: features of the keys, [..., S, K].
        first: what the first token gets, [..., K]; None: 0, so that it is written nowhere.
    """
    before = torch.zeros_like(k[..., :1, :]) if first is None else first.unsqueeze(-2).to(k.dtype)
    return torch.cat((before, k[..., :-1, :]), dim=-2)


def pick_last_key(k: Tensor, last_key: Tensor, valid: Tensor | None) -> Tensor:
    """The features of the last real token's own key, [B, H, K].

    Args:
        k: keys of new tokens, [B, H, T, K], not shifted.
        last_key: what a row without a real token keeps.
        valid: real tokens, [B, T], on the left; None: all.
    """
    if valid is None:
        return k[:, :, -1]
    every = torch.cat((last_key.unsqueeze(2).to(k.dtype), k), dim=2)
    return every[torch.arange(len(k), device=k.device), :, valid.sum(-1)]
