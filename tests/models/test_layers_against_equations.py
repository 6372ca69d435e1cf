"""Layers with memory against their equations alone, in float64, one row and one token after the other.

No reference calls the package: a test hands over a layer's weights and the settings that it was built with.

σ(x) = ELU(x) + 1;  A_mem = σ(q) M / max(σ(q) z, ε);
A_loc[t] = Σ_{j≤t} (σ(q_t)·σ(k_j)) v_j / max(Σ_{j≤t} σ(q_t)·σ(k_j), ε);
out = g A_mem + (1 − g) A_loc;  M ← w M + Σ σ(k_t)ᵀ (v_t − r_t),  z ← w z + Σ σ(k_t). With shifted keys σ(k_t) is
that of the token before, 0 for the segment's first.

Write rules: token by token M ← α_t M + β_t φ(k_t)ᵀ (v_t − r_t), z ← α_t z + β_t φ(k_t). Divided by z, r reads the
memory from before the segment; without z, r_t = φ(k_t) α_t M, with what the segment's earlier tokens wrote.

Legend: D hidden size, H heads, K their width, N memories; one token's q, k and v are [H, K].
"""

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model_cases import DTYPES, HIDDEN_SIZE, LAYER_CASES, TOLERANCES, LayerCase, assert_near, draw, randomize, text_ids
from new_llm.models.layers import InfiniLayer, ReadTokens, Segments, compressive

EPSILON = 1e-6
ALIBI_SLOPES = {  # by number of heads: 2^(−8i/H); arXiv:2108.12409
    1: [1 / 256],
    2: [1 / 16, 1 / 256],
    4: [1 / 4, 1 / 16, 1 / 64, 1 / 256],
}


class Reference:
    """A layer by its equations: x + Attn(LN1 x) + MLP(LN2 x), segment by segment.

    What subclasses define: `attend`, which maps a segment and the memory to the attention's output and the new memory.
    """

    def __init__(self, layer: Any) -> None:
        self.weights = {name.removeprefix("attention."): value.double() for name, value in layer.state_dict().items()}
        self.kind, self.options = layer.kind, layer.settings
        self.heads = self.options.get("num_memory_heads") or self.options.get("num_heads")
        self.width = layer.hidden_size // self.heads

    def read_row(self, x: Tensor, rows: Tensor, segment_length: int) -> tuple[Tensor, dict[str, Any]]:
        """One row's tokens [T, D] with the head's rows of them: the output, and the memory after the last segment."""
        outputs, memory = [], self.empty_memory()
        for segment in x.split(segment_length):
            mixed, memory = self.attend(self._norm(segment, "input_layernorm"), memory)
            wide = self._linear(self._norm(segment, "post_attention_layernorm"), "mlp.dense_h_to_4h")
            outputs.append(segment + mixed + self._linear(F.gelu(wide), "mlp.dense_4h_to_h"))
        return torch.cat(outputs), self.describe(memory)

    def empty_memory(self) -> Any:
        return None

    def describe(self, memory: Any) -> dict[str, Any]:
        """What the layer's own memory of the row must hold."""
        return {}

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [S, H, K] of a fused projection, after the convolution; its last tap is that of the token."""
        inputs, taps = self._linear(x, "query_key_value"), self.weights.get("convolution.weight")
        if taps is not None:
            padded = F.pad(inputs, (0, 0, taps.shape[1] - 1, 0))
            inputs = torch.stack([(taps.T * padded[t : t + taps.shape[1]]).sum(0) for t in range(len(x))])
        if self.kind == "gated_delta":  # all of q, all of k, all of v
            q, k, v = inputs.view(len(x), 3, self.heads, self.width).unbind(1)
        else:  # head by head
            q, k, v = inputs.view(len(x), self.heads, 3, self.width).unbind(2)
        return q, k, v

    def _rule(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """β and α of one token, [H]."""
        beta = alpha = torch.ones(self.heads).double()
        if "strength.weight" in self.weights:
            beta = self._linear(x, "strength").sigmoid()
        if "token_decay.rate" in self.weights:
            step = F.softplus(self._linear(x, "token_decay.linear") + self.weights["token_decay.bias"])
            alpha = (-self.weights["token_decay.rate"].exp() * step).exp()
        return beta, alpha


class ReferenceMemory(NamedTuple):
    """One row's memory of one layer: M [N, H, K, V], z [N, H, K], tokens of each, segments of the layer."""

    M: Tensor
    z: Tensor
    tokens: Tensor
    segments: int = 0


class CompressiveReference(Reference):
    """Infini, multi-memory and hierarchical layers."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        options, is_infini = self.options, layer.kind == "infini"
        self.router = options.get("router", "relevance")
        self.is_tree = options.get("hierarchy") == "fenwick"
        self.num_memories = options["num_memory_banks" if is_infini else "num_memories"]
        self.num_memories += self.router == "top1"  # the last one is shared
        self.turn = options["segments_per_bank"] if is_infini else 1
        self.decay = torch.ones(self.heads).double()
        if options.get("use_alibi"):
            self.decay = (-options["alibi_scale"] * torch.tensor(ALIBI_SLOPES[self.heads]).double()).exp()
        self.normalizes = options["use_normalizer"]

    def empty_memory(self) -> ReferenceMemory:
        M = torch.zeros(self.num_memories, self.heads, self.width, self.width).double()
        return ReferenceMemory(M, M[..., 0], torch.zeros(self.num_memories, dtype=torch.int64))

    def describe(self, memory: ReferenceMemory) -> dict[str, Any]:
        counts = {"num_tokens": memory.tokens, "num_segments": memory.segments}
        return {"memories": memory.M, "norms": memory.z, **counts}

    def attend(self, x: Tensor, memory: ReferenceMemory) -> tuple[Tensor, ReferenceMemory]:
        raw_q, raw_k, v = self._project(x)
        q, k = (map_features(raw, self.options["key_features"]) for raw in (raw_q, raw_k))
        if self.options["normalize_keys"]:
            k = k / k.sum(-1, keepdim=True)
        if self.options["use_key_shift"]:
            k = torch.cat((torch.zeros_like(k[:1]), k[:-1]))
        local_q, local_k = (q, k) if self.options["key_features"] == "elu" else (sigma(raw_q), sigma(raw_k))
        gates = self.weights["gate"].expand(len(x), self.heads)
        if "token_gate.weight" in self.weights:
            gates = gates + self._linear(x, "token_gate")
        mixed = []
        for t, gate in enumerate(gates.sigmoid().unsqueeze(-1)):
            if self.options["local_attention"] == "softmax":
                local = attend_softmax(raw_q[t], raw_k[: t + 1], v[: t + 1], t, torch.arange(t + 1))
            else:
                scores = (local_k[: t + 1] * local_q[t]).sum(-1)
                weights = scores / scores.sum(0).clamp_min(EPSILON)
                local = (weights.unsqueeze(-1) * v[: t + 1]).sum(0)
            mixed.append(gate * self._read(q[t], memory) + (1 - gate) * local)
        return self._linear(torch.stack(mixed).flatten(1), "dense"), self._write(k, v, memory, x)

    def _read(self, q: Tensor, memory: ReferenceMemory) -> Tensor:
        """A_mem of one token, [H, V]."""
        if self.is_tree:  # all levels, each weighed by λ
            levels = self._linear(standardize(q), "level_weights").view(self.heads, -1).softmax(-1).T
            above = (levels.unsqueeze(-1) * torch.einsum("hk,nhkv->nhv", q, memory.M)).sum(0)
            below = (levels * torch.einsum("hk,nhk->nh", q, memory.z)).sum(0)
            return above / below.clamp_min(EPSILON).unsqueeze(-1)
        reads = torch.stack([self._recall(q, M, z) for M, z in zip(memory.M, memory.z, strict=True)])
        if self.router == "top1":
            scores = self._linear(standardize(q), "router").softmax(0)
            n = int(scores.argmax())
            share = scores[n] * bool(memory.tokens[n])
            return share * reads[n] + (1 - share) * reads[-1]
        fine = (self._weigh(q, memory).unsqueeze(-1) * reads).sum(0)
        if self.kind != "hierarchical":
            return fine
        coarse = self._recall(q, memory.M.sum(0), memory.z.sum(0))
        hidden = F.gelu(self._linear(coarse.flatten(), "expansion_gate.dense_in"))
        p = self._linear(hidden, "expansion_gate.dense_out").sigmoid()
        return p * fine + (1 - p) * coarse

    def _weigh(self, q: Tensor, memory: ReferenceMemory) -> Tensor:
        """The weight of every memory in one token's read, [N, H]."""
        if self.kind == "infini":
            return self.weights.get("bank_weights", torch.zeros(self.heads, 1).double()).softmax(-1).T
        filled = memory.tokens > 0
        scores = (memory.z[filled] / memory.tokens[filled, None, None] * q).sum(-1) / math.sqrt(self.width)
        temperature = self.options["selection_temperature"]
        if self.router == "standardized":
            apart = scores - scores.mean(0)
            scores = apart / (apart.square().mean(0) + 1e-12).sqrt()
            temperature = self.weights["log_temperature"].exp()
        weights = torch.zeros(self.num_memories, self.heads).double()
        weights[filled] = (scores / temperature).softmax(0)
        return weights

    def _recall(self, features: Tensor, M: Tensor, z: Tensor) -> Tensor:
        """φ(q) M / max(φ(q) z, ε), or without z φ(q) M; 0 where the memory is empty."""
        above = torch.einsum("hk,hkv->hv", features, M)
        return above / (features * z).sum(-1, keepdim=True).clamp_min(EPSILON) if self.normalizes else above

    def _write(self, k: Tensor, v: Tensor, memory: ReferenceMemory, x: Tensor) -> ReferenceMemory:
        """Write features of keys and values, [S, H, K], into the memory whose turn it is, or where they are sent."""
        turn = self._level(memory) if self.is_tree else memory.segments // self.turn % self.num_memories
        M, z, tokens = memory.M.clone(), memory.z.clone(), memory.tokens.clone()
        if self.is_tree:  # all full levels below the one that is written move up into it
            for t in (M, z, tokens):
                t[turn] += t[:turn].sum(0)
                t[:turn] = 0
        before = M.clone(), z.clone()
        places = [(turn,)] * len(k)
        if self.router == "top1":
            places = [(int(self._linear(standardize(key), "router").argmax()), -1) for key in k]
        else:
            M[turn] *= self.decay[:, None, None]
            z[turn] *= self.decay[:, None]
        for t, key in enumerate(k):
            beta, alpha = self._rule(x[t])
            for n in places[t]:
                M[n] *= alpha[:, None, None]
                z[n] *= alpha[:, None]
                # divided by z, what is found is that from before the segment
                found = self._recall(key, *((before[0][n], before[1][n]) if self.normalizes else (M[n], z[n])))
                missing = v[t] - self.options["use_delta_rule"] * found
                M[n] += beta[:, None, None] * key.unsqueeze(-1) * missing.unsqueeze(-2)
                z[n] += beta[:, None] * key
                tokens[n] += 1
        return ReferenceMemory(M, z, tokens, memory.segments + 1)

    def _level(self, memory: ReferenceMemory) -> int:
        """The level of a tree that the next segment goes to: a binary counter's first empty digit, or the last."""
        level = 0
        while level < self.num_memories - 1 and memory.segments >> level & 1:
            level += 1
        return level


class GatedDeltaReference(Reference):
    """The gated delta rule token by token, across the borders of segments."""

    def read_row(self, x: Tensor, rows: Tensor, segment_length: int) -> tuple[Tensor, dict[str, Any]]:
        return super().read_row(x, rows, len(x))

    def attend(self, x: Tensor, memory: Any) -> tuple[Tensor, Any]:
        M, out = torch.zeros(self.heads, self.width, self.width).double(), []
        for token, q, k, v in zip(x, *self._project(x), strict=True):
            q, k = self._map(q), self._map(k)
            beta, alpha = self._rule(token)
            M = alpha[:, None, None] * M
            missing = F.silu(v) - torch.einsum("hk,hkv->hv", k, M)
            M = M + beta[:, None, None] * k.unsqueeze(-1) * missing.unsqueeze(-2)
            read = torch.einsum("hk,hkv->hv", q, M) / math.sqrt(self.width)
            read = read / (read.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.weights["norm.weight"]
            if self.options["use_output_gate"]:
                read = read * F.silu(self._linear(token, "output_gate")).view(self.heads, self.width)
            out.append(read.flatten())
        return self._linear(torch.stack(out), "dense"), (M, len(x))

    def _map(self, x: Tensor) -> Tensor:
        kind = self.options["key_features"]
        features = map_features(F.silu(x) if kind == "unit" else x, kind)
        return features if kind == "unit" else features / features.sum(-1, keepdim=True)

    def describe(self, memory: Any) -> dict[str, Any]:
        return {"memories": memory[0].unsqueeze(0), "num_tokens": memory[1]}


class TransformerXLReference(Reference):
    """Softmax over the segment and the C tokens before it."""

    def attend(self, x: Tensor, memory: Any) -> tuple[Tensor, Any]:
        q, k, v = self._project(x)
        before, share = len(memory[0]) if memory else 0, self.options["rotary_pct"]
        if memory:
            k, v = torch.cat((memory[0], k)), torch.cat((memory[1], v))
        mixed = []
        for t in range(len(x)):
            seen = slice(0, before + t + 1)
            mixed.append(attend_softmax(q[t], k[seen], v[seen], t, torch.arange(-before, t + 1), share).flatten())
        kept = self.options["memory_tokens"]
        return self._linear(torch.stack(mixed), "dense"), (k[-kept:], v[-kept:])


class TokenMemoryReference(Reference):
    """A token memory: outputs, M less the initial memory, and Σ k²."""

    def read_row(self, x: Tensor, rows: Tensor, segment_length: int) -> tuple[Tensor, dict[str, Any]]:
        w, outputs, heads = self.weights, [], self.heads
        first, M = w["initial_memory"], w["initial_memory"]
        z = torch.zeros(first.shape[:2]).double()
        retained = w["retention"].sigmoid().unsqueeze(-1)
        queries, keys = (
            F.normalize(self._linear(x, name).view(len(x), heads, -1), dim=-1) for name in ("query", "key")
        )
        values = self._linear(F.normalize(rows, dim=-1), "value")
        segments = torch.arange(len(x)).split(segment_length)
        for segment in segments:
            for t in segment:
                gates = (w["gate"] + self._linear(x[t], "token_gate")).sigmoid()
                read = torch.einsum("h,hk,hkv->v", gates, queries[t], M)
                outputs.append(x[t] + w["read_scale"] * self._linear(read, "dense"))
            M, z = first + retained.unsqueeze(-1) * (M - first), retained * z
            for t in segment[1:]:  # the first token follows nothing that the segment holds
                beta = 2 * self._linear(x[t], "strength").sigmoid().unsqueeze(-1)
                found = torch.einsum("hk,hkv->hv", keys[t - 1], M) * self.options["use_delta_rule"]
                M = M + torch.einsum("hk,hv->hkv", keys[t - 1], beta * (values[t] - found))
                z = z + keys[t - 1].square()
        tensors = {"memories": (M - first).unsqueeze(0), "norms": z.unsqueeze(0)}
        return torch.stack(outputs), tensors | {"num_tokens": len(x), "num_segments": len(segments)}


class RecurrentMemoryReference(Reference):
    """The recurrent memory transformer, whose Pythia layers are those of the package."""

    def __init__(self, layer: Any) -> None:
        self.stack = layer

    def read_row(self, x: Tensor, rows: Tensor, segment_length: int) -> tuple[Tensor, dict[str, Any]]:
        memory, outputs, segments = self.stack.first_memory.weight, [], x.split(segment_length)
        for segment in segments:
            whole = torch.cat((memory, segment, memory))[None, None]
            for layer in self.stack.layers:
                whole, _ = layer(whole)
            outputs.append(whole[0, 0][len(memory) : -len(memory)])
            memory = self.stack.memory_norm(whole[0, 0][-len(memory) :])
        return torch.cat(outputs), {"vectors": memory, "num_segments": len(segments)}


REFERENCES = {
    "infini": CompressiveReference,
    "multi_memory": CompressiveReference,
    "hierarchical": CompressiveReference,
    "gated_delta": GatedDeltaReference,
    "transformer_xl": TransformerXLReference,
    "token_memory": TokenMemoryReference,
    "rmt": RecurrentMemoryReference,
}


def sigma(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def map_features(x: Tensor, kind: str) -> Tensor:
    return {"unit": lambda: F.normalize(x, dim=-1), "softmax": lambda: x.softmax(-1), "elu": lambda: sigma(x)}[kind]()


def attend_softmax(q: Tensor, k: Tensor, v: Tensor, place: int, places: Tensor, share: float = 0.25) -> Tensor:
    """softmax(q kᵀ / √K) v of one query [H, K] and T keys [T, H, K], of which a share turns with their places."""
    half = int(q.shape[-1] * share) // 2
    turned = torch.stack([rotate(key, int(at), half) for key, at in zip(k, places, strict=True)])
    weights = ((turned * rotate(q, place, half)).sum(-1) / math.sqrt(q.shape[-1])).softmax(0)
    return (weights.unsqueeze(-1) * v).sum(0)


def rotate(heads: Tensor, place: int, half: int) -> Tensor:
    """Heads turned to their place in the segment; angles are rounded to float32, as in GPT-NeoX."""
    angles = place * (1.0 / 10000.0 ** (torch.arange(half) / half))
    cos, sin = angles.cos().double(), angles.sin().double()
    first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def standardize(features: Tensor) -> Tensor:
    """A LayerNorm without weights over the features [H, K] of all heads, [H·K]."""
    return F.layer_norm(features.flatten(), (features.numel(),))


@pytest.mark.parametrize("case", LAYER_CASES.values(), ids=LAYER_CASES)
def test_layer_and_its_gradients_equal_the_equations(case):
    """Seven segments of 3 tokens in one pass, then an odd piece of 2 that reads what they wrote."""
    layer = case.build().double()
    randomize(layer)
    x, ids, head = draw(2, 23, HIDDEN_SIZE), text_ids(2, 23), draw(128, HIDDEN_SIZE, seed=1)
    outputs, memory = [], None
    for part, length in ((slice(0, 21), 3), (slice(21, 23), 2)):
        tokens = ReadTokens(ids[:, part].unflatten(1, (-1, length)), head)
        out, memory = layer(x[:, part].unflatten(1, (-1, length)), memory, Segments(tokens=tokens))
        outputs.append(out.flatten(1, 2))
    actual = torch.cat(outputs, dim=1)
    weights = dict(layer.named_parameters())
    with torch.autograd.graph.allow_mutation_on_saved_tensors():  # the equations write in place
        for row in range(2):
            reference = REFERENCES[case.kind](layer)
            reference.weights = {name.removeprefix("attention."): weight for name, weight in weights.items()}
            expected, end = reference.read_row(x[row], head[ids[row]], 3)
            assert_near(actual[row], expected, 1e-10)
            for name, value in end.items():
                found: Any = getattr(memory, name)[row].detach()
                if isinstance(value, Tensor) and value.is_floating_point():
                    assert_near(found, value.detach(), 1e-10 * max(1.0, float(found.abs().max())))
                else:
                    assert bool((found == value).all()), name
        found, wanted = (
            torch.autograd.grad(one.square().sum(), list(weights.values())) for one in (actual[1], expected)
        )
    for one, other in zip(found, wanted, strict=True):  # also by what earlier segments wrote
        assert_near(one, other, 1e-9 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_segment_runs_in_chunks(dtype, monkeypatch):
    """Beyond the length up to which local attention is one masked product."""
    monkeypatch.setattr(compressive, "CHUNK_LENGTH", 4)
    layer = LayerCase("infini", {"num_memory_heads": 2}).build()
    randomize(layer)
    x = draw(1, 11, HIDDEN_SIZE)
    expected, _ = REFERENCES["infini"](layer).read_row(x[0], x[0], 11)
    with torch.no_grad():
        actual, _ = layer.to(dtype)(x[:, None].to(dtype))
    assert_near(actual[0, 0], expected.to(dtype), TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        *ALIBI_SLOPES.items(),
        (8, [2.0**-i for i in range(1, 9)]),
        # No power of 2: the slopes of the next lower one, then every second of the next higher one.
        (3, [2**-4, 2**-8, 2**-2]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
    ],
)
def test_decay_of_each_head_follows_alibi(heads, slopes):
    layer = InfiniLayer(48, 4, 24, num_memory_heads=heads, use_alibi=True, alibi_scale=2.0)
    assert layer.attention.decay == pytest.approx([math.exp(-2.0 * slope) for slope in slopes], rel=1e-12)
