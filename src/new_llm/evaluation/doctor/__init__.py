"""The doctor: checks of a trained model and its data, each for a fault that has made measurements wrong before.

Checks never change the model; they restore its mode, segment length and held memory.
"""

import dataclasses
from collections import Counter
from typing import Any

import torch

from new_llm.config import UserError
from new_llm.evaluation.doctor import data_checks, model_checks  # noqa: F401 - they register the checks
from new_llm.evaluation.doctor.registry import CHECKS, LEVELS, Check, Examination, Finding, skip
from new_llm.evaluation.language_models import CachedModel
from new_llm.evaluation.measure import Column, Measure, Subject
from new_llm.formats import format_count

__all__ = ["CHECKS", "Check", "Doctor", "Finding"]


class Doctor(Measure):
    """Whether the figures of a model can be trusted."""

    name = "doctor"
    title = "self-check"

    def run(self, subject: Subject) -> dict[str, Any]:
        """Run the checks; return `findings` in order, with the fields of `Finding`, and `num_ok`, `num_warning` etc.

        `subject.split` must be real text that the model was not trained on. Without `subject.training`, checks of the
        training data are skipped.

        Raises:
            UserError: a check's name is unknown, or the text is too short.
        """
        if isinstance(subject.model, CachedModel):  # examine the model without its cache
            subject = dataclasses.replace(subject, model=subject.model.model)
        chosen, exam = subject.settings.doctor.checks, Examination(subject)
        for name in chosen:
            if name not in CHECKS:
                raise UserError(f"checks: unknown check {name!r}; known checks are {', '.join(CHECKS)}")
        checks = {name: check for name, check in CHECKS.items() if not chosen or name in chosen}
        findings: dict[str, Finding] = {}
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # checks seed all of them
        for number, (name, check) in enumerate(checks.items(), start=1):
            causes = [other for other in check.after if other in findings and findings[other].level == "fault"]
            if causes:
                finding = skip(f"not run: {', '.join(causes)} found a fault first")
            elif check.needs_data and subject.training is None:
                finding = skip("the model belongs to no run, so its training text is unknown")
            else:
                with torch.random.fork_rng(devices):
                    finding = check.run(exam)
            findings[name] = dataclasses.replace(finding, check=name)
            if subject.on_progress:
                subject.on_progress(number, len(checks))
        counts = Counter(finding.level for finding in findings.values())
        levels = {f"num_{level}": counts[level] for level in LEVELS}
        return {**levels, "findings": [dataclasses.asdict(finding) for finding in findings.values()]}

    def columns(self, result: dict[str, Any]) -> list[Column]:
        """Return the number of findings of each level."""
        titles = {"ok": "ok", "warning": "warnings", "fault": "faults", "skipped": "skipped"}
        return [
            Column(level, title, result[f"num_{level}"], format_count, group="Self-check")
            for level, title in titles.items()
        ]

    def describe(self, result: dict[str, Any]) -> str:
        """State which checks found a fault."""
        faults = [finding["check"] for finding in result["findings"] if finding["level"] == "fault"]
        return f"self-check: fault in {', '.join(faults)}" if faults else "self-check: no fault was found"

    def notes(self, result: dict[str, Any]) -> list[str]:
        """State each check's finding and, unless it is ok, what to do."""
        notes: list[str] = []
        for finding in result["findings"]:
            notes.append(f"{finding['level']}: {finding['check']}: {finding['found']}")
            notes += [f"    to do: {finding['advice']}"] if finding["advice"] else []
        return notes
