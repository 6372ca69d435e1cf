#!/usr/bin/env python3
"""Fill a memory with a text, move it to a fresh copy of the model, and merge the memories of two machines.

    python examples/move_memories.py

First trains a small model without the delta rule: its memory is a plain sum, so memories can be added. After so little
training, what the model has read hardly helps with what follows.
"""

import argparse
from pathlib import Path

import torch

from new_llm.config import DataConfig, EvalConfig, TrainConfig
from new_llm.data.sources import load_documents
from new_llm.experiments import ExperimentConfig, ModelConfig, run_experiment
from new_llm.experiments.memory_filling import fill_memory
from new_llm.experiments.run_folder import load_run_model
from new_llm.models import load_memory_file, save_memory_file
from new_llm.models.memory_file import merge_memory_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="sotu", help="a file or a folder of texts")
    parser.add_argument("--samples", type=int, default=200, help="training samples of 512 tokens")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--characters", type=int, default=30_000, help="characters to read into each memory")
    arguments = parser.parse_args()

    config = ExperimentConfig(
        name="memories",
        model=ModelConfig(
            recipe="tuned",
            hidden_size=arguments.hidden_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=4 * arguments.hidden_size,
            use_delta_rule=False,
        ),
        data=DataConfig(
            source=arguments.text,
            tokenizer_vocab_size=1024,
            num_samples=arguments.samples,
            seq_length=512,
            segments_per_sample=8,
        ),
        train=TrainConfig(num_epochs=arguments.epochs, batch_size=4, learning_rate=2e-3),
        eval=EvalConfig(context=512, stride=256, max_tokens=10_000, measures=("sliding", "streaming")),
    )
    run = Path(run_experiment(["infini"], config)["folder"])

    # Three parts of the longest text: two machines read the first two, and the model is measured on the third.
    _, text = max(load_documents(DataConfig(source=arguments.text)), key=lambda document: len(document[1]))
    size = arguments.characters
    parts = [text[start : start + size] for start in (0, size)]
    rest = text[2 * size : 2 * size + 3000]
    for machine, part in zip("ab", parts, strict=True):
        file = run / f"{machine}.txt"
        file.write_text(part, encoding="utf-8")
        model, tokenizer = load_run_model(run, "infini")  # a fresh copy of the weights on each machine
        fill_memory(model, tokenizer, [file])
        save_memory_file(model, run / f"{machine}.safetensors")
    merged = merge_memory_files([run / "a.safetensors", run / "b.safetensors"], run / "both.safetensors")
    print(f"merged: {merged.tokens_seen:,} tokens in {(run / 'both.safetensors').stat().st_size:,} bytes")

    model, tokenizer = load_run_model(run, "infini")
    ids = torch.tensor([tokenizer.encode(rest).ids])
    for name in (None, "a", "b", "both"):
        model.reset_memory()
        if name is not None:
            load_memory_file(model, run / f"{name}.safetensors")
        with torch.no_grad():
            _, stats = model.compute_loss(ids, labels=ids)
        print(f"what follows, with memory {name or 'empty':<5}: perplexity {stats.perplexity:.2f}")


if __name__ == "__main__":
    main()
