"""The registry of checks, their findings, and side-effect-free probes of the model under examination."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from new_llm.config import UserError
from new_llm.evaluation.measure import Subject, TrainingData
from new_llm.evaluation.scoring import find_device, set_mode
from new_llm.models import TransformerLM
from new_llm.testing import find_tolerance

Level = Literal["ok", "warning", "fault", "skipped"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "fault", "skipped")
PROBE_SEED = 0
"""The seed of every probe, so that randomness in the model can't look like another fault."""
NUM_ROWS, NUM_SEGMENTS = 3, 3
"""The size of a probe; `new_llm.testing` needs three rows and several segments."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        level: ok, warning, fault, or skipped if the check does not apply.
        found: one sentence: what was measured and, unless the level is ok, what it means.
        advice: what to do; may be empty.
        check: the check's name.
    """

    level: Level
    found: str
    advice: str = ""
    check: str = ""


ok, warn, fault, skip = (functools.partial(Finding, level) for level in LEVELS)
"""ok: no fault found; warn: read the figures with this in mind; fault: don't trust them; skip: does not apply."""


CheckFunction = Callable[["Examination"], Finding]


class Check(NamedTuple):
    """A registered check.

    Attributes:
        run: measures and judges one thing.
        after: checks whose fault would make this one fail, too; it is then skipped.
        needs_data: whether it needs the training data; it is skipped without them.
    """

    run: CheckFunction
    after: tuple[str, ...]
    needs_data: bool


CHECKS: dict[str, Check] = {}
"""The checks by name, in the order in which they run."""


def register_check(
    name: str, *, after: tuple[str, ...] = (), needs_data: bool = False
) -> Callable[[CheckFunction], CheckFunction]:
    """Register a check function; for the arguments see `Check`.

    Raises:
        ValueError: a check in `after` is not registered yet, and so would run too late.
    """
    late = [other for other in after if other not in CHECKS]
    if late:
        raise ValueError(f"check {name}: {', '.join(late)} must be registered before it")

    def register(run: CheckFunction) -> CheckFunction:
        CHECKS[name] = Check(run, after, needs_data)
        return run

    return register


class Examination:
    """A model under examination, a `TransformerLM` or `HuggingFaceLM`, with text to probe it.

    Losses are measured under the subject's autocast; structural probes run without it. `own_model` is the model if it
    is a `TransformerLM`, else None; `data` is what it was trained on, for checks with `needs_data`; and `tokens`, [N],
    is the beginning of the text.

    Raises:
        UserError: the text is too short for the probes.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.model: Any = subject.model
        self.own_model = subject.model if isinstance(subject.model, TransformerLM) else None
        self.config = subject.settings.doctor
        self.data = cast(TrainingData, subject.training)
        self.device = find_device(subject.model)
        num_needed = NUM_ROWS * NUM_SEGMENTS * self.config.segment_tokens
        if subject.split.num_tokens < num_needed:
            raise UserError(f"doctor: the text has {subject.split.num_tokens} tokens; at least {num_needed} are needed")
        tokens = subject.split.tokens[: max(num_needed, self.config.max_tokens)]
        self.tokens = torch.from_numpy(tokens.astype(np.int64)).to(self.device)

    def take_rows(self, num_rows: int, num_tokens: int) -> Tensor:
        """Return real text, [num_rows, num_tokens]. Rows differ, unless the text is too short and repeats."""
        places = torch.arange(num_rows * num_tokens, device=self.device) % len(self.tokens)
        return self.tokens[places].view(num_rows, num_tokens)

    def take_segments(self) -> Tensor:
        """Return NUM_ROWS rows of NUM_SEGMENTS short segments of text, the last one incomplete."""
        return self.take_rows(NUM_ROWS, NUM_SEGMENTS * self.config.segment_tokens - 2)

    @contextlib.contextmanager
    def probing(self, *, segment_tokens: int | None = None, training: bool = False) -> Iterator[None]:
        """Set mode, segment length and an empty memory inside the block, without gradients; restore them afterwards."""
        model, length = self.model, self.model.segment_length
        try:
            model.segment_length = min(segment_tokens or length, length)
            with set_mode(model, training=training), torch.no_grad(), model.fresh_memory():
                yield
        finally:
            model.segment_length = length

    def read(self, input_ids: Tensor, *, seed: int = PROBE_SEED) -> Tensor:
        """Return logits, [B, T, Z], in float32 or wider, read from an empty memory."""
        torch.manual_seed(seed)
        with self.model.fresh_memory(len(input_ids)):
            logits = self.model(input_ids)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def try_out(self, *checks: Callable[[Any, Tensor], None], ids: Tensor | None = None) -> str:
        """Run conformance checks of `new_llm.testing`; return the first failure's message, or "" if all pass.

        They read `take_segments()` in short segments, or `ids` [B, T] in the model's own segments.
        """
        with self.probing(segment_tokens=self.config.segment_tokens if ids is None else None):
            try:
                for check in checks:
                    check(self.model, self.take_segments() if ids is None else ids)
            except AssertionError as error:
                return str(error)
        return ""

    def allowed(self, logits: Tensor, *, is_rounded: bool = False) -> float:
        """Return the largest difference from these logits that counts as rounding; see `find_tolerance`."""
        dtype = next(iter(self.model.parameters())).dtype
        return find_tolerance(dtype, is_rounded=is_rounded) * max(1.0, float(logits.abs().max()))


def find_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference of two tensors; infinite if either contains NaN or infinity."""
    value = float((a.double() - b.double()).abs().max())
    return value if math.isfinite(value) else math.inf
