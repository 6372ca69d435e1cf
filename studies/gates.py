"""Should the gates of trained memory models stand where they do? Long documents with all gates set to other values.

Reads the trained models of a study (studies/memory.yaml, done), sets every gate of each to a share of memory from 0
(local attention alone) to 1 (memory alone), and measures the held-out long documents again, with the study's settings:
perplexity relative to that with the gates as learned, mean and 95 % interval over the seeds. Nothing is trained. A
token memory's gates are learned for each token: how far they move is said as quantiles over the tokens. Run:

    python3 studies/gates.py studies/memory.yaml --variants infini multi_memory token_memory [--runs-dir runs]

It takes about a minute of one core a model, and writes gates.json into the study's folder.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from new_llm.config import UserError
from new_llm.config.evaluation import SubjectConfig, TextConfig
from new_llm.config.loading import read_settings
from new_llm.data.tokenizer import TokenSplit
from new_llm.evaluation.long_documents import select_long_documents
from new_llm.evaluation.perplexity import evaluate_streaming
from new_llm.evaluation.statistics import find_t_interval
from new_llm.experiments.adapter import select_documents
from new_llm.experiments.config import StudyConfig
from new_llm.experiments.evaluation import load_evaluation_text
from new_llm.experiments.run_folder import describe_code, write_json
from new_llm.experiments.study import Cell, is_trained
from new_llm.experiments.subject import LoadedModel, load_any_model
from new_llm.models.layers.token_memory import TokenMemoryAttention, TokenMemoryLayer

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def measure_seed(study: StudyConfig, variant: str, seed: int, shares: Sequence[float]) -> dict[str, Any]:
    """One trained model: its gates, and what each share changes."""
    run = study.folder / Cell(variant, seed).name
    if not is_trained(study, Cell(variant, seed)):
        raise UserError(f"{run}: no finished training is there; run: new-llm study with this file first")
    subject = load_any_model(SubjectConfig(run=str(run), device=study.configure(variant, seed).device))
    documents = read_long_documents(study, subject)
    layers = subject.model.memory_layers.values()
    with record_token_gates(subject) as token_gates:
        learned = measure_perplexity(study, subject, documents)
    found: dict[str, Any] = {
        "variant": variant,
        "seed": seed,
        "gates": [value for layer in layers for value in layer.gate_values()],
        "perplexity": learned,
        "relative": {},
        "token_gates": [describe_gates(torch.cat(token_gates))] if token_gates else [],
    }
    for share in shares:
        for layer in layers:
            layer.attention.gate.data.fill_(torch.logit(torch.tensor(share)))
            if isinstance(layer, TokenMemoryLayer):
                layer.attention.token_gate.weight.data.zero_()
        found["relative"][str(share)] = measure_perplexity(study, subject, documents) / learned - 1
    return found


@contextmanager
def record_token_gates(subject: LoadedModel) -> Iterator[list[Tensor]]:
    """The gates of every token that a token memory, which can only be the last layer, reads inside the block.

    [tokens, H] a call; none where there is no token memory.
    """
    found: list[Tensor] = []

    def keep(attention: TokenMemoryAttention, inputs: tuple[Any, ...]) -> None:
        hidden, _, segments = inputs
        gates = attention.compute_gates(hidden)
        found.append(gates.flatten(0, -2) if segments.valid is None else gates[segments.valid])

    last = subject.model.layer_list[-1]
    if not isinstance(last, TokenMemoryLayer):
        yield found
        return
    with last.attention.register_forward_pre_hook(keep):
        yield found


def describe_gates(gates: Tensor) -> dict[str, Any]:
    """Quantiles of gates [tokens, H] over the tokens of each head, and over all."""
    levels = torch.tensor(QUANTILES, dtype=gates.dtype)
    return {
        "quantiles": list(QUANTILES),
        "heads": gates.quantile(levels, dim=0).T.tolist(),
        "all": gates.flatten().quantile(levels).tolist(),
        "num_tokens": len(gates),
    }


def read_long_documents(study: StudyConfig, subject: LoadedModel) -> TokenSplit:
    """The study's long documents."""
    settings = study.long_documents
    if settings is None:
        raise UserError(f"{study.name}: long_documents: the study measures none")
    split = load_evaluation_text(subject, TextConfig(source=None)).split
    chosen = np.array(select_long_documents(split, settings), dtype=np.int64)
    return select_documents(split, chosen, settings.max_tokens_per_document)


def measure_perplexity(study: StudyConfig, subject: LoadedModel, documents: TokenSplit) -> float:
    """Of the documents, the memory carried."""
    assert study.long_documents is not None
    return evaluate_streaming(
        subject.model,
        documents,
        batch_size=study.long_documents.batch_size,
        device=subject.device,
        autocast=subject.autocast,
    ).perplexity


def describe(values: list[float]) -> str:
    """A mean with its interval, in percent."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{100 * mean:+.1f}"
    low, high = find_t_interval(values, 0.95)
    assert low is not None
    assert high is not None
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def main() -> None:
    """Measure all seeds of the variants, print a table and write gates.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--variants", nargs="+", default=["infini"])
    parser.add_argument("--runs-dir", type=Path)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    arguments = parser.parse_args()
    study = read_settings(arguments.study, StudyConfig)
    if arguments.runs_dir:
        study = dataclasses.replace(study, runs_dir=arguments.runs_dir)
    for variant in arguments.variants:
        if variant not in study.variants:
            raise UserError(f"--variants: {variant!r} is no variant; there are {', '.join(study.variants)}")
    records = []
    print("| model | " + " | ".join(f"{share:g}" for share in arguments.shares) + " |")
    print("|---" * (len(arguments.shares) + 1) + "|")
    for variant in arguments.variants:
        of_variant = [measure_seed(study, variant, seed, arguments.shares) for seed in study.seeds]
        records += of_variant
        columns = [[one["relative"][str(share)] for one in of_variant] for share in arguments.shares]
        print(f"| {variant} | " + " | ".join(map(describe, columns)) + " |", flush=True)
    for record in records:
        for layer in record["token_gates"]:
            values = ", ".join(f"{value:.2f}" for value in layer["all"])
            print(f"{record['variant']}, seed {record['seed']}: quantiles {QUANTILES} of tokens' gates: {values}")
    write_json(study.folder / "gates.json", {"code": describe_code(), "models": records})
    print(f"gates.json is in {study.folder}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"gates.py: {error}", file=sys.stderr)
        sys.exit(2)
