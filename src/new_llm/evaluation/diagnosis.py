"""Verdicts: what a perplexity most likely means and what to do about it. Advice for the reader, never a stop."""

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Verdict:
    """The reading of a perplexity.

    Attributes:
        level: abnormal, suspicious, normal, training or undertrained.
        range: the perplexities that get this verdict.
        text: what they most likely mean, and what to do about it.
    """

    level: str
    range: str
    text: str

    def to_dict(self) -> dict[str, str]:
        """Plain values for JSON."""
        return asdict(self)


# A perplexity below the number gets the verdict beside it.
_VERDICTS = (
    (
        5.0,
        Verdict(
            "abnormal",
            "< 5",
            "the model sees the tokens it is to predict: run new-llm eval doctor, and look for a leak or a mask bug",
        ),
    ),
    (
        30.0,
        Verdict(
            "suspicious",
            "5–30",
            "overfit, or the text was in training: compare training and validation loss, and check the splits with "
            "new-llm eval doctor",
        ),
    ),
    (100.0, Verdict("normal", "30–100", "normal for small data: for less, train on more text")),
    (500.0, Verdict("normal", "100–500", "normal for a model trained from scratch: for less, train longer")),
    (
        math.nextafter(1000.0, math.inf),
        Verdict("training", "500–1000", "still training: train more epochs, or with a higher learning rate"),
    ),
)
_UNDERTRAINED = Verdict(
    "undertrained",
    "> 1000",
    "undertrained: train more epochs, on more text or with a higher learning rate; if the training loss is far lower, "
    "check weights and labels with new-llm eval doctor",
)
_NOT_FINITE = Verdict("abnormal", "not finite", "training diverged: lower the learning rate, or train in fp32")


def diagnose_perplexity(perplexity: float) -> Verdict:
    """Judge a validation perplexity of a model trained from scratch on real text.

    A bound belongs to the range above it (30 is "30–100"), except 1000, which is "500–1000".
    """
    if not math.isfinite(perplexity):
        return _NOT_FINITE
    return next((verdict for bound, verdict in _VERDICTS if perplexity < bound), _UNDERTRAINED)
