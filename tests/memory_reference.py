"""The memory layers from their equations alone, in float64, one token after the other.

Nothing here calls the package; a test hands over a layer's weights and the options that it was built with.

σ(x) = ELU(x) + 1;  A_mem = σ(q) M / max(σ(q) z, ε);
A_loc[t] = Σ_{j≤t} (σ(q_t)·σ(k_j)) v_j / max(Σ_{j≤t} σ(q_t)·σ(k_j), ε);
out = g A_mem + (1 − g) A_loc;  M ← w M + Σ σ(k_t)ᵀ (v_t − r_t),  z ← w z + Σ σ(k_t). With shifted keys σ(k_t) is
that of the token before, 0 for the segment's first.

Write rules: token by token M ← α_t M + β_t φ(k_t)ᵀ (v_t − r_t), z ← α_t z + β_t φ(k_t). Divided by z, r reads the
memory from before the segment; without z, r_t = φ(k_t) α_t M, with what the segment's earlier tokens wrote.

Legend: D hidden size, H heads, K their width, N memories; one token's q, k and v are [H, K].
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-6
ALIBI_SLOPES = {  # by number of heads: 2^(−8i/H); arXiv:2108.12409
    1: [1 / 256],
    2: [1 / 16, 1 / 256],
    4: [1 / 4, 1 / 16, 1 / 64, 1 / 256],
}


@dataclass(frozen=True)
class ReferenceMemory:
    """One row's memory of one layer: M [N, H, K, V], z [N, H, K], tokens of each, segments of the layer."""

    M: Tensor
    z: Tensor
    tokens: Tensor
    segments: int = 0


class ReferenceLayer:
    """A memory layer by its equations: x + Attn(LN1 x) + MLP(LN2 x)."""

    def __init__(self, layer: nn.Module, kind: str, hidden_size: int, num_heads: int, options: dict[str, Any]):
        self.weights = {name: value.double() for name, value in layer.state_dict().items()}
        self.kind, self.options = kind, options
        is_infini = kind == "infini"
        self.heads = options.get("num_memory_heads") or (1 if is_infini else num_heads)
        self.width = hidden_size // self.heads
        self.delta = options.get("use_delta_rule", True)
        self.router = options.get("router", "relevance")
        self.is_tree = options.get("hierarchy") == "fenwick"
        self.num_memories = options.get("num_memory_banks", 1) if is_infini else options.get("num_memories", 4)
        self.num_memories += self.router == "top1"  # the last one is shared
        self.turn = options.get("segments_per_bank", 4) if is_infini else 1
        self.decay = torch.ones(self.heads).double()
        if options.get("use_alibi"):
            self.decay = (-options.get("alibi_scale", 1.0) * torch.tensor(ALIBI_SLOPES[self.heads]).double()).exp()
        self.features = options.get("key_features", "elu")
        self.normalizes = options.get("use_normalizer", True)

    def empty_memory(self) -> ReferenceMemory:
        M = torch.zeros(self.num_memories, self.heads, self.width, self.width).double()
        return ReferenceMemory(M, M[..., 0], torch.zeros(self.num_memories, dtype=torch.int64))

    def read_row(self, x: Tensor, memory: ReferenceMemory, segment_length: int) -> tuple[Tensor, ReferenceMemory]:
        """One row's tokens [T, D], cut into segments; the memory after the last, which may be short."""
        outputs = []
        for segment in x.split(segment_length):
            mixed, memory = self._attend(self._norm(segment, "input_layernorm"), memory)
            wide = self._linear(self._norm(segment, "post_attention_layernorm"), "mlp.dense_h_to_4h")
            outputs.append(segment + mixed + self._linear(F.gelu(wide), "mlp.dense_4h_to_h"))
        return torch.cat(outputs), memory

    def _attend(self, x: Tensor, memory: ReferenceMemory) -> tuple[Tensor, ReferenceMemory]:
        """One segment's attention output, and the memory after its write."""
        inputs = self._linear(x, "attention.query_key_value")
        taps = self.weights.get("attention.convolution.weight")  # the last is that of the token itself
        if taps is not None:
            reach = taps.shape[1] - 1
            padded = torch.cat((torch.zeros(reach, inputs.shape[1]).double(), inputs))
            inputs = torch.stack([(taps.T * padded[t : t + reach + 1]).sum(0) for t in range(len(x))])
        raw_q, raw_k, v = inputs.view(len(x), self.heads, 3, self.width).unbind(2)
        q, k = (map_features(raw, self.features) for raw in (raw_q, raw_k))
        if self.options.get("normalize_keys"):
            k = k / k.sum(-1, keepdim=True)
        if self.options.get("use_key_shift"):
            k = torch.cat((torch.zeros_like(k[:1]), k[:-1]))
        local_q, local_k = (q, k) if self.features == "elu" else (sigma(raw_q), sigma(raw_k))
        gates = self.weights["attention.gate"].expand(len(x), self.heads)
        if "attention.token_gate.weight" in self.weights:
            gates = gates + x @ self.weights["attention.token_gate.weight"].T
        mixed = []
        for t, gate in enumerate(gates.sigmoid().unsqueeze(-1)):
            if self.options.get("local_attention") == "softmax":
                turned = torch.stack([rotate(raw_k[j], j) for j in range(t + 1)])
                weights = ((turned * rotate(raw_q[t], t)).sum(-1) / math.sqrt(self.width)).softmax(0)
            else:
                scores = (local_k[: t + 1] * local_q[t]).sum(-1)
                weights = scores / scores.sum(0).clamp_min(EPSILON)
            local = (weights.unsqueeze(-1) * v[: t + 1]).sum(0)
            mixed.append(gate * self._read(q[t], memory) + (1 - gate) * local)
        return self._linear(torch.stack(mixed).flatten(1), "attention.dense"), self._write(k, v, memory, x)

    def _read(self, q: Tensor, memory: ReferenceMemory) -> Tensor:
        """A_mem of one token, [H, V]."""
        if self.is_tree:  # all levels, each weighed by λ
            levels = self._linear(standardize(q), "attention.level_weights").view(self.heads, -1).softmax(-1).T
            above = (levels.unsqueeze(-1) * torch.einsum("hk,nhkv->nhv", q, memory.M)).sum(0)
            below = (levels * torch.einsum("hk,nhk->nh", q, memory.z)).sum(0)
            return above / below.clamp_min(EPSILON).unsqueeze(-1)
        reads = torch.stack([self._recall(q, M, z) for M, z in zip(memory.M, memory.z, strict=True)])
        if self.router == "top1":
            scores = (self.weights["attention.router.weight"] @ standardize(q)).softmax(0)
            n = int(scores.argmax())
            share = scores[n] * bool(memory.tokens[n])
            return share * reads[n] + (1 - share) * reads[-1]
        fine = (self._weigh(q, memory).unsqueeze(-1) * reads).sum(0)
        if self.kind != "hierarchical":
            return fine
        coarse = self._recall(q, memory.M.sum(0), memory.z.sum(0))
        hidden = F.gelu(self._linear(coarse.flatten(), "attention.expansion_gate.dense_in"))
        p = self._linear(hidden, "attention.expansion_gate.dense_out").sigmoid()
        return p * fine + (1 - p) * coarse

    def _weigh(self, q: Tensor, memory: ReferenceMemory) -> Tensor:
        """The weight of every memory in one token's read, [N, H]."""
        if self.kind == "infini":
            weights = self.weights.get("attention.bank_weights", torch.zeros(self.heads, 1).double())
            return weights.softmax(-1).T
        filled = memory.tokens > 0
        means = memory.z[filled] / memory.tokens[filled, None, None]
        scores = (means * q).sum(-1) / math.sqrt(self.width)
        temperature: Any = self.options.get("selection_temperature", 1.0)
        if self.router == "standardized":
            apart = scores - scores.mean(0)
            scores = apart / (apart.square().mean(0) + 1e-12).sqrt()
            temperature = self.weights["attention.log_temperature"].exp()
        weights = torch.zeros(self.num_memories, self.heads).double()
        weights[filled] = (scores / temperature).softmax(0)
        return weights

    def _recall(self, features: Tensor, M: Tensor, z: Tensor) -> Tensor:
        """φ(q) M / max(φ(q) z, ε), or without z φ(q) M; 0 where the memory is empty."""
        above = torch.einsum("hk,hkv->hv", features, M)
        return above / (features * z).sum(-1, keepdim=True).clamp_min(EPSILON) if self.normalizes else above

    def _rule(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """β and α of one token, [H]."""
        parts = {name.removeprefix("attention."): value for name, value in self.weights.items()}
        beta = alpha = torch.ones(self.heads).double()
        if "strength.weight" in parts:
            beta = (parts["strength.weight"] @ x + parts["strength.bias"]).sigmoid()
        if "token_decay.rate" in parts:
            step = F.softplus(parts["token_decay.linear.weight"] @ x + parts["token_decay.bias"])
            alpha = (-parts["token_decay.rate"].exp() * step).exp()
        return beta, alpha

    def _write(self, k: Tensor, v: Tensor, memory: ReferenceMemory, x: Tensor) -> ReferenceMemory:
        """Write features of keys and values, [S, H, K], into the memory whose turn it is, or where they are sent."""
        turn = self._level(memory) if self.is_tree else memory.segments // self.turn % self.num_memories
        if self.is_tree:
            memory = self._join(memory, turn)
        M, z, tokens = memory.M.clone(), memory.z.clone(), memory.tokens.clone()
        places = [(turn,)] * len(k)
        if self.router == "top1":
            places = [(int((self.weights["attention.router.weight"] @ standardize(key)).argmax()), -1) for key in k]
        else:
            M[turn] *= self.decay[:, None, None]
            z[turn] *= self.decay[:, None]
        for t, key in enumerate(k):
            beta, alpha = self._rule(x[t])
            for n in places[t]:
                M[n] *= alpha[:, None, None]
                z[n] *= alpha[:, None]
                # divided by z, what is found is that from before the segment
                found = self._recall(key, *((memory.M[n], memory.z[n]) if self.normalizes else (M[n], z[n])))
                M[n] += beta[:, None, None] * key.unsqueeze(-1) * (v[t] - self.delta * found).unsqueeze(-2)
                z[n] += beta[:, None] * key
                tokens[n] += 1
        return ReferenceMemory(M, z, tokens, memory.segments + 1)

    def _level(self, memory: ReferenceMemory) -> int:
        """The level of a tree that the next segment goes to: a binary counter's first empty digit, or the last."""
        level = 0
        while level < self.num_memories - 1 and memory.segments >> level & 1:
            level += 1
        return level

    def _join(self, memory: ReferenceMemory, level: int) -> ReferenceMemory:
        """All full levels below the one that is written move up into it."""
        parts = [t.clone() for t in (memory.M, memory.z, memory.tokens)]
        for t in parts:
            t[level] += t[:level].sum(0)
            t[:level] = 0
        return ReferenceMemory(*parts, memory.segments)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])


def sigma(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def map_features(x: Tensor, kind: str) -> Tensor:
    return {"unit": lambda: F.normalize(x, dim=-1), "softmax": lambda: x.softmax(-1), "elu": lambda: sigma(x)}[kind]()


def rotate(heads: Tensor, place: int) -> Tensor:
    """A quarter of each head, turned to its place in the segment; angles are rounded to float32, as in GPT-NeoX."""
    half = heads.shape[-1] // 8
    angles = place * (1.0 / 10000.0 ** (torch.arange(half) / half))
    cos, sin = angles.cos().double(), angles.sin().double()
    first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def standardize(features: Tensor) -> Tensor:
    """A LayerNorm without weights over the features [H, K] of all heads, [H·K]."""
    return F.layer_norm(features.flatten(), (features.numel(),))
