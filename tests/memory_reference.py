"""The memory layers from their equations alone: numpy float64, loops over segments, heads and tokens.

Nothing here calls the package; a test hands over a layer's weights and the options that it was built with.

σ(x) = ELU(x) + 1;  A_mem = σ(q) M / max(σ(q) z, ε);
A_loc[t] = Σ_{j≤t} (σ(q_t)·σ(k_j)) v_j / max(Σ_{j≤t} σ(q_t)·σ(k_j), ε);
out = g A_mem + (1 − g) A_loc;  M ← w M + Σ σ(k_t)ᵀ (v_t − r_t),  z ← w z + Σ σ(k_t). With shifted keys σ(k_t) is
that of the token before, 0 for the segment's first.

Write rules: token by token M ← α_t M + β_t φ(k_t)ᵀ (v_t − r_t), z ← α_t z + β_t φ(k_t). Divided by z, r reads the
memory from before the segment; without z, r_t = φ(k_t) α_t M, with what the segment's earlier tokens wrote.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

EPSILON = 1e-6
LAYER_NORM_EPSILON = 1e-5
ALIBI_SLOPES = {  # by number of heads: 2^(−8i/H); arXiv:2108.12409
    1: [1 / 256],
    2: [1 / 16, 1 / 256],
    4: [1 / 4, 1 / 16, 1 / 64, 1 / 256],
}


@dataclass
class ReferenceMemory:
    """One row's memory of one layer: M [N, H, K, V], z [N, H, K], tokens of each, segments of the layer."""

    M: np.ndarray
    z: np.ndarray
    tokens: list[int]
    segments: int = 0


class ReferenceLayer:
    """A memory layer by its equations: x + Attn(LN1 x) + MLP(LN2 x)."""

    def __init__(self, layer: nn.Module, kind: str, hidden_size: int, num_heads: int, options: dict[str, Any]):
        self.weights = {name: value.double().numpy() for name, value in layer.state_dict().items()}
        self.kind = kind
        is_infini = kind == "infini"
        self.heads = options.get("num_memory_heads") or (1 if is_infini else num_heads)
        self.width = hidden_size // self.heads
        self.delta = options.get("use_delta_rule", True)
        self.shift = options.get("use_key_shift", False)
        self.normalize = options.get("normalize_keys", False)
        self.temperature = options.get("selection_temperature", 1.0)
        self.router = options.get("router", "relevance")
        self.is_tree = options.get("hierarchy") == "fenwick"
        self.num_memories = options.get("num_memory_banks", 1) if is_infini else options.get("num_memories", 4)
        self.num_memories += self.router == "top1"  # the last one is shared
        self.turn = options.get("segments_per_bank", 4) if is_infini else 1
        self.decay = [1.0] * self.heads
        if options.get("use_alibi", False):
            scale = options.get("alibi_scale", 1.0)
            self.decay = [math.exp(-slope * scale) for slope in ALIBI_SLOPES[self.heads]]
        self.features = options.get("key_features", "elu")
        self.normalizes = options.get("use_normalizer", True)
        self.softmax = options.get("local_attention") == "softmax"

    def empty_memory(self) -> ReferenceMemory:
        shape = (self.num_memories, self.heads, self.width)
        return ReferenceMemory(np.zeros((*shape, self.width)), np.zeros(shape), [0] * self.num_memories)

    def read_row(
        self, x: np.ndarray, memory: ReferenceMemory, segment_length: int
    ) -> tuple[np.ndarray, ReferenceMemory]:
        """One row's tokens [T, D], cut into segments; the memory after the last, which may be short."""
        outputs = []
        for begin in range(0, len(x), segment_length):
            segment = x[begin : begin + segment_length]
            mixed, memory = self._attend(self._norm(segment, "input_layernorm"), memory)
            wide = self._linear(self._norm(segment, "post_attention_layernorm"), "mlp.dense_h_to_4h")
            outputs.append(segment + mixed + self._linear(gelu(wide), "mlp.dense_4h_to_h"))
        return np.concatenate(outputs), memory

    def _attend(self, x: np.ndarray, memory: ReferenceMemory) -> tuple[np.ndarray, ReferenceMemory]:
        """One segment's attention output, and the memory after its write."""
        tokens, K = len(x), self.width
        inputs = self._linear(x, "attention.query_key_value")
        taps = self.weights.get("attention.convolution.weight")  # the last is that of the token itself
        if taps is not None:
            reach = taps.shape[1] - 1
            padded = np.concatenate((np.zeros((reach, inputs.shape[1])), inputs))
            inputs = np.stack([(taps.T * padded[t : t + reach + 1]).sum(0) for t in range(tokens)])
        raw_q, raw_k, v = np.moveaxis(inputs.reshape(tokens, self.heads, 3, K), 2, 0)
        q, k = (map_features(raw, self.features) for raw in (raw_q, raw_k))
        if self.normalize:
            k = k / k.sum(-1, keepdims=True)
        if self.shift:
            k = np.stack([k[t - 1] if t else np.zeros_like(k[0]) for t in range(tokens)])
        local_q, local_k = (q, k) if self.features == "elu" else (sigma(raw_q), sigma(raw_k))
        gates = self.weights["attention.gate"] + np.zeros((tokens, self.heads))
        if "attention.token_gate.weight" in self.weights:
            gates = gates + x @ self.weights["attention.token_gate.weight"].T
        mixed = np.zeros((tokens, self.heads, K))
        for t in range(tokens):
            remembered = self._read(q[t], memory)
            for h in range(self.heads):
                if self.softmax:
                    query = rotate(raw_q[t, h], t)
                    scores = softmax([query @ rotate(raw_k[j, h], j) / math.sqrt(K) for j in range(t + 1)])
                    local = np.array(scores) @ v[: t + 1, h]
                else:
                    scores = [local_q[t, h] @ local_k[j, h] for j in range(t + 1)]
                    local = np.array(scores) @ v[: t + 1, h] / max(sum(scores), EPSILON)
                gate = sigmoid(gates[t, h])
                mixed[t, h] = gate * remembered[h] + (1 - gate) * local
        return self._linear(mixed.reshape(tokens, -1), "attention.dense"), self._write(k, v, memory, x)

    def _read(self, q: np.ndarray, memory: ReferenceMemory) -> np.ndarray:
        """A_mem of one token, [H, V], from its features [H, K]."""
        fine = np.zeros((self.heads, self.width))
        if self.is_tree:
            return self._read_tree(q, memory)
        if self.router == "top1":
            scores = softmax(self.weights["attention.router.weight"] @ standardize(q))
            n = int(np.argmax(scores))
            share = scores[n] if memory.tokens[n] else 0.0
            for h in range(self.heads):
                fine[h] = share * recall(q[h], memory.M[n, h], memory.z[n, h])
                fine[h] += (1 - share) * recall(q[h], memory.M[-1, h], memory.z[-1, h])
            return fine
        for h in range(self.heads):
            for n, weight in enumerate(self._weigh(q[h], memory, h)):
                fine[h] += weight * self._recall(q[h], memory.M[n, h], memory.z[n, h])
        if self.kind != "hierarchical":
            return fine
        totals = [(memory.M[:, h].sum(0), memory.z[:, h].sum(0)) for h in range(self.heads)]
        coarse = np.stack([self._recall(q[h], M, z) for h, (M, z) in enumerate(totals)])
        hidden = gelu(self._linear(coarse.reshape(-1), "attention.expansion_gate.dense_in"))
        p = sigmoid(self._linear(hidden, "attention.expansion_gate.dense_out")[0])
        return p * fine + (1 - p) * coarse

    def _read_tree(self, q: np.ndarray, memory: ReferenceMemory) -> np.ndarray:
        """All levels of one token, each weighed by λ."""
        levels = self._linear(standardize(q), "attention.level_weights").reshape(self.heads, self.num_memories)
        read = np.zeros((self.heads, self.width))
        for h in range(self.heads):
            weights = softmax(levels[h])
            above = sum(weights[n] * (q[h] @ memory.M[n, h]) for n in range(self.num_memories))
            read[h] = above / max(sum(weights[n] * (q[h] @ memory.z[n, h]) for n in range(self.num_memories)), EPSILON)
        return read

    def _weigh(self, q: np.ndarray, memory: ReferenceMemory, h: int) -> list[float]:
        """The weight of every memory in one token's read, for one head."""
        if self.kind == "infini":
            if self.num_memories == 1:
                return [1.0]
            return softmax(self.weights["attention.bank_weights"][h])
        filled = [n for n in range(self.num_memories) if memory.tokens[n]]
        scores = np.array([q @ (memory.z[n, h] / memory.tokens[n]) / math.sqrt(self.width) for n in filled])
        temperature = self.temperature
        if self.router == "standardized" and filled:
            scores = (scores - scores.mean()) / math.sqrt(scores.var() + 1e-12)
            temperature = math.exp(self.weights["attention.log_temperature"][h])
        weights = [0.0] * self.num_memories
        for n, weight in zip(filled, softmax(scores / temperature) if filled else [], strict=True):
            weights[n] = weight
        return weights

    def _recall(self, features: np.ndarray, M: np.ndarray, z: np.ndarray) -> np.ndarray:
        return recall(features, M, z) if self.normalizes else features @ M

    def _rule(self, x: np.ndarray, h: int) -> tuple[float, float]:
        """β and α of one token and head."""
        parts = {name.removeprefix("attention."): value for name, value in self.weights.items()}
        beta, alpha = 1.0, 1.0
        if "strength.weight" in parts:
            beta = sigmoid(parts["strength.weight"][h] @ x + parts["strength.bias"][h])
        if "token_decay.rate" in parts:
            step = math.log1p(math.exp(parts["token_decay.linear.weight"][h] @ x + parts["token_decay.bias"][h]))
            alpha = math.exp(-math.exp(parts["token_decay.rate"][h]) * step)
        return beta, alpha

    def _write(self, k: np.ndarray, v: np.ndarray, memory: ReferenceMemory, x: np.ndarray) -> ReferenceMemory:
        """Write features of the keys and values, [S, H, K], into the memory whose turn it is."""
        if self.router == "top1":
            return self._write_routed(k, v, memory)
        if self.is_tree:
            memory, n = self._join(memory)
        else:
            n = (memory.segments // self.turn) % self.num_memories
        M, z, tokens = memory.M.copy(), memory.z.copy(), list(memory.tokens)
        M[n] *= np.array(self.decay)[:, None, None]
        z[n] *= np.array(self.decay)[:, None]
        for t in range(len(k)):
            for h in range(self.heads):
                beta, alpha = self._rule(x[t], h)
                M[n, h] *= alpha
                z[n, h] *= alpha
                r = np.zeros(self.width)
                if self.delta:
                    r = recall(k[t, h], memory.M[n, h], memory.z[n, h]) if self.normalizes else k[t, h] @ M[n, h]
                M[n, h] += beta * np.outer(k[t, h], v[t, h] - r)
                z[n, h] += beta * k[t, h]
        tokens[n] += len(k)
        return ReferenceMemory(M, z, tokens, memory.segments + 1)

    def _write_routed(self, k: np.ndarray, v: np.ndarray, memory: ReferenceMemory) -> ReferenceMemory:
        """Each token into the memory that the router sends it to, and into the shared one."""
        M, z, tokens = memory.M.copy(), memory.z.copy(), list(memory.tokens)
        for t in range(len(k)):
            for n in (int(np.argmax(self.weights["attention.router.weight"] @ standardize(k[t]))), -1):
                for h in range(self.heads):
                    r = recall(k[t, h], memory.M[n, h], memory.z[n, h]) if self.delta else 0.0
                    M[n, h] += np.outer(k[t, h], v[t, h] - r)
                    z[n, h] += k[t, h]
                tokens[n] += 1
        return ReferenceMemory(M, z, tokens, memory.segments + 1)

    def _join(self, memory: ReferenceMemory) -> tuple[ReferenceMemory, int]:
        """A binary counter of blocks, one segment on: all full levels below the first empty one move up into it."""
        level = 0
        while level < self.num_memories - 1 and memory.segments >> level & 1:
            level += 1
        M, z, tokens = memory.M.copy(), memory.z.copy(), list(memory.tokens)
        for lower in range(level):
            M[level] += M[lower]
            z[level] += z[lower]
            tokens[level] += tokens[lower]
            M[lower], z[lower], tokens[lower] = 0, 0, 0
        return ReferenceMemory(M, z, tokens, memory.segments), level

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return layer_norm(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])


def recall(features: np.ndarray, M: np.ndarray, z: np.ndarray) -> np.ndarray:
    """σ(q) M / max(σ(q) z, ε), and 0 where the memory is empty."""
    if not z.any():
        return np.zeros(M.shape[1])
    return features @ M / max(features @ z, EPSILON)


def map_features(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "unit":
        return x / np.linalg.norm(x, axis=-1, keepdims=True)
    powers = np.exp(x)
    return powers / powers.sum(-1, keepdims=True) if kind == "softmax" else sigma(x)


def rotate(head: np.ndarray, place: int) -> np.ndarray:
    """A quarter of the head, turned to its place in the segment; angles are rounded to float32, as in GPT-NeoX."""
    half = len(head) // 8
    angles = place * (1.0 / 10000.0 ** (torch.arange(half) / half))
    cos, sin = angles.cos().numpy(), angles.sin().numpy()
    first, second, rest = np.split(head, [half, 2 * half])
    return np.concatenate((first * cos - second * sin, second * cos + first * sin, rest))


def standardize(features: np.ndarray) -> np.ndarray:
    """A LayerNorm without weights over the features [H, K] of all heads, [H·K]."""
    flat = features.reshape(-1)
    return (flat - flat.mean()) / math.sqrt(flat.var() + LAYER_NORM_EPSILON)


def sigma(x: np.ndarray) -> np.ndarray:
    """ELU(x) + 1."""
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0))) + 1


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softmax(scores: Any) -> list[float]:
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + LAYER_NORM_EPSILON) * weight + bias
