"""`new-llm report`: the page of one run again, or of several runs side by side."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from new_llm.cli.arguments import parse_flags
from new_llm.config.errors import UserError

DESCRIPTION = """Write the report of a run again, with the evaluations made since, or compare several runs.

Examples:
  new-llm report runs/quick
  new-llm report runs/quick-seed-0 runs/quick-seed-1 runs/quick-seed-2 --out seeds.html

Models of the same type and settings that differ by their seed alone are shown as one, by their mean and a band."""

REPORT_FILE = "report.html"


@dataclasses.dataclass(kw_only=True)
class ReportArguments:
    """The command's options."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]")]
    """Run folders, or their results.json."""
    out: Path | None = None
    """The .html file to write; None: report.html in the run's folder, and in this folder for several runs."""


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code.

    Raises:
        UserError: a run can't be read or is given twice, or the file can't be written.
    """
    parsed = parse_flags(ReportArguments, arguments, prog="new-llm report", description=DESCRIPTION)
    if not parsed.runs:
        raise UserError("report: name at least one run folder (see new-llm report --help)")
    from new_llm.report import read_runs, write_page

    found = read_runs(parsed.runs)
    out = parsed.out or choose_file(list(parsed.runs))
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; the name of an .html file is expected")
    try:
        write_page(found, out)
    except OSError as error:
        raise UserError(f"--out: can't write {out}: {error.strerror or error}") from None
    print(f"report: {out}")
    return 0


def choose_file(runs: Sequence[Path]) -> Path:
    """Where the page goes where nobody says it."""
    if len(runs) > 1:
        return Path(REPORT_FILE)
    return (runs[0] if runs[0].is_dir() else runs[0].parent) / REPORT_FILE
