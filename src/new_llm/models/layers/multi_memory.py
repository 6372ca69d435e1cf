"""The multi-memory layer: independent memories, and a router that selects which to read and, with top1, to write."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from new_llm.config.model import Size
from new_llm.config.sections import section, short
from new_llm.models.layers.base import Layer, Segments, register_layer
from new_llm.models.layers.compressive import CompressiveAttention, CompressiveLayer, MemoryOptions
from new_llm.models.ops import weigh_memories
from new_llm.models.state import MemoryState


@section
class SelectionOptions(MemoryOptions):
    """The options of layers that select among several memories."""

    num_memories: Annotated[Size, short("--num-memories")] = 4
    """Number of independent memories, written in turn; router top1 adds one that all tokens share."""
    selection_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature τ of the softmax over memories: near 0 a token reads one memory, far above 1 all of them equally."""
    router: Annotated[Literal["relevance", "standardized", "top1"], short("--router")] = "relevance"
    """How a token selects memories. relevance: by its attention to their z. standardized: by the same scores,
    standardised over the memories, with a temperature learned per head. top1 (multi_memory only): a learned router
    sends each token to one memory, and a shared memory receives all tokens."""


@section
class MultiMemoryOptions(SelectionOptions):
    """The options of a multi-memory layer."""

    balance_weight: Annotated[float, Field(ge=0)] = 0.01
    """With router top1: weight of the auxiliary loss that spreads tokens over all memories."""


class SelectingAttention(CompressiveAttention):
    """An attention that selects among its memories and lets `watch_selection` record the selection."""

    watched: list[tuple[Tensor, Tensor]] | None = None
    """If this is a list, each call appends its selection to it."""

    def _watch(self, weights: Tensor, num_filled: Tensor) -> None:
        if self.watched is not None:
            self.watched.append((weights.detach(), num_filled))


def score_features(layer: nn.Linear, features: Tensor, dtype: torch.dtype) -> Tensor:
    """W LN(features of all heads) + b in `dtype`, [..., H, S, K] to [..., S, N]; LN is a LayerNorm without weights."""
    joined = features.transpose(-2, -3).flatten(-2).to(dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(F.layer_norm(joined, joined.shape[-1:]), layer.weight.to(dtype), bias)


def measure_entropy(weights: Tensor, num_filled: Tensor) -> Tensor:
    """Each token's selection entropy divided by its maximum: 0 if it reads one memory, 1 if it reads all equally.

    The arguments are one entry of `watch_selection`. Tokens that find fewer than two filled memories have no choice
    and are left out.
    """
    entropy = torch.special.entr(weights.double()).sum(-1)
    num_filled = num_filled.expand(entropy.shape)
    return (entropy / num_filled.double().log())[num_filled > 1].flatten()


@contextmanager
def watch_selection(attention: SelectingAttention) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record each call's selection: its weights [..., T, N], and the number of filled memories that it chose from."""
    found: list[tuple[Tensor, Tensor]] = []
    attention.watched = found
    try:
        yield found
    finally:
        attention.watched = None


class MultiMemoryAttention(SelectingAttention):
    """A_mem = Σ_m w_m σ(q) M_m / max(σ(q) z_m, ε), with w = softmax(s / τ) over the filled memories.

    s_m = σ(q)·(z_m / n_m) / √K, with n_m the number of tokens that memory m has seen. With `router: standardized`, s is
    standardised over the filled memories, and τ is learned per head.
    """

    def __init__(self, hidden_size: int, num_memory_heads: int, options: Any) -> None:
        super().__init__(
            hidden_size, num_memory_heads, options, num_memories=options.num_memories, segments_per_memory=1
        )
        self.selection_temperature = options.selection_temperature
        self.log_temperature = None
        if options.router == "standardized":
            self.log_temperature = nn.Parameter(torch.full((num_memory_heads,), math.log(self.selection_temperature)))

    def gate_parameters(self) -> list[nn.Parameter]:
        """β, and log τ if it is learned."""
        return super().gate_parameters() + ([] if self.log_temperature is None else [self.log_temperature])

    def weigh(self, products: Tensor, num_tokens: Tensor) -> Tensor | None:
        """The weight of each memory for each token, [B, n, H, S, N]."""
        options: dict[str, Any] = {"temperature": self.selection_temperature}
        if self.log_temperature is not None:
            options = {"temperature": self.log_temperature.exp(), "standardize": True}
        weights = weigh_memories(products, num_tokens, width=self.head_size, **options)
        self._watch(weights, (num_tokens > 0).sum(-1)[..., None, None])
        return weights


class RoutedAttention(SelectingAttention):
    """N memories to which a learned router sends tokens, and a shared memory to which all tokens are written.

    p_t = softmax(W_r LN(σ(q_t))), m = argmax p_t: A_mem = p_tm A_m + (1 − p_tm) A_shared, where A_m is the read of
    memory m alone, and p_tm is set to 0 if m is empty. Token t is written to the shared memory and to memory
    argmax W_r LN(σ(k_t)), so that a query looks where keys like it were written. LN is a LayerNorm without weights
    over the features of all heads.
    Source: Mixture-of-Memories, arXiv:2502.13685, which routes by a linear map of the hidden state, gives each memory
    its own keys and values, and has no z.

    To keep the router from sending all tokens to one memory, training adds the loss `balance_weight` · N Σ_m f_m P_m,
    where f_m is the share of tokens written to m and P_m its mean probability (Switch Transformers, arXiv:2101.03961,
    eq. 4).
    """

    takes_token_rules: ClassVar[bool] = False
    can_step_in_place = False
    step, end_segments = Layer.step, Layer.end_segments  # which recompute the open segment

    def __init__(self, hidden_size: int, num_memory_heads: int, options: Any) -> None:
        super().__init__(
            hidden_size, num_memory_heads, options, num_memories=options.num_memories + 1, segments_per_memory=1
        )
        self.router = nn.Linear(hidden_size, options.num_memories, bias=False)
        self.balance_weight = options.balance_weight
        self.balance_loss: Tensor | None = None

    def route(self, features: Tensor, dtype: torch.dtype) -> Tensor:
        """The router's scores, [B, n, S, N] in `dtype`, from features [B, n, H, S, K] of queries or keys."""
        return score_features(self.router, features, dtype)

    def _scan(
        self, q: Tensor, k: Tensor, v: Tensor, memory: MemoryState | None, segments: Segments, rule: Any = None
    ) -> tuple[Tensor, MemoryState | None]:
        """See `CompressiveAttention._scan`, which sees (N + 1) · H heads with a single memory each.

        A token's key is zero in the memories that it is not sent to, so that it writes nothing there.
        """
        batch, num_segments, heads, *_ = q.shape
        num_writes = num_segments - (not segments.write_last)
        if memory is None and num_writes == 0:
            return torch.zeros_like(v), None
        before = self.empty_memory(batch, v) if memory is None else memory
        num_routed, dtype = self.router.out_features, before.norms.dtype
        key_scores = self.route(k, dtype)
        sent = F.one_hot(key_scores.argmax(-1), num_routed)
        if segments.valid is not None:
            sent = sent * segments.valid.unsqueeze(-1)
        self.balance_loss = self._balance(key_scores, sent)
        added = sent.sum(2)  # number of tokens that each segment sends to each memory, [B, n, N]
        seen = before.num_tokens[:, None, :num_routed] + added.cumsum(1) - added
        shares = self.route(q, dtype).softmax(-1)
        self._watch(shares, seen.new_full((), num_routed))
        chosen = F.one_hot(shares.argmax(-1), num_routed) * (seen > 0).unsqueeze(2)
        shares = shares * chosen
        shares = torch.cat((shares, 1 - shares.sum(-1, keepdim=True)), dim=-1)  # [B, n, S, N + 1]

        def spread(t: Tensor) -> Tensor:
            return t.unsqueeze(2).expand(-1, -1, num_routed + 1, -1, -1, -1)

        def align(t: Tensor, like: Tensor) -> Tensor:
            return t.movedim(-1, 2)[:, :, :, None, :, None].to(like.dtype)  # [B, n, N + 1, 1, S, 1]

        written = align(torch.cat((sent, torch.ones_like(sent[..., :1])), dim=-1), k)
        one_each = replace(
            before,
            memories=before.memories.flatten(1, 2).unsqueeze(1),
            norms=before.norms.flatten(1, 2).unsqueeze(1),
            num_tokens=before.num_tokens[:, -1:],
        )
        spread_q, spread_k, spread_v = (part.flatten(2, 3) for part in (spread(q), spread(k) * written, spread(v)))
        reads, after = super()._scan(spread_q, spread_k, spread_v, one_each, segments)
        mixed = (reads.unflatten(2, (num_routed + 1, heads)) * align(shares, reads)).sum(2)
        if num_writes == 0:
            return mixed, memory
        assert after is not None
        routed = before.num_tokens[:, :num_routed] + added[:, :num_writes].sum(1)
        return mixed, replace(
            after,
            memories=after.memories.squeeze(1).unflatten(1, (num_routed + 1, heads)),
            norms=after.norms.squeeze(1).unflatten(1, (num_routed + 1, heads)),
            num_tokens=torch.cat((routed, after.num_tokens), dim=1),
        )

    def _balance(self, scores: Tensor, sent: Tensor) -> Tensor | None:
        """The router's auxiliary loss; see the class."""
        if not self.training or not self.balance_weight:
            return None
        tokens = sent.flatten(0, 2).to(scores.dtype)
        is_real = tokens.sum(-1, keepdim=True)
        number = is_real.sum().clamp_min(1)
        probability = (scores.softmax(-1).flatten(0, 2) * is_real).sum(0) / number
        return self.balance_weight * tokens.shape[-1] * (tokens.sum(0) / number * probability).sum()

    def _compute_loss(self, from_memory: Tensor, segments: Segments) -> Tensor | None:
        """The auxiliary losses of the base class and of the router, summed."""
        found = [loss for loss in (self.balance_loss, super()._compute_loss(from_memory, segments)) if loss is not None]
        self.balance_loss = None
        return torch.stack(found).sum() if found else None


@register_layer("multi_memory", options=MultiMemoryOptions)
class MultiMemoryLayer(CompressiveLayer):
    """Independent memories; each token selects among them by attention to their z, or by a learned router.

    They are written in turn, one segment each; with `router: top1`, the router chooses for each token. A token's
    selection depends only on earlier segments and the token itself, never on later tokens.

    The arguments are `Block`'s; the memory has `num_heads` heads by default.
    """

    index_key: ClassVar[str] = "current_memory_idx"
    attention_type: ClassVar[type[CompressiveAttention]] = MultiMemoryAttention

    def choose_attention(self, options: Any) -> type[CompressiveAttention]:
        """See `CompressiveLayer.choose_attention`."""
        return RoutedAttention if options.router == "top1" else self.attention_type
