"""Teach a trained model to keep facts: the measurements for docs/experiments/recall.md.

A token memory of its own goes between a plain Pythia, whose weights stay as they are, and its head. It is trained on
real text in which facts are planted, so it learns which sentences to keep and to write nothing else. Then three
things are measured: recall of facts it has never met, recall with an emptied memory, and the price, the change in
perplexity on plain text. A finished seed is skipped, so an interrupted command continues when repeated. Run:

    new-llm study studies/addresses.yaml --only pythia_segments --seeds 0 1 2
    python studies/taught_recall.py --runs runs/addresses/pythia_segments-s{0,1,2} --out runs/taught-recall

It takes about half an hour of one core per seed.
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from new_llm.config import DataConfig, EvalConfig
from new_llm.config.evaluation import RecallConfig, SubjectConfig
from new_llm.data.dataset import PreparedData, prepare_data
from new_llm.data.recall_facts import ANSWER, TEXT, SamplePlanter
from new_llm.evaluation import MEASURES, evaluate_streaming
from new_llm.evaluation.measure import Subject
from new_llm.evaluation.recall import TASKS
from new_llm.evaluation.statistics import DocumentLosses, compare_models, find_share_interval, find_t_interval
from new_llm.experiments.run_folder import read_json, write_json
from new_llm.experiments.subject import load_any_model
from new_llm.models import TransformerLM
from new_llm.models.layers import Layer, PythiaLayer
from new_llm.models.layers.base import ReadTokens, Segments, register_layer
from new_llm.models.layers.token_memory import TokenMemoryAttention, TokenMemoryLayer, TokenMemoryOptions
from new_llm.models.ops import scale_to_length


class Stage(NamedTuple):
    """A part of the training."""

    steps: int
    rows: int  # samples per step
    num_samples: int
    segments: int  # per sample
    facts: float  # per 1,000 tokens


STAGES = (Stage(1400, 4, 1000, 32, 4.0), Stage(500, 1, 300, 128, 1.0))  # short samples, then long ones
LEARNING_RATE = 3e-3
GATE_LEARNING_RATE = 1e-2
ANSWER_WEIGHT = 10.0
MARGIN = 2.0  # nats by which the right answer has to lead, since what a memory holds fades
WRITE_PENALTY = 8.0  # times −log(1 − β) for each token of ordinary text; β itself would hardly push back at β = 1
TEXT_SHARE = 0.2  # the share of the ordinary tokens whose loss is computed
TEXT_WEIGHT = (0.03, 0.1, 0.4)  # from the first, at this share of the steps, to 1 at that share: first to recall at all
PENALTY_RAMP = (0.15, 0.5)  # likewise, from 0 to WRITE_PENALTY
MARGIN_RAMP = (0.3, 0.6)  # and from 0 to MARGIN
RIDGE = 0.3  # added to the variances when keys are whitened, as a share of their mean
SEGMENT = 64
PLANTING = DataConfig(
    source="sotu",
    order="shuffled",
    planted_made_up=0.75,
    planted_tasks=("facts", "passkey", "passkey", "changed", "reworded"),  # pass keys are the hardest
)
RECALL = RecallConfig(
    tasks=("facts", "passkey", "changed", "reworded"),
    lengths=(3, 18, 258, 1026),
    depths=(0,),
    trials=24,
    segments_per_call=16,
)
OPTIONS: dict[str, Any] = {
    "num_memory_heads": 2,
    "memory_key_size": 128,
    "retention_init": 0.9998,
    "read_scale_init": 60.0,
    "read_gate_init": -1.5,
}


class FactAttention(TokenMemoryAttention):
    """A token memory whose keys, write strengths β and read gates g come from a small network beside the model.

    The network f is one Pythia layer over the segment, whose input is W [h; u]: h is the state that the model hands to
    its head, u the token's row of the head. Queries and keys are W' [h; f]; g is an MLP of [h; f]; β is one of [h; f]
    and of how much the model expected the token, h_{t−1} · u_t. Everything else is as in `TokenMemoryAttention`.

    Args:
        hidden_size: D.
        options: as of a token memory.
    """

    step, end_segments = Layer.step, Layer.end_segments  # a stream runs the open segment again

    def __init__(self, hidden_size: int, options: TokenMemoryOptions) -> None:
        super().__init__(hidden_size, options)
        heads, both = options.num_memory_heads, 2 * hidden_size

        def perceptron(width: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, both), nn.GELU(), nn.Linear(both, heads))

        self.enter = nn.Linear(both, hidden_size)
        self.side = PythiaLayer(hidden_size=hidden_size, num_heads=4, intermediate_size=4 * hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.query, self.key = (nn.Linear(both, heads * self.head_size) for _ in range(2))
        self.strength, self.token_gate = perceptron(both + 1), perceptron(both)

    @torch.no_grad()
    def initialize_features(self) -> None:
        """Draw weights from N(0, 0.02²), start with W_v and W_o as identities, and β = 1/2 for every token."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for linear in (self.value, self.dense):
            nn.init.eye_(linear.weight)
        for perceptron in (self.strength, self.token_gate):
            nn.init.zeros_(cast(nn.Linear, perceptron[-1]).weight)
        nn.init.normal_(self.enter.weight, std=0.06)

    @torch.no_grad()
    def whiten_keys(self, states: Tensor) -> None:
        """Start with q = k = R C^{−1/2} (h − mean), for states h [N, D] of covariance C and a random rotation R a head.

        The states of any two tokens are alike, so that their plain projections hardly tell contexts apart.
        """
        mean = states.mean(0)
        values, vectors = torch.linalg.eigh((states - mean).T @ (states - mean) / len(states))
        whiten = (vectors * (values + RIDGE * values.mean()).rsqrt()).T
        for head in range(self.num_memory_heads):
            rows = slice(head * self.head_size, (head + 1) * self.head_size)
            rotated = torch.linalg.qr(torch.randn(len(mean), len(mean)))[0][: self.head_size] @ whiten
            beside = 0.05 * torch.randn_like(rotated)
            for linear in (self.query, self.key):
                linear.weight[rows] = torch.cat((rotated, beside), dim=1)
                linear.bias[rows] = -rotated @ mean

    def _project(self, hidden: Tensor, tokens: ReadTokens | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert tokens is not None
        rows = F.embedding(tokens.input_ids, tokens.head_weight)
        expected = (F.pad(hidden[..., :-1, :], (0, 0, 1, 0)) * rows).sum(-1, keepdim=True) / 10
        beside, _ = self.side(self.enter(torch.cat((hidden, 10 * scale_to_length(rows)), dim=-1)), None, Segments())
        both = torch.cat((hidden, self.norm(beside)), dim=-1)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        beta = torch.sigmoid(self.strength(torch.cat((both, expected), dim=-1)).to(wide)).transpose(-1, -2)
        q, k = (linear(both).unflatten(-1, (self.num_memory_heads, -1)) for linear in (self.query, self.key))
        q = scale_to_length(q, self.read_scale * self.compute_gates(both)).transpose(-2, -3)
        k = scale_to_length(k).transpose(-2, -3)
        return q, k, self.value(scale_to_length(rows)), beta


@register_layer("fact_memory", options=TokenMemoryOptions)
class FactLayer(TokenMemoryLayer):
    """A `TokenMemoryLayer` with a `FactAttention`."""

    attention: FactAttention

    def __init__(self, hidden_size: int, **options: Any) -> None:
        super().__init__(hidden_size, **options)
        self.attention = FactAttention(hidden_size, TokenMemoryOptions(**options))
        self.attention.initialize_features()


def plant_samples(data: PreparedData, stage: Stage, seed: int) -> tuple[Tensor, Tensor]:
    """Token ids and their kinds, [N, T + 1] each, of a stage's samples from random places of the training text."""
    length = stage.segments * SEGMENT
    distance = (SEGMENT, length - SEGMENT)
    config = dataclasses.replace(PLANTING, planted_facts=stage.facts, planted_distance=distance)
    planter, generator = SamplePlanter(data.tokenizer, config, seed), np.random.default_rng([seed, length])
    tokens = data.train.tokens
    starts = generator.integers(len(tokens) - length - 1, size=stage.num_samples).tolist()
    planted = [planter.plant(tokens[start : start + length + 1].astype(np.int64), 0, start) for start in starts]
    ids, kinds = (torch.from_numpy(np.stack(parts)) for parts in zip(*planted, strict=True))
    return ids, kinds


def compute_states(model: TransformerLM, ids: Tensor) -> Tensor:
    """What the model hands to its head, [N, T, D]; computed once, since the model does not change."""
    with torch.inference_mode():
        return torch.cat([model.compute_hidden(rows[:, :-1]).half() for rows in ids.split(8)]).clone()


def draw_batches(
    model: TransformerLM, layer: FactLayer, data: PreparedData, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Token ids, kinds and states of each step's samples; the first stage's states whiten the layer's keys."""
    generator = torch.Generator().manual_seed(seed)
    for number, stage in enumerate(STAGES):
        ids, kinds = plant_samples(data, stage, seed)
        states = compute_states(model, ids)
        if not number:
            layer.attention.whiten_keys(states[:64].float().flatten(0, 1))
        order = [torch.randperm(len(ids), generator=generator) for _ in range(stage.steps * stage.rows // len(ids) + 1)]
        for rows in torch.cat(order).split(stage.rows)[: stage.steps]:
            yield ids[rows], kinds[rows], states[rows].float()


def ramp(progress: float, begin: float, end: float) -> float:
    """0 before `begin`, 1 after `end`, linear between them."""
    return min(1.0, max(0.0, (progress - begin) / (end - begin)))


def teach(model: TransformerLM, layer: FactLayer, data: PreparedData, seed: int) -> None:
    """Train the layer alone: answers in the loss with a weight, ordinary text, and how much of that is written."""
    attention, head, steps = layer.attention, model.read_head_weight().detach(), sum(stage.steps for stage in STAGES)
    gates = attention.gate_parameters()
    slow = [one for one in attention.parameters() if all(one is not gate for gate in gates)]
    groups = [{"params": slow}, {"params": gates, "lr": GATE_LEARNING_RATE}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: ramp(step, -1, 20) * (0.55 + 0.45 * float(np.cos(np.pi * step / steps)))
    )
    strengths: list[Tensor] = []  # logits of β
    hook = attention.strength.register_forward_hook(lambda *call: strengths.append(call[-1]))
    generator = torch.Generator().manual_seed(seed)
    began = time.perf_counter()
    for step, (ids, kinds, hidden) in enumerate(draw_batches(model, layer, data, seed)):
        targets, kind, progress = ids[:, 1:], kinds[:, 1:], step / steps
        tokens = ReadTokens(ids[:, :-1].unflatten(1, (-1, SEGMENT)), head)
        mixed = layer(hidden.unflatten(1, (-1, SEGMENT)), None, Segments(None, write_last=False, tokens=tokens))[0]
        is_text = (kind == TEXT) & (torch.rand(kind.shape, generator=generator) < TEXT_SHARE)
        chosen, margin = kind == ANSWER, MARGIN * ramp(progress, *MARGIN_RAMP)
        logits = mixed.flatten(1, 2)[chosen] @ head.T
        logits[range(len(logits)), targets[chosen]] -= margin
        answers = F.cross_entropy(logits, targets[chosen], reduction="sum")
        text = F.cross_entropy(mixed.flatten(1, 2)[is_text] @ head.T, targets[is_text], reduction="sum")
        low, *text_ramp = TEXT_WEIGHT
        text_weight = max(low, ramp(progress, *text_ramp)) / TEXT_SHARE
        ordinary = strengths.pop().flatten(1, 2)[kinds[:, :-1] == TEXT]
        loss = (ANSWER_WEIGHT * answers + text_weight * text) / kind.numel()
        (loss + WRITE_PENALTY * ramp(progress, *PENALTY_RAMP) * F.softplus(ordinary).mean()).backward()
        nn.utils.clip_grad_norm_(attention.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 100 == 0:
            answer = float(answers.detach()) / max(1, len(logits))
            written = float(torch.sigmoid(ordinary).mean().detach())
            seconds = time.perf_counter() - began
            print(f"step {step + 1}: answers {answer:.2f} nats, written {written:.5f}, {seconds:.0f} s", flush=True)
    hook.remove()


def measure(run: str, seed: int) -> dict[str, Any]:
    """Teach the model of a run, and measure it before and after."""
    loaded = load_any_model(SubjectConfig(run=run, device="cpu", precision="fp32"))
    assert loaded.config is not None
    model, data = cast(TransformerLM, loaded.model), prepare_data(loaded.config.data)
    torch.manual_seed(seed)

    def read_plain_text() -> dict[str, list[Any]]:
        result = evaluate_streaming(model, data.validation, segments_per_call=16, batch_size=32, max_tokens=100_000)
        return result.documents

    plain = read_plain_text()
    layer = FactLayer(model.layer_list[0].hidden_size, **OPTIONS)
    teach(model, layer, data, seed)
    model.layers.append(layer)
    model.reset_memory()
    settings = EvalConfig(recall=dataclasses.replace(RECALL, seed=seed))  # other texts for each seed
    subject = Subject(model=model, tokenizer=loaded.tokenizer, split=data.validation, settings=settings)
    recall = cast(dict[str, Any], MEASURES["recall"].run(subject))
    for cell, way in itertools.product(recall["cells"], ("carried", "reset")):
        del cell[way]["answers"]
    info = model.memory_info()
    added = sum(one.numel() for one in layer.parameters())
    return {
        "plain": plain,
        "taught": read_plain_text(),
        "recall": recall,
        "memory_bytes": info["total_bytes"],
        "added_parameters": added,
        "parameters": model.num_parameters()["total"] - added,
    }


def summarize(results: dict[str, dict[str, Any]]) -> str:
    """The price and a table of recall, for docs/experiments/recall.md.

    A share's interval covers Wilson's over all texts and Student's over the seeds, since seeds can differ by more than
    their texts do.
    """

    def read(way: str) -> dict[str, DocumentLosses]:
        found = ((seed, one[way]) for seed, one in results.items())
        return {seed: DocumentLosses.read(one["num_tokens"], one["total_nll"]) for seed, one in found}

    price = compare_models(read("taught"), read("plain"))
    lines = [f"price on plain text: {price.describe() if price else 'other tokens'}", ""]
    lines += [
        "| task | segments | right | by seed | ranks first of ten | memory emptied | old value given |",
        "|---" * 7 + "|",
    ]
    cells = [one["recall"]["cells"] for one in results.values()]
    for same in zip(*cells, strict=True):
        exact, first, old = ([one["carried"][figure]["value"] for one in same] for figure in ("exact", "first", "old"))
        count = sum(one["num_trials"] for one in same)
        low, high = find_share_interval(round(float(np.mean(exact)) * count), count, 0.95)
        least, most = find_t_interval(exact)
        if least is not None and most is not None:
            low, high = min(low, max(least, 0.0)), max(high, min(most, 1.0))
        reset = [one["reset"]["exact"]["value"] for one in same]
        row = [TASKS[same[0]["task"]], f"{same[0]['mean_distance']:.0f}"]
        row += [f"{100 * np.mean(exact):.0f} % [{100 * low:.0f}, {100 * high:.0f}]"]
        row += [", ".join(f"{100 * share:.0f}" for share in exact)]
        row += [f"{100 * np.mean(shares):.0f} %" for shares in (first, reset, old)]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, metavar="RUN", help="runs of a plain Pythia, a seed each")
    parser.add_argument("--out", type=Path, default=Path("runs/taught-recall"), help="folder of the results")
    given = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for run in given.runs:
        file, seed = given.out / f"{Path(run).name}.json", Path(run).name.rpartition("-s")[2]
        if not file.is_file():
            given.out.mkdir(parents=True, exist_ok=True)
            write_json(file, measure(run, int(seed)))
        results[seed] = read_json(file)
    print(summarize(results))


if __name__ == "__main__":
    main()
