"""How a trained model is measured."""

import dataclasses
from typing import Annotated

from pydantic import Field

from new_llm.config.errors import UserError
from new_llm.config.long_documents import LongDocumentsConfig
from new_llm.config.measurement import check_edges
from new_llm.config.recall import RecallConfig
from new_llm.config.reversal import ReversalConfig
from new_llm.config.sections import section


@section
class EvalConfig:
    """The eval section of an experiment."""

    measures: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "sliding",
        "streaming",
        "positions",
        "memory_usage",
        "reversal",
    )
    """What is measured, by name; `my_module:MyMeasure` is a measure of your own."""
    context: Annotated[int, Field(ge=2)] = 2048
    """Tokens in a sliding window."""
    stride: Annotated[int, Field(gt=0)] = 512
    """Tokens from one sliding window to the next; at most the context."""
    position_edges: tuple[int, ...] = (0, 16, 32, 64, 96)
    """Where the ranges of perplexity by position begin; the last one ends with the sample."""
    max_tokens: Annotated[int | None, Field(gt=0)] = 100_000
    """Validation tokens that are scored at most, in whole documents; None: all."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Windows, or documents of a stream, read at once; it does not change the result."""
    segments_per_call: Annotated[int, Field(gt=0)] = 8
    """Segments of a stream read by one call; it does not change the result."""
    memory_usage_segments: Annotated[int, Field(gt=0)] = 32
    """Segments of one document after which the memories' norms are measured."""
    reversal: ReversalConfig = dataclasses.field(default_factory=ReversalConfig)
    long_documents: LongDocumentsConfig = dataclasses.field(default_factory=LongDocumentsConfig)
    recall: RecallConfig = dataclasses.field(default_factory=RecallConfig)

    def __post_init__(self) -> None:
        if self.stride > self.context:
            raise UserError(
                f"eval.stride: {self.stride} is over eval.context ({self.context}): tokens would be skipped"
            )
        if not self.position_edges:
            raise UserError("eval.position_edges: at least one range is needed; [0] is all positions")
        check_edges(self.position_edges, "eval.position_edges")
