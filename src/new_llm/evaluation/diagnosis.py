"""What a perplexity most likely means: advice for the reader, never a reason to stop."""

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Verdict:
    """The reading of a perplexity.

    Attributes:
        level: abnormal, suspicious, normal, training or undertrained.
        range: the perplexities that get this verdict.
        text: what they most likely mean.
    """

    level: str
    range: str
    text: str

    def to_dict(self) -> dict[str, str]:
        """Plain values for JSON."""
        return asdict(self)


# Perplexities below the number get the verdict beside it, in rising order.
_VERDICTS = (
    (5.0, Verdict("abnormal", "< 5", "the model sees what it is to predict: look for a leak or a mask bug")),
    (30.0, Verdict("suspicious", "5–30", "overfit, or the text was in the training set")),
    (100.0, Verdict("normal", "30–100", "normal for small data")),
    (500.0, Verdict("normal", "100–500", "normal for a model trained from scratch")),
    (math.nextafter(1000.0, math.inf), Verdict("training", "500–1000", "still training")),
)
_UNDERTRAINED = Verdict("undertrained", "> 1000", "undertrained, or measured on the wrong weights or labels")
_NOT_FINITE = Verdict("abnormal", "not finite", "training diverged or the measurement broke")


def diagnose_perplexity(perplexity: float) -> Verdict:
    """Judge a validation perplexity of a model trained from scratch on real text.

    A bound belongs to the range above it (30 is "30–100"), but for 1000, which is "500–1000".
    """
    if not math.isfinite(perplexity):
        return _NOT_FINITE
    return next((verdict for bound, verdict in _VERDICTS if perplexity < bound), _UNDERTRAINED)
