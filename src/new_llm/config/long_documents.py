"""How long documents are measured."""

from typing import Annotated

from pydantic import Field

from new_llm.config.errors import UserError
from new_llm.config.measurement import check_edges
from new_llm.config.sections import section


@section
class LongDocumentsConfig:
    """Which documents are long, in what ranges they are measured, and against what."""

    min_tokens: Annotated[int, Field(ge=2)] = 2048
    """Tokens that a document must have."""
    edges: Annotated[tuple[int, ...], Field(min_length=1)] = (
        0,
        1024,
        2048,
        4096,
        8192,
        16384,
        32768,
        65536,
        131072,
    )
    """Where the ranges of distance from the document's start begin, in tokens; the last one is open."""
    max_documents: Annotated[int | None, Field(gt=0)] = None
    """Long documents that are measured at most, the first ones; None: all."""
    max_tokens_per_document: Annotated[int | None, Field(ge=2)] = None
    """Tokens of a document that are read at most; None: all."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Documents read at once, in pairs that lend each other their memory; it does not change the result."""
    segments_per_call: Annotated[int, Field(gt=0)] = 8
    """Segments of a baseline read by one call; it does not change the result."""
    baselines: tuple[str, ...] = ()
    """Other models with the same tokenizer that are read in consecutive segments: RUN, RUN:MODEL, or a Hugging Face
    model, which is cut as the measured model is."""
    window_baselines: tuple[str, ...] = ()
    """Likewise, but read in sliding windows as long as the model's own segment: a model without memory with its whole
    context."""
    window_stride: Annotated[int | None, Field(gt=0)] = None
    """Tokens from one of these windows to the next; None: half a window."""
    num_resamples: Annotated[int, Field(gt=0)] = 2000
    """Resamples of the documents, from which the intervals come."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence of the intervals."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the resamples."""

    def __post_init__(self) -> None:
        check_edges(self.edges, "edges")
        if self.max_tokens_per_document is not None and self.max_tokens_per_document < self.min_tokens:
            raise UserError(
                f"max_tokens_per_document: {self.max_tokens_per_document} is under min_tokens ({self.min_tokens})"
            )

    def choose_window_stride(self, window: int, where: str, name: str) -> int:
        """Tokens from one window of a baseline to the next: as configured, else half a window.

        Args:
            window: tokens in a window, the baseline's segment.
            where: what sets the stride, for the message.
            name: what the baseline is called.

        Raises:
            UserError: the stride is longer than the window.
        """
        stride = self.window_stride or max(1, window // 2)
        if stride > window:
            raise UserError(f"{where}: {stride} is over the window of {name} ({window})")
        return stride
