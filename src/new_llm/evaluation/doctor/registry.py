"""What every check shares: the registry, findings, and the model under examination with probes that leave no trace."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from new_llm.config import UserError
from new_llm.config.evaluation import DoctorConfig
from new_llm.evaluation.measure import Subject, TrainingData
from new_llm.evaluation.scoring import find_device
from new_llm.models import TransformerLM

Level = Literal["ok", "warning", "fault", "skipped"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "fault", "skipped")
PROBE_SEED = 0
"""Seeds every probe, so that randomness inside the model can't look like another fault."""
TOLERANCE, ROUNDING_TOLERANCE, HALF_TOLERANCE = 1e-5, 1e-3, 5e-2
"""Allowed difference of what must be equal, as a share of the largest logit: of equal shapes; of others, and so another
order of summation; of 16-bit weights."""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        level: ok, warning, fault, or skipped where the check does not apply.
        found: one sentence: what was measured and, unless all is well, what it means.
        advice: what to do about it; empty if there is nothing to do.
        check: the check's name.
    """

    level: Level
    found: str
    advice: str = ""
    check: str = ""


ok, warn, fault, skip = (functools.partial(Finding, level) for level in LEVELS)
"""All is well; the reader should know this first; the model's figures can't be trusted; the check does not apply."""


@dataclass(frozen=True)
class Check:
    """One registered check.

    Attributes:
        name: its name, for `--checks` and the report.
        fault: the fault it looks for: the first line of its docstring.
        run: measures and judges.
        after: checks whose fault would make this one fail too, so that it is skipped.
        needs_data: whether it is skipped where the training data are unknown.
    """

    name: str
    fault: str
    run: "CheckFunction"
    after: tuple[str, ...]
    needs_data: bool


CheckFunction = Callable[["Examination"], Finding]
CHECKS: dict[str, Check] = {}
"""The checks by name, in the order in which they run."""


def register_check(
    name: str, *, after: tuple[str, ...] = (), needs_data: bool = False
) -> Callable[[CheckFunction], CheckFunction]:
    """Decorator that adds a check function; the first line of its docstring says which fault it looks for.

    `Check` says what the arguments mean.

    Raises:
        ValueError: a check in `after` is not registered yet, so it would run too late.
    """
    late = [other for other in after if other not in CHECKS]
    if late:
        raise ValueError(f"check {name}: {', '.join(late)} must be registered before it")

    def register(run: CheckFunction) -> CheckFunction:
        looks_for = (inspect.getdoc(run) or "").partition("\n")[0].rstrip(".")
        CHECKS[name] = Check(name, looks_for, run, after, needs_data)
        return run

    return register


@dataclass(frozen=True)
class Examination:
    """A model under examination: a `TransformerLM` or `HuggingFaceLM`, with the text that its subject brings.

    Losses are measured in the subject's autocast; structural probes run without it.

    Raises:
        UserError: the text is too short for the probes.
    """

    subject: Subject

    def __post_init__(self) -> None:
        num_tokens = self.subject.split.num_tokens
        if num_tokens < self._needed:
            raise UserError(
                f"doctor: the text has {num_tokens} tokens; at least {self._needed} are needed "
                "(num_rows · num_segments · segment_tokens + 1)"
            )

    @property
    def _needed(self) -> int:
        return self.config.num_rows * self.config.num_segments * self.config.segment_tokens + 1

    @property
    def model(self) -> Any:
        """The model, on its device."""
        return self.subject.model

    @property
    def config(self) -> DoctorConfig:
        """The doctor's settings."""
        return self.subject.settings.doctor

    @property
    def data(self) -> TrainingData:
        """What the model was trained on; for checks that need it."""
        assert self.subject.training is not None
        return self.subject.training

    @functools.cached_property
    def device(self) -> torch.device:
        """The model's device."""
        return find_device(self.model, None)

    @functools.cached_property
    def tokens(self) -> Tensor:
        """The beginning of the text in one row, for probes."""
        tokens = self.subject.split.tokens[: max(self._needed, self.config.max_tokens)]
        return torch.from_numpy(tokens.astype(np.int64)).to(self.device)

    @property
    def own_model(self) -> TransformerLM | None:
        """The model if it is a `TransformerLM`; None for a Hugging Face model."""
        return self.model if isinstance(self.model, TransformerLM) else None

    @property
    def has_memory(self) -> bool:
        """Whether the model has memory layers."""
        return self.own_model is not None and bool(self.own_model.memory_layers)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        if self.own_model is not None:
            return self.own_model.vocab_size
        return int(self.model.model.get_input_embeddings().weight.shape[0])

    def take_rows(self, num_rows: int, num_tokens: int, start: int = 0) -> Tensor:
        """Real text as [num_rows, num_tokens], different in each row; a short text is repeated."""
        places = (start + torch.arange(num_rows * num_tokens, device=self.device)) % len(self.tokens)
        return self.tokens[places].view(num_rows, num_tokens)

    def take_segments(self, num_rows: int | None = None, start: int = 0) -> Tensor:
        """A probe of `num_segments` short segments, [num_rows, T]; one segment of a model that can't read more."""
        rows, width = num_rows or self.config.num_rows, self.config.segment_tokens * self.config.num_segments
        return self.take_rows(rows, width if self.own_model else min(width, self.model.segment_length), start)

    @contextlib.contextmanager
    def probing(self, *, segment_tokens: int | None = None, training: bool = False) -> Iterator[None]:
        """Inside: no gradients, the given mode and segment length; afterwards mode, length and memory as before."""
        model = self.model
        modes = [(module, module.training) for module in model.modules()]
        length = model.segment_length
        try:
            model.train(training)
            model.segment_length = min(segment_tokens or length, length)
            with torch.no_grad(), model.fresh_memory():
                yield
        finally:
            model.segment_length = length
            for module, mode in modes:
                module.training = mode

    def compute_logits(self, input_ids: Tensor, *, seed: int = PROBE_SEED, **options: Any) -> Tensor:
        """Logits [B, T, Z] in float32 or wider, read with the memory that is held."""
        torch.manual_seed(seed)
        if self.own_model is not None:
            logits = self.model(input_ids, **options)
        else:
            logits = self.model.model(input_ids=input_ids, use_cache=False).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def count_rows(self, input_ids: Tensor) -> int | None:
        """The rows of a memory that a batch of ids can write: None, one for all, where they can share it."""
        return None if self.own_model is None or self.own_model.rows_can_share else len(input_ids)

    def read_fresh(self, input_ids: Tensor, *, fill: Tensor | None = None, per_row: bool = False) -> Tensor:
        """Logits from an empty memory, or from one that has read `fill` [B, T'] first; one memory per row or shared."""
        with self.model.fresh_memory(len(input_ids) if per_row else self.count_rows(input_ids)):
            if fill is not None and self.has_memory:
                torch.manual_seed(PROBE_SEED)
                self.model(fill, update_memory=True)
            return self.compute_logits(input_ids)

    def allowed(self, logits: Tensor, *, is_rounded: bool = False) -> float:
        """The difference from these logits that counts as rounding.

        Args:
            is_rounded: the compared shapes differ, and with them the order of summation.
        """
        is_half = next(iter(self.model.parameters())).dtype.itemsize < 4
        share = HALF_TOLERANCE if is_half else ROUNDING_TOLERANCE if is_rounded else TOLERANCE
        return share * max(1.0, float(logits.abs().max()))


def find_difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors; 0 if they are empty, infinite if either holds NaN or infinity."""
    if not a.numel():
        return 0.0
    value = float((a.double() - b.double()).abs().max())
    return value if np.isfinite(value) else float("inf")
