"""How the reversal curse is measured."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from new_llm.config.sections import section


@section
class ReversalConfig:
    """The options of `new-llm eval reversal`."""

    pairs: Path | None = None
    """A .csv or .jsonl file of pairs; None: the project's own."""
    pairs_per_relation: Annotated[int | None, Field(gt=0)] = None
    """Draw so many pairs of each relation, or all that it has; None: all. Only drawn pairs' answers compete."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the drawn pairs and of the bootstrap."""
    batch_size: Annotated[int, Field(gt=0)] = 128
    """Short sentences read at once; it does not change the result."""
    max_sentences: Annotated[int, Field(gt=0)] = 1_000_000
    """Prompts with answers that are scored at most: each relation asks for about twice the square of its pairs."""
    num_resamples: Annotated[int, Field(gt=0)] = 1000
    """Bootstrap resamples that the intervals rest on."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence of the intervals."""
