"""The doctor: checks of a trained model and its data, one function per fault that has made readings wrong before.

Checks never change the model; its mode, segment length and held memory are restored afterwards.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from new_llm.config import UserError
from new_llm.config.evaluation import DoctorConfig
from new_llm.data.tokenizer import TokenSplit
from new_llm.evaluation.doctor import data_checks, forward_checks, memory_checks  # noqa: F401 - they register the checks
from new_llm.evaluation.doctor.registry import CHECKS, LEVELS, Check, Examination, Finding, Level, skip
from new_llm.evaluation.measure import Column, Measure, Subject, TrainingData
from new_llm.evaluation.scoring import Progress
from new_llm.formats import format_count

__all__ = ["CHECKS", "Check", "DoctorReport", "Finding", "choose_checks", "examine_model"]


@dataclass(frozen=True)
class DoctorReport:
    """All findings, in the order of the checks."""

    findings: tuple[Finding, ...]

    @property
    def has_fault(self) -> bool:
        """Whether any check found a fault."""
        return self.count("fault") > 0

    def count(self, level: Level) -> int:
        """Number of findings of one level."""
        return sum(finding.level == level for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        counts = {f"num_{level}": self.count(level) for level in LEVELS}
        return {**counts, "findings": [dataclasses.asdict(finding) for finding in self.findings]}


def examine_model(
    model: Any,
    tokenizer: Any,
    text: TokenSplit,
    *,
    data: TrainingData | None = None,
    config: DoctorConfig | None = None,
    autocast: Callable[[], Any] | None = None,
    on_progress: Progress | None = None,
) -> DoctorReport:
    """Run the checks on a model.

    Args:
        model: a `TransformerLM`, or a Hugging Face model wrapped in `HuggingFaceLM`, on its device.
        tokenizer: its tokenizer (`tokenizers`).
        text: real text that the model was not trained on.
        data: what the model was trained on; without it the checks of the training data are skipped.
        config: the settings.
        autocast: makes the context in which losses are measured; structural probes run without it.
        on_progress: called after each check with how many have run, and how many there are.

    Raises:
        UserError: a check's name is unknown, or the text is too short.
    """
    config = config or DoctorConfig()
    checks = choose_checks(config.checks)
    exam = Examination(model, tokenizer, text, data, config, autocast or contextlib.nullcontext)
    findings: dict[str, Finding] = {}
    for number, check in enumerate(checks, start=1):
        causes = [name for name in check.after if name in findings and findings[name].level == "fault"]
        with torch.random.fork_rng(devices=[]):
            finding = skip(f"not run: {', '.join(causes)} found a fault first") if causes else check.run(exam)
        findings[check.name] = dataclasses.replace(finding, check=check.name)
        if on_progress:
            on_progress(number, len(checks))
    return DoctorReport(tuple(findings.values()))


def choose_checks(names: Sequence[str]) -> list[Check]:
    """The checks of these names in their own order; all of them if no name is given.

    Raises:
        UserError: a name is unknown.
    """
    for name in names:
        if name not in CHECKS:
            raise UserError(f"checks: {name!r} is unknown; known are {', '.join(CHECKS)}")
    return [check for check in CHECKS.values() if not names or check.name in names]


class Doctor(Measure):
    """Whether the figures of a model can be trusted."""

    name = "doctor"
    title = "self-check"

    def run(self, subject: Subject) -> dict[str, Any]:
        """See `examine_model`."""
        return examine_model(
            subject.model,
            subject.tokenizer,
            subject.split,
            data=subject.training,
            config=subject.settings.doctor,
            autocast=subject.autocast,
            on_progress=subject.on_progress,
        ).to_dict()

    def columns(self, result: dict[str, Any]) -> list[Column]:
        """How many checks came to what."""
        titles = {"ok": "ok", "warning": "warnings", "fault": "faults", "skipped": "skipped"}
        return [
            Column(level, title, result[f"num_{level}"], format_count, group="Self-check")
            for level, title in titles.items()
        ]

    def describe(self, result: dict[str, Any]) -> str:
        """Whether a fault was found."""
        faults = [finding["check"] for finding in result["findings"] if finding["level"] == "fault"]
        return f"self-check: fault in {', '.join(faults)}" if faults else "self-check: no fault was found"

    def notes(self, result: dict[str, Any]) -> list[str]:
        """What each check found, and what to do unless all is well."""
        notes: list[str] = []
        for finding in result["findings"]:
            notes.append(f"{finding['level']}: {finding['check']}: {finding['found']}")
            notes += [f"    to do: {finding['advice']}"] if finding["advice"] else []
        return notes
