#!/usr/bin/env python3
"""Add a memory in parallel with the layers of a pretrained Pythia: does it learn to use what it has read?

    python examples/adapt_pythia.py                                  # trains a small Pythia here, and adapts it
    python examples/adapt_pythia.py --base EleutherAI/pythia-70m     # from the hub

The adapter is measured on held-out documents with its memory carried, reset before every segment, and replaced by that
of another document (foreign). Only carried versus foreign shows whether the content of the memory is used.
"""

import argparse
from pathlib import Path

from new_llm.config import DataConfig, EvalConfig, TrainConfig
from new_llm.experiments import ExperimentConfig, ModelConfig, run_experiment
from new_llm.experiments.adapter import train_adapter
from new_llm.experiments.config import AdapterDataConfig, AdapterTrainConfig, AdapterTrainingConfig
from new_llm.models.layers.infini import AdapterConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a GPT-NeoX: hub name, folder or run; default: train one here")
    parser.add_argument("--text", default="sotu", help="a file or a folder of texts with long documents")
    parser.add_argument("--samples", type=int, default=1000, help="training samples of the base, of 512 tokens")
    parser.add_argument("--documents", type=int, default=64, help="documents that the adapter trains on")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--document-tokens", type=int, default=1024, help="tokens to read of each document")
    arguments = parser.parse_args()
    base = arguments.base or train_base(arguments)

    results = train_adapter(
        AdapterTrainingConfig(
            name="adapter",
            base=base,
            num_docs=arguments.documents,
            max_doc_tokens=arguments.document_tokens,
            out=Path("adapter.safetensors"),
            wikitext=None,
            adapter=AdapterConfig(init="base", use_delta_rule=False, num_memory_heads=4),
            data=AdapterDataConfig(source=arguments.text, seq_length=256, segments_per_sample=8),
            train=AdapterTrainConfig(num_epochs=arguments.epochs, batch_size=4, learning_rate=3e-3),
            eval=EvalConfig(measures=("sliding", "streaming"), max_tokens=20_000),
        )
    )
    print(f"α = {results['alpha']}; {results['num_parameters']['adapter']:,} adapter weights")
    for name, measured in results["evaluation"].items():
        print(f"{name}: {measured['num_documents']} documents")
        for way, figure in measured["overall"]["perplexity"].items():
            print(f"  {way:<8} perplexity {figure['value']:.2f}")
        for way, difference in measured["overall"]["differences"].items():
            print(f"  carried against {way}: {100 * difference['relative']['value']:+.2f} %")


def train_base(arguments: argparse.Namespace) -> str:
    """Train a small Pythia; the documents that measure the adapter are held out from its training, too."""
    config = ExperimentConfig(
        name="base",
        model=ModelConfig(
            hidden_size=arguments.hidden_size,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=4 * arguments.hidden_size,
        ),
        data=DataConfig(
            source=arguments.text,
            tokenizer_vocab_size=2048,
            num_samples=arguments.samples,
            seq_length=512,
            segments_per_sample=16,
            reversal_pairs=False,
        ),
        train=TrainConfig(num_epochs=1, batch_size=4, learning_rate=2e-3),
        eval=EvalConfig(context=512, stride=256, max_tokens=10_000, measures=("sliding", "streaming")),
    )
    return run_experiment(["pythia"], config)["folder"]


if __name__ == "__main__":
    main()
