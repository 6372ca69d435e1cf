"""`new-llm eval doctor`: a self-check of a trained model."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from new_llm.cli.evaluation.common import finish
from new_llm.config.doctor import DoctorConfig
from new_llm.config.measurement import SubjectConfig, TextConfig

FAULT_FOUND = 1
STYLES = {"ok": "green", "warning": "yellow", "fault": "bold red", "skipped": "dim"}


@dataclasses.dataclass(kw_only=True)
class Doctor:
    """Look for what makes readings of a model wrong: shifted labels, leaks, written memory, overlapping splits.

    The text is the validation documents of the run, or --data.source. Exit code 1: a fault was found.
    """

    subject: Annotated[SubjectConfig, arg(name="")]
    data: TextConfig = dataclasses.field(default_factory=TextConfig)
    options: Annotated[DoctorConfig, arg(name="")] = dataclasses.field(default_factory=DoctorConfig)
    out: Path | None = None
    """The JSON file to write; None: a file in the run's folder, under evaluations."""

    def run_command(self) -> int:
        """Examine, print and write; returns the exit code."""
        from rich.console import Console

        from new_llm.evaluation.doctor import choose_checks
        from new_llm.experiments.doctor import examine_subject
        from new_llm.experiments.evaluation_record import describe_evaluation, plain_settings
        from new_llm.experiments.subject import load_subject

        choose_checks(self.options.checks)  # before anything is loaded
        subject = load_subject(self.subject)
        with Console(stderr=True).status("") as status:
            report, text = examine_subject(
                subject, self.data, self.options, lambda name: status.update(f"doctor: {name}")
            )
        record = describe_evaluation("doctor", subject, text, plain_settings(self.data, self.options), report.to_dict())
        print_report(record)
        code = finish(record, subject, self.out)
        if report.has_fault:
            print(f"{report.count('fault')} found: readings of this model can't be trusted", file=sys.stderr)
        return code or (FAULT_FOUND if report.has_fault else 0)


def print_report(record: dict[str, Any]) -> None:
    """One row per check, with what to do unless all is well."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    result = record["result"]
    table = Table(title=Text(f"self-check of {record['subject']['path']}"), title_justify="left")
    for name in ("check", "result", "found"):
        table.add_column(name, overflow="fold")
    for finding in result["findings"]:
        words = Text(finding["found"])
        if finding["advice"]:
            words.append(f"\nto do: {finding['advice']}", style="italic")
        table.add_row(finding["check"], Text(finding["level"], style=STYLES[finding["level"]]), words)
    console = Console()
    console.print(table)
    counts = ", ".join(f"{result[f'num_{level}']} {level}" for level in STYLES)
    console.print(Text(f"{counts}; text: {record['text']['source']}"))
