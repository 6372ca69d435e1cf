"""The common part of compressive layers: local attention, the gate, and the recurrence over segments.

Legend: B rows, n segments, S tokens per segment, H memory heads, K = V = D / H, N memories or banks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from new_llm.config import UserError
from new_llm.config.model import MAX_SIZE
from new_llm.config.sections import section
from new_llm.models.layers.base import Block, Segments, Step, check_divides
from new_llm.models.layers.memory_layer import (
    MemoryAttention,
    MemoryLayer,
    ShortConvolution,
    TokenDecay,
    TokenRule,
    pick_last_key,
    plan_writes,
    shift_keys,
)
from new_llm.models.layers.pythia import KeyValueCache, RotarySoftmax
from new_llm.models.ops import (
    ScannedReads,
    add_outer_products,
    feature_map,
    gated_delta_rule,
    local_linear_attention,
    map_features,
    multiply_norms,
    read_memories,
    scan_memories,
    scan_sums,
)
from new_llm.models.state import LayerMemory, MemoryState, find_written_memory

EPSILON = 1e-6
"""ε: lower bound on the divisor of a read."""
CHUNK_LENGTH = 1024
"""Longest segment, in tokens, that local attention computes as one masked product; longer ones run in such chunks."""


@section
class MemoryOptions:
    """The options that layers with compressive memory share."""

    use_delta_rule: bool = True
    """Write only what the memory does not return yet (v − r) instead of v."""
    use_key_shift: bool = False
    """Store each value under the key of the previous token, so that a query finds what followed similar tokens."""
    key_features: Literal["elu", "unit", "softmax"] = "elu"
    """Feature map of queries and keys: "elu", ELU + 1; "unit", signed and of length 1; "softmax", a softmax over K."""
    use_normalizer: bool = True
    """Divide reads by σ(q) z, where z is the sum of the keys' features. False: reads are σ(q) M, and use_delta_rule
    applies token by token."""
    use_token_strength: bool = False
    """Write each token with a learned strength β = sigmoid(W x) per token and head."""
    use_token_decay: bool = False
    """Decay the memory at each token, by a learned factor α per token and head."""
    use_token_gate: bool = False
    """Make the gate between memory and local attention depend on the token: sigmoid(β + W x) per head."""
    convolution_size: Annotated[int, Field(ge=0, le=MAX_SIZE)] = 0
    """Width in tokens of a causal convolution over q, k and v; 0: no convolution."""
    local_attention: Literal["linear", "softmax"] = "linear"
    """Attention within the segment; softmax, with rotary positions, is the paper's form (arXiv:2404.07143)."""
    normalize_keys: bool = False
    """Divide each key's features by their sum, so that all tokens have equal weight (arXiv:2102.11174, section 4.2)."""
    read_loss_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of an auxiliary loss that makes the memory's output alone predict the next token, through the output
    projection and the head."""
    num_memory_heads: Annotated[int | None, Field(gt=0, le=MAX_SIZE)] = None
    """Number of memory heads H, a divisor of the hidden size; None: as many as softmax attention heads."""
    gate_init: float = 0.0
    """Initial β of the gates: sigmoid(β) is the share of memory in each head's output."""
    query_key_init_scale: Annotated[float, Field(gt=0)] = 1.0
    """Initial scale of the memory layers' W_q and W_k relative to other weights."""
    query_key_init_bias: float = 0.0
    """Initial bias of q and k. With negative values each token has only a few large features, so tokens overlap
    less."""
    match_query_key_init: bool = False
    """Initialise W_k equal to W_q, so that similar tokens match from the start."""

    def __post_init__(self) -> None:
        if self.key_features == "unit" and (self.use_normalizer or self.normalize_keys):
            raise UserError(
                "key_features: unit keys are signed, so reads can't be divided by their sum; "
                "set use_normalizer and normalize_keys to false"
            )
        can_grow = self.key_features == "elu" and not self.normalize_keys
        if self.use_delta_rule and not self.use_normalizer and can_grow:
            raise UserError(
                "use_normalizer: without it, the delta rule diverges on keys longer than 1; "
                "set key_features to unit or softmax, or use_delta_rule to false"
            )


@dataclass(frozen=True)
class OpenSegment(LayerMemory):
    """Running sums over the tokens of an open segment, of constant size; `step` adds to them in place.

    Attributes:
        products: Σ kᵀv, [B, H, K, V], for linear local attention.
        keys: Σ k, [B, H, K], for linear local attention.
        writes: Σ kᵀ(v − r), [B, H, K, V], added to the memory at the segment's end; may be the same tensor as
            `products` if r = 0.
        num_tokens: number of tokens summed, [B].
        last_key: features of the last token's own key, [B, H, K], under which `use_key_shift` stores the next token; 0
            before the first token.
        norms: the sum to add to z, [B, H, K]; None: `keys`.
        log_fade: Σ log α, [B, H], the logarithm of how much of the memory from before the segment is left; None without
            a token rule.
        inputs: the convolution's last inputs, [B, size − 1, 3 D].
        cached_keys: rotated keys for softmax local attention, as in a `KeyValueCache`.
        cached_values: their values.
    """

    products: Tensor
    keys: Tensor
    writes: Tensor
    num_tokens: Tensor
    last_key: Tensor
    norms: Tensor | None = None
    log_fade: Tensor | None = None
    inputs: Tensor | None = None
    cached_keys: Tensor | None = None
    cached_values: Tensor | None = None


class CompressiveAttention(MemoryAttention):
    """g A_mem + (1 − g) A_loc with g = sigmoid(β) per head; subclasses define how A_mem mixes the memories.

    Source: Infini-attention, arXiv:2404.07143, section 2, by default with linear attention in place of the local
    softmax.

    Args:
        hidden_size: D.
        num_memory_heads: H, a divisor of D.
        options: how the memory is read and written, and initial values.
        num_memories: N.
        segments_per_memory: number of segments written to one memory before moving on to the next.
        decay: w of each head, H numbers; None: no decay.
    """

    can_step_in_place = True

    def __init__(
        self,
        hidden_size: int,
        num_memory_heads: int,
        options: MemoryOptions,
        *,
        num_memories: int,
        segments_per_memory: int,
        decay: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.head_size = self.value_size = check_divides("num_memory_heads", num_memory_heads, hidden_size)
        self.num_memory_heads = num_memory_heads
        self.num_memories = num_memories
        self.segments_per_memory = segments_per_memory
        self.options = options
        self.use_delta_rule, self.use_normalizer = options.use_delta_rule, options.use_normalizer
        self.epsilon = EPSILON if options.use_normalizer else None
        self.shares_features = options.local_attention == "linear" and options.key_features == "elu"
        self.softmax: RotarySoftmax | None = None
        self.read_loss_weight = options.read_loss_weight
        self.decay = None if decay is None else tuple(decay)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.gate = nn.Parameter(torch.full((num_memory_heads,), options.gate_init))
        heads, size = num_memory_heads, options.convolution_size
        self.convolution = ShortConvolution(3 * hidden_size, size) if size else None
        self.strength = nn.Linear(hidden_size, heads) if options.use_token_strength else None
        self.token_decay = TokenDecay(hidden_size, heads) if options.use_token_decay else None
        self.forgets = decay is not None or options.use_token_decay
        self.token_gate = nn.Linear(hidden_size, heads, bias=False) if options.use_token_gate else None
        self.has_token_rule = options.use_token_strength or options.use_token_decay or not options.use_normalizer
        if self.has_token_rule and not self.takes_token_rules:
            raise UserError(
                "use_token_strength, use_token_decay and use_normalizer=False need memories written in turn, one "
                "segment each; they don't work with router top1 or hierarchy fenwick"
            )

    def set_positions(self, rotary_pct: float, rotary_emb_base: float) -> None:
        """Create softmax local attention with these rotary positions, if the options ask for it."""
        if self.options.local_attention == "softmax":
            self.softmax = RotarySoftmax(self.num_memory_heads, self.head_size, rotary_pct, rotary_emb_base)

    # What subclasses define

    reads_sum: ClassVar[bool] = False
    """Whether the attention also reads the sum of its memories."""
    takes_token_rules: ClassVar[bool] = True
    """Whether use_token_strength, use_token_decay and use_normalizer=False are supported."""

    def weigh(self, products: Tensor, num_tokens: Tensor) -> Tensor | None:
        """Each memory's weight for each token of n segments, broadcastable to [B, n, H, S, N]; None: all are 1.

        Args:
            products: σ(q)·z for each memory, [B, n, H, S, N], float32 or wider.
            num_tokens: number of tokens that each memory has seen, [B, n, N].
        """
        return None

    def combine(self, reads: ScannedReads) -> Tensor:
        """A_mem, [..., H, S, V], from the weighted reads and, with `reads_sum`, the reads of the memories' sum."""
        return reads.reads

    def read(self, q: Tensor, memory: MemoryState) -> Tensor:
        """A_mem of one segment, [B, H, S, V], for the queries' features q [B, H, S, K]."""
        weights = None
        if self.num_memories > 1:
            products = multiply_norms(q, memory.norms.transpose(1, 2)).unsqueeze(1)  # [B, 1, H, S, N]
            weights = self.weigh(products, memory.num_tokens.unsqueeze(1))
            weights = None if weights is None else weights.expand_as(products)[:, 0].movedim(-1, 1)
        return read_memories(q, memory.memories, memory.norms, epsilon=self.epsilon, weights=weights)

    @torch.no_grad()
    def initialize_features(self) -> None:
        """Scale W_q and W_k, set their biases, copy W_q to W_k if the options ask for it, and zero the token gate."""
        shape = (self.num_memory_heads, 3, self.head_size)
        weight = self.query_key_value.weight.unflatten(0, shape)
        weight[:, :2] *= self.options.query_key_init_scale
        self.query_key_value.bias.view(shape)[:, :2] = self.options.query_key_init_bias
        if self.options.match_query_key_init:
            weight[:, 1] = weight[:, 0]
        if self.token_gate is not None:
            nn.init.zeros_(self.token_gate.weight)

    @property
    def is_plain(self) -> bool:
        """Whether there is one memory, and only `use_delta_rule` and the decay differ from the default computation."""
        extras = (self.convolution, self.token_gate, self.softmax)
        is_usual = self.shares_features and not self.options.normalize_keys and not self.options.use_key_shift
        return self.num_memories == 1 and is_usual and not self.has_token_rule and extras == (None, None, None)

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """The parameters that compute β, α and the token-dependent gates."""
        parts = (self.strength, self.token_decay, self.token_gate)
        return [parameter for part in parts if part is not None for parameter in part.parameters()]

    def forward(
        self, hidden: Tensor, memory: MemoryState | None, segments: Segments
    ) -> tuple[Tensor, MemoryState | None]:
        """See `Layer.forward`: local attention in all segments at once, then the memory's recurrence over segments."""
        inputs = self.query_key_value(hidden)
        if self.convolution is not None:
            flat = inputs.flatten(0, 1)
            before = flat.new_zeros(len(flat), self.convolution.size - 1, flat.shape[-1])
            inputs = self.convolution(flat, before).view_as(inputs)
        rule = self._make_rule(hidden, segments.valid)
        with torch.autocast(hidden.device.type, enabled=False):
            raw_q, raw_k, v = self._split(inputs)
            q, k = self._map_features(raw_q, raw_k)
            if self.options.use_key_shift:
                k = shift_keys(k)
            if self.softmax is not None:
                local = self.softmax.attend(*(t.flatten(0, 1) for t in (raw_q, raw_k, v))).view_as(v)
            else:
                features = (q, k) if self.shares_features else (feature_map(raw_q), feature_map(raw_k))
                local = local_linear_attention(*features, v, epsilon=EPSILON, chunk_length=CHUNK_LENGTH)
            if segments.valid is not None:  # zero keys add nothing to M and z
                k = k * segments.valid[:, :, None, :, None]
            from_memory, memory = self._scan(q, k, v, memory, segments, rule)
            mixed = self._gate(from_memory, local, hidden)
        self.auxiliary_loss = self._compute_loss(from_memory, segments)
        return self.dense(mixed.transpose(-2, -3).reshape(hidden.shape)), memory

    def _compute_loss(self, from_memory: Tensor, segments: Segments) -> Tensor | None:
        """The loss of `read_loss_weight`: predicting the next token from memory alone. None outside training."""
        if not self.training or not self.read_loss_weight or segments.tokens is None:
            return None
        has_read = (from_memory.detach() != 0).any(-1).any(-2)  # [B, n, S]
        if segments.valid is not None:  # the next token, the target, must be real
            has_read = has_read & F.pad(segments.valid.flatten(1)[:, 1:], (0, 1)).view_as(has_read)
        read = self.dense(from_memory.transpose(-2, -3).flatten(-2))
        return self.read_loss_weight * segments.tokens.score(read, has_read)

    def _split(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split [..., S, 3 D] into q, k and v, [..., H, S, K] each."""
        mixed = inputs.unflatten(-1, (self.num_memory_heads, 3 * self.head_size))
        q, k, v = mixed.transpose(-2, -3).chunk(3, dim=-1)
        return q, k, v

    def _map_features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Map q and k to features. `normalize_keys` scales k only: with `use_normalizer`, a scale of q cancels out."""
        q, k = map_features(q, self.options.key_features), map_features(k, self.options.key_features)
        if self.options.normalize_keys:
            k = k / k.sum(-1, keepdim=True)
        return q, k

    def _make_rule(self, hidden: Tensor, valid: Tensor | None) -> TokenRule | None:
        """β and log α of tokens [..., S, D]; None without token-wise options and with reads divided by z."""
        if not self.has_token_rule:
            return None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        beta = None if self.strength is None else self.strength(hidden).to(wide).sigmoid().transpose(-1, -2)
        log_decay = None if self.token_decay is None else self.token_decay(hidden).transpose(-1, -2)
        if log_decay is not None and valid is not None:
            log_decay = log_decay * valid.unsqueeze(-2)
        return TokenRule(beta, log_decay)

    def compute_gates(self, hidden: Tensor) -> Tensor:
        """The gate of each token and head, [..., S, H], at least float32."""
        gate = self.gate.to(torch.promote_types(hidden.dtype, torch.float32)).expand(*hidden.shape[:-1], -1)
        return torch.sigmoid(gate if self.token_gate is None else gate + self.token_gate(hidden).to(gate.dtype))

    def _gate(self, from_memory: Tensor, local: Tensor, hidden: Tensor) -> Tensor:
        if self.token_gate is None:
            gate = torch.sigmoid(self.gate).to(local.dtype)[:, None, None]
        else:
            gate = self.compute_gates(hidden).to(local.dtype).transpose(-1, -2).unsqueeze(-1)
        return gate * from_memory + (1 - gate) * local

    def _scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory: MemoryState | None,
        segments: Segments,
        rule: TokenRule | None = None,
    ) -> tuple[Tensor, MemoryState | None]:
        """A_mem [B, n, H, S, V], and the memory after the call.

        q and k are features, v values, [B, n, H, S, K] each; masked keys are zero. The schedule and z do not depend on
        the values, so both are computed for all segments at once. Only M needs `scan_memories`.
        """
        batch, num_segments, _, length, _ = q.shape
        num_writes = num_segments - (not segments.write_last)
        if memory is None and num_writes == 0:
            return torch.zeros_like(v), None
        counts = segments.count_tokens(batch, num_writes, length, q.device)
        before = self.empty_memory(batch, v) if memory is None else memory
        schedule = plan_writes(before, counts, self.segments_per_memory)
        fade, summed, written_keys, growth = self._decay_like(before.norms), k[:, :num_writes], None, None
        if rule is not None and num_writes:
            beta, log_decay = (None if t is None else t[:, :num_writes] for t in rule)
            written_keys, summed, growth, left = TokenRule(beta, log_decay).write_keys(
                summed.to(before.norms.dtype), solves=self.use_delta_rule and not self.use_normalizer
            )
            if fade is not None:
                growth = growth * fade[:, None]
            fade = left.unsqueeze(2) if fade is None else left.unsqueeze(2) * fade
            written_keys = written_keys.to(k.dtype)
        decay, norm_decay = schedule.spread_decay(fade)
        # z of all memories before each segment and after the last, [B, w + 1, N, H, K]
        changes = schedule.chosen[..., None, None] * summed.sum(-2, dtype=before.norms.dtype).unsqueeze(2)
        norms = scan_sums(before.norms, changes, None if norm_decay is None else norm_decay.unsqueeze(-1))
        products = multiply_norms(q, norms[:, :num_segments].transpose(2, 3))  # [B, n, H, S, N]
        weights = self.weigh(products, schedule.num_tokens[:, :num_segments])
        divisors = products.clamp_min(EPSILON) if self.use_normalizer else torch.ones_like(products)
        sum_scales = None
        if self.reads_sum:
            sums = products.sum(-1)
            sum_scales = sums.clamp_min(EPSILON).reciprocal() if self.use_normalizer else torch.ones_like(sums)
        delta_scales = growth if self.use_delta_rule else None
        if self.use_delta_rule and num_writes and self.use_normalizer:
            written = schedule.pick_norms(norms[:, :num_writes]).unsqueeze(-2)
            delta_scales = 1 / multiply_norms(k[:, :num_writes], written).squeeze(-1).clamp_min(EPSILON)
        reads = scan_memories(
            q,
            k,
            v,
            None if memory is None else memory.memories,
            divisors.reciprocal() if weights is None else weights / divisors,
            schedule.slots,
            num_writes=num_writes,
            sum_scales=sum_scales,
            delta_scales=delta_scales,
            decay=decay,
            written_keys=written_keys,
        )
        if num_writes:
            memory = schedule.finish(before, reads.memories, norms[:, -1], norm_decay)
        return self.combine(reads), memory

    def _decay_like(self, like: Tensor) -> Tensor | None:
        """w, [H], in the dtype and on the device of the memory `like`, whose dtype may differ from the model's."""
        if self.decay is None:
            return None
        return torch.stack([like.new_full((), w) for w in self.decay])  # created on the device: no copy from the host

    def _current(self, memory: MemoryState) -> tuple[Tensor, Tensor]:
        if self.num_memories == 1:
            return memory.memories[:, 0], memory.norms[:, 0]
        rows = torch.arange(memory.rows, device=memory.norms.device)
        index = find_written_memory(memory.num_segments, self.segments_per_memory, self.num_memories)
        return memory.memories[rows, index], memory.norms[rows, index]

    def _add_write(
        self, memory: MemoryState, written: Tensor, norm: Tensor, count: Tensor, fade: Tensor | None
    ) -> MemoryState:
        """The memory after writing a segment of `count` [B] tokens, decayed by `fade`, [H] or [B, 1, 1, H]."""
        schedule = plan_writes(memory, count.unsqueeze(1), self.segments_per_memory)
        _, every = schedule.spread_decay(fade)
        memories, norms, chosen = memory.memories, memory.norms, schedule.chosen[:, 0]
        if every is not None:
            memories, norms = memories * every[:, 0, ..., None, None], norms * every[:, 0, ..., None]
        memories = torch.where(chosen[..., None, None, None], memories + written.unsqueeze(1), memories)
        norms = torch.where(chosen[..., None, None], norms + norm.unsqueeze(1), norms)
        return schedule.finish(memory, memories, norms, every)

    # Streams

    def step(
        self, hidden: Tensor, opened: OpenSegment | None, memory: MemoryState | None, step: Step
    ) -> tuple[Tensor, OpenSegment]:
        """See `Layer.step`. The write is summed token by token: reads see only the memory from before the segment.

        A single token is computed in the precision of the sums: in 16 bits, all of M would be scaled and rounded at
        every token. It joins the sums first, so that linear local attention is a single product with them.
        """
        inputs, changes = self.query_key_value(hidden), {}
        if self.convolution is not None:
            before = inputs.new_zeros(len(inputs), self.convolution.size - 1, inputs.shape[-1])
            before = before if opened is None or opened.inputs is None else opened.inputs
            changes["inputs"] = self.convolution.keep(inputs, before, step.count_tokens())
            inputs = self.convolution(inputs, before)
        rule = self._make_rule(hidden, step.valid)
        with torch.autocast(hidden.device.type, enabled=False):
            raw_q, raw_k, v = self._split(inputs)
            q, k = self._map_features(raw_q, raw_k)
            if self.options.use_key_shift:
                last_key = torch.zeros_like(k[:, :, 0]) if opened is None else opened.last_key
                changes["last_key"] = pick_last_key(k, last_key, step.valid)
                k = shift_keys(k, last_key)
            if step.valid is not None:
                k = k * step.valid[:, None, :, None]
            local = None
            if self.softmax is not None:
                cache = None
                if opened is not None and opened.cached_keys is not None and opened.cached_values is not None:
                    cache = KeyValueCache(opened.cached_keys, opened.cached_values)
                local, cache = self.softmax.attend_step(raw_q, raw_k, v, cache, step)
                changes |= {"cached_keys": cache.keys, "cached_values": cache.values}
            local_q, local_k = q, k
            if self.softmax is None and not self.shares_features:
                local_q, local_k = feature_map(raw_q), feature_map(raw_k)
                local_k = local_k if step.valid is None else local_k * step.valid[:, None, :, None]
            dtype = v.dtype
            if hidden.shape[1] == 1:
                wide = torch.promote_types(dtype, torch.float32)
                q, k, v, local_q, local_k = (t.to(wide) for t in (q, k, v, local_q, local_k))
            elif local is None:
                sums = None if opened is None else (opened.products, opened.keys)
                local = local_linear_attention(
                    local_q, local_k, v, epsilon=EPSILON, chunk_length=CHUNK_LENGTH, initial_sums=sums
                )
            opened = self._sum_step(k, v, local_k, opened, memory, step, rule)
            if local is None:
                local = local_q @ opened.products / (local_q @ opened.keys.unsqueeze(-1)).clamp_min(EPSILON)
            from_memory = torch.zeros_like(v) if memory is None else self.read(q, memory)
            mixed = self._gate(from_memory, local, hidden).to(dtype)
        opened = replace(opened, **changes)
        return self.dense(mixed.transpose(1, 2).reshape(hidden.shape)), opened

    def _sum_step(
        self,
        k: Tensor,
        v: Tensor,
        local_k: Tensor,
        opened: OpenSegment | None,
        memory: MemoryState | None,
        step: Step,
        rule: TokenRule | None,
    ) -> OpenSegment:
        """Add tokens to the sums for local attention and for the write."""
        held, written = None, v
        if self.use_delta_rule and memory is not None:
            current, norm = self._current(memory)
            held = read_memories(k, current.unsqueeze(1), norm.unsqueeze(1), epsilon=self.epsilon)
            if not self.use_normalizer and (decay := self._decay_like(held)) is not None:
                held = held * decay[:, None, None]
            written = v - held
        if opened is None:
            is_one_sum = written is v and self.shares_features and rule is None
            opened = self._open_segment(k.shape[0], v, is_one_sum=is_one_sum)
        opened = replace(opened, num_tokens=opened.num_tokens + step.count_tokens())
        if self.softmax is None:
            add_outer_products(opened.products, local_k, v)
            opened = replace(opened, keys=opened.keys + local_k.sum(-2, dtype=opened.keys.dtype))
        if rule is None:
            if opened.writes is not opened.products:
                add_outer_products(opened.writes, k, written)
            if opened.norms is not None:
                opened = replace(opened, norms=opened.norms + k.sum(-2, dtype=opened.norms.dtype))
            return opened
        # What the segment has written so far decays, too.
        assert opened.norms is not None
        assert opened.log_fade is not None
        dtype = opened.writes.dtype
        k, v, held = k.to(dtype), v.to(dtype), None if held is None else held.to(dtype)
        written, summed, growth, left = rule.write_keys(k, solves=False)
        if self.use_delta_rule and not self.use_normalizer:
            if held is not None:
                v = v - (opened.log_fade.exp().unsqueeze(-1) * growth).unsqueeze(-1) * held
            beta = torch.ones_like(growth) if rule.beta is None else rule.beta
            log_decay = torch.zeros_like(growth) if rule.log_decay is None else rule.log_decay
            _, writes = gated_delta_rule(k, k, v, beta, log_decay, opened.writes)
        else:
            update = v if held is None else v - held
            writes = left[..., None, None] * opened.writes + written.transpose(-1, -2) @ update
        return replace(
            opened,
            writes=writes,
            norms=left.unsqueeze(-1) * opened.norms + summed.sum(-2),
            log_fade=opened.log_fade if rule.log_decay is None else opened.log_fade + rule.log_decay.sum(-1),
        )

    def _open_segment(self, rows: int, like: Tensor, *, is_one_sum: bool) -> OpenSegment:
        """An open segment without tokens; with `is_one_sum`, `products` and `writes` are the same tensor (r = 0)."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        keys = torch.zeros(rows, self.num_memory_heads, self.head_size, dtype=dtype, device=like.device)
        writes = keys.new_zeros(*keys.shape, self.head_size)
        products = writes if is_one_sum else torch.zeros_like(writes)
        if self.softmax is not None:
            products = products[:, :, :0]
        return OpenSegment(
            products,
            keys,
            writes,
            torch.zeros(rows, dtype=torch.int64, device=like.device),
            last_key=torch.zeros_like(keys, dtype=like.dtype),
            norms=None if self.shares_features and not self.has_token_rule else keys,
            log_fade=keys[..., 0] if self.has_token_rule else None,
        )

    def end_segments(
        self, opened: OpenSegment, memory: MemoryState | None, ended: Tensor
    ) -> tuple[OpenSegment, MemoryState]:
        """See `Layer.end_segments`."""
        if memory is None:
            memory = self.empty_memory(ended.shape[0], opened.writes)
        fade = self._decay_like(memory.norms)
        if opened.log_fade is not None:
            left = opened.log_fade.exp()[:, None, None]
            fade = left if fade is None else left * fade
        added = opened.keys if opened.norms is None else opened.norms
        memory = self._add_write(memory, opened.writes, added, opened.num_tokens * ended, fade)
        return opened.emptied().select_rows(ended, opened), memory


class CompressiveLayer(MemoryLayer, Block):
    """A block with a compressive attention, whose class subclasses set in `attention_type`.

    The arguments are `Block`'s; `num_heads` is used for the memory if `num_memory_heads` is None. Only softmax local
    attention has positions.
    """

    attention_type: ClassVar[type[CompressiveAttention]]

    def make_attention(
        self, options: Any, hidden_size: int, num_heads: int, rotary_pct: float, rotary_emb_base: float
    ) -> CompressiveAttention:
        """See `Block.make_attention`."""
        make: Any = self.choose_attention(options)
        attention = make(hidden_size, options.num_memory_heads or num_heads, options)
        attention.set_positions(rotary_pct, rotary_emb_base)
        self.can_step_in_place = attention.can_step_in_place
        return attention

    def choose_attention(self, options: Any) -> type[CompressiveAttention]:
        """The attention class for these options."""
        return self.attention_type
