"""What the self-check of a trained model looks at, and where it draws its lines."""

from typing import Annotated

from pydantic import Field

from new_llm.config.errors import UserError
from new_llm.config.sections import section


@section
class DoctorConfig:
    """The options of `new-llm eval doctor`."""

    checks: tuple[str, ...] = ()
    """Run these checks alone; none named: all."""
    num_segments: Annotated[int, Field(ge=2)] = 3
    """Segments of a probe."""
    segment_tokens: Annotated[int, Field(ge=4)] = 32
    """Tokens in a segment of a probe: the model's are made so short while it is probed, so that memory is passed on
    within few tokens. One probe of causality keeps the model's own length."""
    num_rows: Annotated[int, Field(ge=2)] = 3
    """Rows of a probe."""
    num_new_tokens: Annotated[int, Field(gt=0)] = 12
    """Tokens that are generated."""
    max_tokens: Annotated[int, Field(ge=64)] = 8192
    """Tokens of text that losses are measured on at most."""
    fill_segments: Annotated[int, Field(ge=2)] = 64
    """Segments that are read into a memory before its growth is looked at."""
    tolerance: Annotated[float, Field(gt=0)] = 1e-5
    """Difference of what must be equal, as a share of the largest logit."""
    rounding_tolerance: Annotated[float, Field(gt=0)] = 1e-3
    """The same where other shapes, hence another order of summation, are compared."""
    half_tolerance: Annotated[float, Field(gt=0)] = 5e-2
    """The same for weights of 16 bits."""
    shift_margin: Annotated[float, Field(gt=0)] = 0.05
    """Nats by which another shift must be better than the next token's to count."""
    gate_margin: Annotated[float, Field(gt=0, lt=0.5)] = 0.04
    """A gate nearer than this to where training began has not moved: 0.46 to 0.54 for one that began at 0.5."""
    span_tokens: Annotated[int, Field(ge=2)] = 50
    """Tokens of a span that training and validation must not share."""
    overlap_share: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the validation spans from which overlap is a fault and no mere warning."""
    copied_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of one validation document's spans from which it counts as copied, which is a fault."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Windows read at once."""

    def __post_init__(self) -> None:
        if len(set(self.checks)) < len(self.checks):
            raise UserError(f"checks: {', '.join(self.checks)}: one is named twice")
