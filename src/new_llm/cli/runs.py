"""`new-llm runs` lists runs, `new-llm runs show` shows one, `new-llm report` rewrites their page."""

import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, arg

from new_llm.cli.command import Command, CommandGroup
from new_llm.config.errors import UserError
from new_llm.config.terminal import open_console, print_text
from new_llm.formats import format_plural, format_short

if TYPE_CHECKING:
    from collections.abc import Sequence

    from new_llm.experiments.run_folder import RunStatus


@dataclasses.dataclass(kw_only=True)
class ListRuns(Command):
    """List the runs in a folder, one line per model."""

    runs_dir: Path = Path("runs")
    """The folder that contains the runs."""
    format: Literal["table", "csv", "json"] = "table"
    """table: for people; csv, json: for programs, with one row or object per model."""

    def execute(self) -> None:
        """Print the table."""
        from new_llm.experiments.run_folder import list_runs
        from new_llm.report import ColumnTable

        runs = list_runs(self.runs_dir)
        if self.format != "table":
            print_plain(runs, self.format)
            return
        rows: list[tuple[str, dict[str, str]]] = []
        faults: list[str] = []
        for found in runs:
            name = str(found.folder.relative_to(self.runs_dir))
            begun = "–" if found.created is None else f"{found.created.astimezone():%m-%d %H:%M}"
            head = {"begun": begun, "status": found.status}
            if found.fault is not None:
                faults.append(f"unreadable: {name}: {found.fault}")
                rows.append((name, head))
            rows += [(f"{name}: {model['name']}", head | format_model(model)) for model in found.models]
        console = open_console()
        console.print(ColumnTable.of_words(rows))
        for line in (*faults, f"{format_plural(len(runs), 'run')} in {self.runs_dir}"):
            console.print(line, soft_wrap=True)


@dataclasses.dataclass(kw_only=True)
class ShowRun(Command):
    """Show one run: its models, its settings other than the defaults, and its files."""

    run: Positional[str]
    """The run's folder, or its name below --runs-dir."""
    runs_dir: Path = Path("runs")
    """The folder that contains the runs."""

    def execute(self) -> None:
        """Print the run."""
        from new_llm.experiments.config import ExperimentConfig
        from new_llm.experiments.run_folder import CONFIG_KINDS, describe_resumption, describe_run, list_differences
        from new_llm.report import ColumnTable

        places = (Path(self.run), self.runs_dir / self.run)
        folder = next((path for path in places for kind in CONFIG_KINDS if (path / kind.file_name).is_file()), None)
        if folder is None:
            raise UserError(f"{self.run}: no such run, here or in {self.runs_dir}; `new-llm runs` lists all")
        found = describe_run(folder)
        if found.config is None:
            raise UserError(str(found.fault))
        console = open_console()
        console.print(f"{folder}: {found.status}")
        rows = [(model["name"], format_model(model) | {"state": model["status"]}) for model in found.models]
        console.print(ColumnTable.of_words(rows))
        paths = [folder / "report.html", folder / "results.json", *sorted(folder.glob("*/checkpoints/*"))]
        files = [str(path) for path in paths if path.exists() and not path.name.startswith(".")]
        if found.status != "complete":
            command = "experiment" if isinstance(found.config, ExperimentConfig) else "train-adapter"
            files.append(f"continue with: {describe_resumption(folder, command)}")
        differences = list_differences(type(found.config)(), found.config)
        sections = {
            "settings other than the defaults": differences,
            "later evaluations": found.evaluations,
            "files": files,
        }
        for title, lines in sections.items():
            if lines:
                console.print("\n  ".join([f"{title}:", *lines]), soft_wrap=True)


class Runs(CommandGroup):
    """List runs with their status and best results, or show one.

    Examples:
      new-llm runs
      new-llm runs --runs-dir /data/runs
      new-llm runs --format csv > runs.csv
      new-llm runs show quick-20260131-120000
    """

    commands: ClassVar = {"list": ListRuns, "show": ShowRun}
    default: ClassVar = "list"


def print_plain(runs: "Sequence[RunStatus]", form: str) -> None:
    """Print a row or object per model with its run's status; for an unreadable run, one without a model."""
    rows = [
        {
            "run": str(run.folder),
            "begun": run.created and run.created.isoformat(),
            "run_status": run.status,
            "fault": run.fault,
            **(model or {}),
        }
        for run in runs
        for model in run.models or (None,)
    ]
    if form == "json":
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        row["least_gate"], row["greatest_gate"] = row.pop("gates", None) or (None, None)
        row["checkpoints"] = " ".join(row.get("checkpoints", ()))
    names = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    table = csv.DictWriter(sys.stdout, list(names), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)


def format_model(model: dict[str, Any]) -> dict[str, str]:
    """A model's epochs, tokens, perplexity, gates and newest checkpoint as table cells."""
    perplexity, gates, checkpoints = (model[name] for name in ("perplexity", "gates", "checkpoints"))
    return {
        "epochs": f"{model['epochs']}/{model['num_epochs']}",
        "tokens": format_short(model["tokens"]),
        "perplexity": "–" if perplexity is None else f"{perplexity:,.2f}",
        "gates": "–" if gates is None else f"{gates[0]:.2f}–{gates[1]:.2f}",
        "checkpoint": f"step {int(checkpoints[0].split('-')[1]):,}" if checkpoints else "–",
    }


# Reports


@dataclasses.dataclass(kw_only=True)
class Report(Command):
    """Rewrite the report of a run, including evaluations made since, or compare several runs.

    Examples:
      new-llm report runs/quick
      new-llm report runs/quick-seed-0 runs/quick-seed-1 runs/quick-seed-2 --out seeds.html

    Models that differ only in their seed are shown as one: their mean, with a band.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]")]
    """Run folders, or their results.json."""
    measures: tuple[str, ...] = ()
    """Your own measures that the runs used, as module:Class. For safety, the report does not load code that is only
    named in a run's files."""
    out: Path | None = None
    """The .html file to write; None: report.html in the run's folder, or in the current folder for several runs."""

    def execute(self) -> None:
        """Write the page."""
        if not self.runs:
            raise UserError("report: name at least one run folder (see new-llm report --help)")
        from new_llm.evaluation import find_measures, register_measure
        from new_llm.evaluation.doctor import Doctor
        from new_llm.report import read_runs, refuse_other_forms, write_page

        register_measure(Doctor)  # so that its records can be shown
        find_measures(self.measures)
        first = self.runs[0] if self.runs[0].is_dir() else self.runs[0].parent
        out = self.out or (first if len(self.runs) == 1 else Path()) / "report.html"
        if out.is_dir():
            raise UserError(f"--out: {out} is a folder; give the name of an .html file")
        with refuse_other_forms(self.runs):
            found = read_runs(self.runs)
            write_page(found, out)
        for note in dict.fromkeys(note for run in found for note in run.notes):
            print_text(f"note: {note}", stderr=True)
        print_text(f"report: {out}")
