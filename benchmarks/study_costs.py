"""Processor seconds of a training step for each variant of a study, to find training lengths of equal cost.

    python benchmarks/study_costs.py [studies/novels.yaml] [--only pythia_single gated_delta-4 ...] [--rounds 7]

Models, batches and precision are the study's; the text is the bundled one. Each variant has its own process, which
sleeps while the others run.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from jobs import Job, make_training
from rich.console import Console
from turns import serve, tabulate, take_turns

from new_llm.config import DataConfig
from new_llm.config.allocator import keep_freed_memory
from new_llm.config.loading import read_settings
from new_llm.data.dataset import prepare_data
from new_llm.experiments.config import ExperimentConfig, StudyConfig
from new_llm.experiments.runner import build_model

NOVELS = Path(__file__).parent.parent / "studies" / "novels.yaml"


def serve_steps(config: ExperimentConfig) -> None:
    """Serve training steps (forward, backward, AdamW) of a variant's model on the first tokens of the bundled text."""
    device, data = torch.device("cpu"), config.data
    text = prepare_data(DataConfig(source="sotu", tokenizer_vocab_size=data.tokenizer_vocab_size, num_samples=None))
    rows, length = config.train.batch_size, data.seq_length + 1
    tokens = torch.from_numpy(text.train.tokens[: rows * length].astype("int64")).view(rows, length)
    model = build_model(config, config.models[0], data.tokenizer_vocab_size)
    keep_freed_memory()
    serve(make_training(Job("training", precision=config.train.precision), model, tokens, device), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", type=Path, default=NOVELS)
    parser.add_argument("--only", nargs="+", help="variants; the others are compared with the first")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    study = read_settings(arguments.study, StudyConfig)
    if arguments.variant:
        serve_steps(study.configure(arguments.variant, study.seeds[0]))
        return
    names = arguments.only or list(study.variants)
    commands = {name: [sys.executable, __file__, str(arguments.study), "--variant", name] for name in names}
    answers = take_turns(commands, rounds=arguments.rounds, steps=1, threads=arguments.threads)
    first = study.configure(names[0], study.seeds[0])
    title = f"training steps of {study.name}, load {os.getloadavg()[0]:.1f}"
    Console(width=130).print(tabulate(title, answers, first.train.batch_size * first.data.seq_length, names[:1]))


if __name__ == "__main__":
    main()
