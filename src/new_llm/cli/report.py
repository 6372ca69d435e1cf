"""`new-llm report`: the page of one run again, or of several runs side by side."""

import dataclasses
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from new_llm.cli.command import Command
from new_llm.config.errors import UserError
from new_llm.config.terminal import print_text


@dataclasses.dataclass(kw_only=True)
class Report(Command):
    """Write the report of a run again, with the evaluations made since, or compare several runs.

    Examples:
      new-llm report runs/quick
      new-llm report runs/quick-seed-0 runs/quick-seed-1 runs/quick-seed-2 --out seeds.html

    Models of the same type and settings that differ by their seed alone are shown as one, by their mean and a band.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]")]
    """Run folders, or their results.json."""
    measures: tuple[str, ...] = ()
    """Measures of your own that the runs used, as module:Class; no code is loaded because a run's files name it."""
    out: Path | None = None
    """The .html file to write; None: report.html in the run's folder, or in this folder for several runs."""

    def execute(self) -> int:
        """Write the page.

        Raises:
            UserError: a run can't be read or is given twice, or the file can't be written.
        """
        if not self.runs:
            raise UserError("report: name at least one run folder (see new-llm report --help)")
        from new_llm.evaluation import find_measures, register_measure
        from new_llm.evaluation.doctor import Doctor
        from new_llm.report import read_runs, write_page

        register_measure(Doctor)  # so that its records are known
        find_measures(self.measures)
        found = read_runs(self.runs)
        first = self.runs[0] if self.runs[0].is_dir() else self.runs[0].parent
        out = self.out or (first if len(self.runs) == 1 else Path()) / "report.html"
        if out.is_dir():
            raise UserError(f"--out: {out} is a folder; the name of an .html file is expected")
        write_page(found, out)
        for note in dict.fromkeys(note for run in found for note in run.notes):
            print_text(f"note: {note}", stderr=True)
        print_text(f"report: {out}")
        return 0
