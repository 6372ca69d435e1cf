"""What the doctor's checks share: the model under examination, and probes of it that leave no trace."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from new_llm.config import UserError
from new_llm.config.doctor import DoctorConfig
from new_llm.data.curriculum import BatchShape
from new_llm.data.reversal_pairs import ReversalPair
from new_llm.data.tokens import TokenSplit
from new_llm.evaluation.scoring import find_device
from new_llm.models import TransformerLM

Level = Literal["ok", "warning", "fault", "skipped"]
PROBE_SEED = 0  # before every probe, so that chance inside the model can't look like another fault


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        question: what it asks.
        level: ok, warning, fault, or skipped where there was nothing to ask.
        measured: the figures, in words.
        meaning: what they mean; empty where all is well.
        advice: what to do about it; empty where all is well.
        figures: the figures as plain values.
    """

    check: str
    question: str
    level: Level
    measured: str
    meaning: str
    advice: str
    figures: dict[str, Any]


class Measured(NamedTuple):
    """What a check says: a `Finding` without the check's own words."""

    level: Level
    measured: str
    meaning: str
    advice: str
    figures: dict[str, Any]

    @classmethod
    def skip(cls, why: str) -> "Measured":
        """There is nothing to ask."""
        return cls("skipped", why, "", "", {})

    @classmethod
    def ok(cls, measured: str, **figures: Any) -> "Measured":
        """All is well."""
        return cls("ok", measured, "", "", figures)


@dataclass(frozen=True)
class TrainingData:
    """What is known of a model's training.

    Attributes:
        train: the training documents; those of the reversal sentences come first.
        validation: the validation documents.
        shapes: how its batches were cut, one for each stage of a curriculum in segments.
        order: stream or shuffled.
        seed: of the order.
        planted_facts: facts to recall that were planted into every 1,000 tokens of its samples.
        pairs: the reversal pairs whose forward sentences training held; none: it held none.
        differences: what the run recorded of its data and what is found now, where they differ: one line each.
        facts: fingerprints that agree, for the record.
    """

    train: TokenSplit
    validation: TokenSplit
    shapes: tuple[BatchShape, ...]
    order: Literal["stream", "shuffled"]
    seed: int
    planted_facts: float
    pairs: tuple[ReversalPair, ...]
    differences: tuple[str, ...]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Patient:
    """A model under examination.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        text: real text.
        data: its training data; None: unknown.
        config: the settings.
        autocast: makes the context in which it computes.
        device: where it lies.
        tokens: the text's first documents in one row, for probes.
    """

    model: Any
    tokenizer: Any
    text: TokenSplit
    data: TrainingData | None
    config: DoctorConfig
    autocast: Callable[[], Any]
    device: torch.device
    tokens: Tensor

    @classmethod
    def admit(
        cls,
        model: Any,
        tokenizer: Any,
        text: TokenSplit,
        data: TrainingData | None,
        config: DoctorConfig,
        autocast: Callable[[], Any] | None,
    ) -> "Patient":
        """Check that there is text enough.

        Raises:
            UserError: there is not.
        """
        needed = config.num_rows * config.num_segments * config.segment_tokens + 1
        if text.num_tokens < needed:
            raise UserError(
                f"doctor: the text holds {text.num_tokens} tokens; at least {needed} are needed (rows · segments · "
                "tokens of a segment)"
            )
        device = find_device(model, None)
        tokens = torch.from_numpy(text.tokens[: max(needed, config.max_tokens)].astype(np.int64)).to(device)
        return cls(model, tokenizer, text, data, config, autocast or contextlib.nullcontext, device, tokens)

    @property
    def own_model(self) -> TransformerLM | None:
        """The model, if it is one of this family."""
        return self.model if isinstance(self.model, TransformerLM) else None

    @property
    def has_memory(self) -> bool:
        """Whether it has memory layers."""
        return self.own_model is not None and bool(self.own_model.memory_layers)

    def take_rows(self, num_rows: int, num_tokens: int, start: int = 0) -> Tensor:
        """Real text as [num_rows, num_tokens], other text in each row; where it is too short, from its start again."""
        places = (start + torch.arange(num_rows * num_tokens, device=self.device)) % len(self.tokens)
        return self.tokens[places].view(num_rows, num_tokens)

    @contextlib.contextmanager
    def probing(self, *, segment_tokens: int | None = None, training: bool = False) -> Iterator[None]:
        """Inside: no gradients, the given mode, short segments; afterwards model, mode and held memory as before."""
        model = self.model
        modes = [(module, module.training) for module in model.modules()]
        before = model.segment_length
        try:
            model.train(training)
            if segment_tokens is not None:
                model.segment_length = min(segment_tokens, before)
            with torch.no_grad(), model.fresh_memory():
                yield
        finally:
            model.segment_length = before
            for module, mode in modes:
                module.training = mode

    def compute_logits(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Logits [B, T, Z] in float32 or wider, from the memory that is held."""
        torch.manual_seed(PROBE_SEED)
        if self.own_model is not None:
            logits = self.model(input_ids, **options)
        else:
            logits = self.model.model(input_ids=input_ids, use_cache=False).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def read_fresh(self, input_ids: Tensor, *, fill: Tensor | None = None, per_row: bool = False) -> Tensor:
        """Logits from an empty memory, or from one that has read `fill` before.

        Args:
            input_ids: [B, T].
            fill: [B, T']; read into the memory first.
            per_row: a memory for each row; else one shared by all.
        """
        with self.model.fresh_memory(batch_size=len(input_ids) if per_row else None):
            if fill is not None and self.has_memory:
                torch.manual_seed(PROBE_SEED)
                self.model(fill, update_memory=True)
            return self.compute_logits(input_ids)

    def allowed(self, logits: Tensor, *, is_rounded: bool = False) -> float:
        """The difference from these logits that counts as none."""
        is_half = next(iter(self.model.parameters())).dtype.itemsize < 4
        share = self.config.rounding_tolerance if is_rounded else self.config.tolerance
        share = self.config.half_tolerance if is_half else share
        return share * max(1.0, float(logits.abs().max()))


def find_difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors; 0 of empty ones, infinite where one is not a number."""
    if not a.numel():
        return 0.0
    value = float((a.double() - b.double()).abs().max())
    return value if np.isfinite(value) else float("inf")


def find_vocab_size(patient: Patient) -> int:
    """Rows of the embedding."""
    if patient.own_model is not None:
        return patient.own_model.vocab_size
    embeddings = patient.model.model.get_input_embeddings()
    return int(embeddings.weight.shape[0])
