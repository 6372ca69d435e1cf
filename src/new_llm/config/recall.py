"""How recall is measured."""

from typing import Annotated, Literal

from pydantic import Field

from new_llm.config.errors import UserError
from new_llm.config.sections import section

MAX_CANDIDATES = 12  # values that each relation of data/recall_facts.json has


@section
class RecallConfig:
    """What is hidden, in how long a text, and how deep."""

    tasks: Annotated[tuple[Literal["passkey", "facts"], ...], Field(min_length=1)] = ("passkey", "facts")
    """passkey: a number of five digits; facts: one sentence about an invented person."""
    lengths: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)] = (1, 2, 4, 8, 16, 32, 64)
    """Lengths of the whole text in segments, e.g. up to 1000; the last segment holds the question. In a text of 1 the
    sentence and the question share the segment."""
    depths: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)] = (0, 0.25, 0.5, 0.75, 1)
    """Where the sentence is hidden: 0 is the beginning of the text, 1 right before the question."""
    trials: Annotated[int, Field(gt=0)] = 20
    """Texts for each task, length and depth."""
    num_candidates: Annotated[int, Field(ge=2, le=MAX_CANDIDATES)] = 10
    """Answers among which the right one is ranked, itself included."""
    part: Literal["eval", "train"] = "eval"
    """Which of two disjoint sets of names, values and keys is drawn from; train: those that training may plant."""
    batch_size: Annotated[int, Field(gt=0)] = 16
    """Texts read at once; it does not change the result."""
    segments_per_call: Annotated[int, Field(gt=0)] = 8
    """Segments read by one call; it does not change the result."""
    num_resamples: Annotated[int, Field(gt=0)] = 2000
    """Resamples of the trials, from which the intervals of ranks come."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence of the intervals."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of texts, places, names, values and resamples."""

    def __post_init__(self) -> None:
        for name in ("tasks", "lengths", "depths"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise UserError(f"{name}: {list(values)} names a value twice")
