"""A self-check of a trained model: the traps that have made measurements of such models wrong, one check each.

A check measures and judges; it never changes the model, and what the model holds in memory is as before after it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from new_llm.config import UserError
from new_llm.config.doctor import DoctorConfig
from new_llm.data.tokens import TokenSplit
from new_llm.evaluation import (
    doctor_data,
    doctor_labels,
    doctor_memory,
    doctor_modes,
    doctor_structure,
    doctor_training,
)
from new_llm.evaluation.doctor_probe import Finding, Measured, Patient, TrainingData

CheckFunction = Callable[[Patient], Measured]


@dataclass(frozen=True)
class Check:
    """One question to a model.

    Attributes:
        name: what the check is called.
        question: what it asks, for the reader.
        run: measures and judges.
        after: checks whose fault would also make this one fail, so that it would say nothing more.
    """

    name: str
    question: str
    run: CheckFunction
    after: tuple[str, ...] = ()


BROKEN_FORWARD = ("weights", "modes", "causality", "rows", "memory")
"""Where one of these finds a fault, the parallel path is no yardstick for calls, streams and generation."""

CHECKS: tuple[Check, ...] = (
    Check("weights", "all weights are finite numbers", doctor_training.check_weights),
    Check("record", "text, splits and tokenizer are those of the run", doctor_data.check_record),
    Check("modes", "the same logits each time, in training as in evaluation", doctor_modes.check_modes, ("weights",)),
    Check("labels", "losses are those of the next token", doctor_labels.check_alignment, ("weights",)),
    Check("shift", "real text is best predicted one token ahead", doctor_labels.check_shift, ("weights", "labels")),
    Check("causality", "no logit depends on later tokens", doctor_structure.check_causality, ("weights",)),
    Check("rows", "no row sees another", doctor_structure.check_rows, ("weights",)),
    Check("evaluation", "evaluation leaves memory and mode alone", doctor_memory.check_evaluation, ("weights",)),
    Check("memory", "memories stay finite, M and z in one scale", doctor_memory.check_growth, ("weights", "modes")),
    Check("calls", "one call of n segments equals n calls", doctor_structure.check_calls, BROKEN_FORWARD),
    Check(
        "generation", "generation continues the prompt", doctor_structure.check_generation, (*BROKEN_FORWARD, "calls")
    ),
    Check("gates", "gates have left where they began", doctor_training.check_gates, ("weights",)),
    Check(
        "skill",
        "the model predicts better than frequencies do",
        doctor_training.check_skill,
        ("weights", "labels", "shift"),
    ),
    Check("batches", "labels are aligned, memory is reset at documents", doctor_data.check_batches),
    Check("documents", "no validation document is in training", doctor_data.check_documents),
    Check("spans", "no span of text is in both splits", doctor_data.check_spans, ("documents",)),
    Check("reversal", "no reversed fact is in training", doctor_data.check_reversal),
)


@dataclass(frozen=True)
class DoctorReport:
    """All findings, in the order of the checks."""

    findings: tuple[Finding, ...]

    @property
    def has_fault(self) -> bool:
        """Whether any check found a fault."""
        return any(finding.level == "fault" for finding in self.findings)

    def count(self, level: Literal["ok", "warning", "fault", "skipped"]) -> int:
        """Findings of one level."""
        return sum(finding.level == level for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        levels = ("ok", "warning", "fault", "skipped")
        return {
            **{f"num_{level}": self.count(level) for level in levels},
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }


def examine_model(
    model: Any,
    tokenizer: Any,
    text: TokenSplit,
    *,
    data: TrainingData | None = None,
    config: DoctorConfig | None = None,
    autocast: Callable[[], Any] | None = None,
    on_check: Callable[[str], None] | None = None,
) -> DoctorReport:
    """Run the checks on a model.

    Args:
        model: a `TransformerLM`, or a Hugging Face model as `HuggingFaceLM`, on its device.
        tokenizer: its tokenizer, of `tokenizers`.
        text: real text that it was not trained on.
        data: what it was trained on; None: unknown, and what needs it is skipped.
        config: the settings.
        autocast: makes the context in which it computes; probes of structure run without it.
        on_check: told each check's name before it runs.

    Raises:
        UserError: an unknown check is asked for, or the text is too short.
    """
    config = config or DoctorConfig()
    checks = choose_checks(config.checks)
    patient = Patient.admit(model, tokenizer, text, data, config, autocast)
    findings: list[Finding] = []
    faults: set[str] = set()
    for check in checks:
        if on_check:
            on_check(check.name)
        reasons = [name for name in check.after if name in faults]
        if reasons:
            measured = Measured.skip(f"says nothing more while the fault in {', '.join(reasons)} is there")
        else:
            with torch.random.fork_rng(devices=[]):
                measured = check.run(patient)
        if measured.level == "fault":
            faults.add(check.name)
        findings.append(Finding(check=check.name, question=check.question, **measured._asdict()))
    return DoctorReport(tuple(findings))


def choose_checks(names: Sequence[str] | Iterable[str]) -> list[Check]:
    """The checks of these names, in their own order; no names: all.

    Raises:
        UserError: a name is unknown.
    """
    known = {check.name: check for check in CHECKS}
    wanted = list(names)
    for name in wanted:
        if name not in known:
            raise UserError(f"checks: {name!r} is unknown; known are {', '.join(known)}")
    return [check for check in CHECKS if not wanted or check.name in wanted]
