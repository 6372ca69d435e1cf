"""An adapter against its base: does what it carries in memory help, or only what it adds inside the segment?"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from new_llm.config import EvalConfig, UserError
from new_llm.config.measurement import TextConfig
from new_llm.data.dataset import read_evaluation_text
from new_llm.data.tokens import TokenSplit
from new_llm.evaluation.long_documents import Baseline, evaluate_long_documents
from new_llm.evaluation.scoring import Autocast
from new_llm.experiments.adapter_config import AdapterTrainingConfig
from new_llm.experiments.adapter_documents import select_documents
from new_llm.models import TransformerLM

WIKITEXT_ON_HUB = "wikitext-2"
BASE = "base"
"""The base's name among the ways of `evaluate_long_documents`."""


class Wikitext(NamedTuple):
    """A further text to measure on, or why there is none."""

    split: TokenSplit | None
    notes: tuple[str, ...]


def read_wikitext(config: AdapterTrainingConfig, tokenizer: Tokenizer) -> Wikitext:
    """The articles of the configured text; the hub's are left out, with a note, where they are out of reach.

    Raises:
        UserError: a local file that can't be read.
    """
    if config.wikitext is None:
        return Wikitext(None, ())
    try:
        return Wikitext(read_evaluation_text(TextConfig(source=config.wikitext), tokenizer).split, ())
    except UserError as error:
        if config.wikitext != WIKITEXT_ON_HUB:
            raise
        return Wikitext(None, (f"WikiText-2 is not measured: {error} (--wikitext FILE names a local one)",))


def measure_adapter(
    base: TransformerLM,
    adapted: TransformerLM,
    splits: dict[str, TokenSplit],
    config: EvalConfig,
    autocast: Autocast,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The adapted model with its memory carried, reset and foreign, and the base, on the same tokens of each text.

    Args:
        base: with segments as long as the adapted model's.
        adapted: the base with the adapter.
        splits: the texts, by name.
        config: max_tokens, batch_size and bootstrap_resamples are used.
        autocast: makes the context in which the models compute.
        say: told what is measured next.

    Returns:
        By text: what `LongDocumentsResult.to_dict` gives.
    """
    measured: dict[str, Any] = {}
    for name, split in splits.items():
        say(name)
        result = evaluate_long_documents(
            adapted,
            limit_documents(split, config.max_tokens),
            min_tokens=2,
            batch_size=config.batch_size,
            baselines=[Baseline(BASE, base, autocast=autocast)],
            num_resamples=config.bootstrap_resamples,
            autocast=autocast,
        )
        measured[name] = result.to_dict()
    return measured


def limit_documents(split: TokenSplit, max_tokens: int | None) -> TokenSplit:
    """The first documents that together have at most so many tokens, but two at least; None: all."""
    if max_tokens is None:
        return split
    number = int((split.offsets[1:] <= max_tokens).sum())
    return select_documents(split, np.arange(min(max(number, 2), split.num_documents)))
