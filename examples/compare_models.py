#!/usr/bin/env python3
"""Compare models on your own text: train them on the same batches, and print perplexity, memory and speed.

    python examples/compare_models.py --text my_texts --models pythia infini multi_memory

Without --text it reads the State of the Union addresses that come with the program. The report is in runs/compare.
"""

import argparse

from new_llm.config import DataConfig, EvalConfig, TrainConfig
from new_llm.experiments import ExperimentConfig, ModelConfig, run_experiment
from new_llm.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="sotu", help="a file or a folder of texts")
    parser.add_argument("--models", nargs="+", default=["pythia", "infini", "token_memory"])
    parser.add_argument("--samples", type=int, default=200, help="training samples of 512 tokens")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=256)
    arguments = parser.parse_args()

    config = ExperimentConfig(
        name="compare",
        model=ModelConfig(
            recipe="tuned",
            hidden_size=arguments.hidden_size,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=4 * arguments.hidden_size,
        ),
        # Segments of 64 tokens, so that memory has something to carry; gradients run through 8 of them.
        data=DataConfig(
            source=arguments.text,
            tokenizer_vocab_size=2048,
            num_samples=arguments.samples,
            seq_length=512,
            segments_per_sample=8,
        ),
        train=TrainConfig(num_epochs=arguments.epochs, batch_size=4, learning_rate=2e-3, warmup_fraction=0.3),
        eval=EvalConfig(context=512, stride=256, max_tokens=20_000, measures=("sliding", "streaming")),
    )
    results = run_experiment(arguments.models, config, write_report=write_report)

    print(f"perplexity of the next token from its own frequency alone: {results['unigram_perplexity']:.1f}")
    for entry in results["models"]:
        measured = entry["evaluation"]["streaming"]
        error = measured["standard_error"]  # none under five documents
        print(
            f"{entry['model_type']:<13} perplexity {measured['perplexity']:7.2f}{f' ± {error:.2f}' if error else ''}, "
            f"{entry['memory_info']['total_bytes']:,} bytes of memory, "
            f"{entry['training']['tokens_per_second']:,.0f} tokens/s"
        )
    print(f"report: {results['folder']}/report.html")


if __name__ == "__main__":
    main()
