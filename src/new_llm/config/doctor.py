"""Settings of the doctor: the size of its probes and the limits of its judgements."""

from typing import Annotated

from pydantic import Field

from new_llm.config.errors import UserError
from new_llm.config.sections import section


@section
class DoctorConfig:
    """The options of `new-llm eval doctor`."""

    checks: tuple[str, ...] = ()
    """Run only these checks; none given: all."""
    num_segments: Annotated[int, Field(ge=2)] = 3
    """Segments of a probe."""
    segment_tokens: Annotated[int, Field(ge=4)] = 32
    """Tokens in a segment of a probe. The model's segments are shortened to it while it is probed, so that memory is
    carried on within few tokens; one probe of causality keeps the model's own length."""
    num_rows: Annotated[int, Field(ge=2)] = 3
    """Rows of a probe."""
    num_new_tokens: Annotated[int, Field(gt=0)] = 12
    """Tokens to generate."""
    max_tokens: Annotated[int, Field(ge=64)] = 8192
    """Tokens of text to measure losses on, at most."""
    context: Annotated[int, Field(ge=2)] = 1024
    """Tokens in a window of the check of skill."""
    fill_segments: Annotated[int, Field(ge=2)] = 64
    """Segments to read into a memory before it is examined."""
    tolerance: Annotated[float, Field(gt=0)] = 1e-5
    """Allowed difference of what must be equal, as a share of the largest logit."""
    rounding_tolerance: Annotated[float, Field(gt=0)] = 1e-3
    """The same where compared shapes, and with them the order of summation, differ."""
    half_tolerance: Annotated[float, Field(gt=0)] = 5e-2
    """The same for 16-bit weights."""
    loss_margin: Annotated[float, Field(gt=0)] = 0.02
    """Nats by which autocast may change the mean loss."""
    shift_margin: Annotated[float, Field(gt=0)] = 0.05
    """Nats by which the losses of two label shifts must differ to count."""
    gate_margin: Annotated[float, Field(gt=0)] = 0.16
    """A gate sigmoid(β) has not moved if its β has changed by less than this: 0.46 to 0.54 for one that began at 0.5,
    0.86 to 0.90 for one that began at 0.88."""
    alpha_margin: Annotated[float, Field(gt=0)] = 1e-3
    """An adapter whose α is nearer to 0 than this adds nothing."""
    span_tokens: Annotated[int, Field(ge=2)] = 50
    """Tokens of a span that training and validation must not share."""
    overlap_share: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of validation spans from which overlap is a fault rather than a warning."""
    copied_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of one validation document's spans from which it counts as copied, which is a fault."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Windows read at once."""

    def __post_init__(self) -> None:
        if len(set(self.checks)) < len(self.checks):
            raise UserError(f"checks: {', '.join(self.checks)}: a check is listed twice")
