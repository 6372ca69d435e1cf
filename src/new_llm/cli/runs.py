"""`new-llm runs`: the runs of a folder, their status and best figures; `new-llm runs show`: one of them."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tyro.conf import Positional

from new_llm.cli.command import Command, CommandGroup
from new_llm.config.errors import UserError
from new_llm.config.terminal import open_console

if TYPE_CHECKING:
    from new_llm.experiments.run_folder import ModelStatus, RunStatus


@dataclasses.dataclass(kw_only=True)
class ListRuns(Command):
    """List the runs of a folder, a line for each model."""

    runs_dir: Path = Path("runs")
    """The folder of runs."""

    def execute(self) -> int:
        """Print the table."""
        from rich import box
        from rich.table import Table

        from new_llm.experiments.run_folder import list_runs

        runs = list_runs(self.runs_dir)
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("run", overflow="fold")
        for name in ("begun", "status", "model", "epochs", "tokens", "perplexity"):
            table.add_column(name, no_wrap=True)
        faults: list[str] = []
        for found in runs:
            name = str(found.folder.relative_to(self.runs_dir))
            begun = "–" if found.created is None else f"{found.created.astimezone():%m-%d %H:%M}"
            if found.fault is not None:
                faults.append(f"unreadable: {name}: {found.fault}")
                table.add_row(name, begun, found.status, end_section=True)
            for place, model in enumerate(found.models):
                head = (name, begun, found.status) if place == 0 else ("", "", "")
                table.add_row(*head, *describe_model(model)[:-1], end_section=place + 1 == len(found.models))
        console = open_console()
        console.print(table)
        for line in (*faults, f"{len(runs)} runs in {self.runs_dir}"):
            console.print(line, soft_wrap=True)
        return 0


@dataclasses.dataclass(kw_only=True)
class ShowRun(Command):
    """Show one run: its models, its settings other than the defaults, and its files."""

    run: Positional[str]
    """The run's folder, or its name in the folder of runs."""
    runs_dir: Path = Path("runs")
    """The folder of runs."""

    def execute(self) -> int:
        """Print it.

        Raises:
            UserError: there is no run of this name.
        """
        from rich.table import Table

        from new_llm.experiments.run_folder import CONFIG_KINDS, describe_run, list_differences

        places = (Path(self.run), self.runs_dir / self.run)
        files = [kind.file_name for kind in CONFIG_KINDS]
        folder = next((path for path in places if any((path / file).is_file() for file in files)), None)
        if folder is None:
            raise UserError(f"{self.run}: no run of this name, here or in {self.runs_dir}; `new-llm runs` lists them")
        found = describe_run(folder)
        if found.config is None:
            raise UserError(str(found.fault))
        console = open_console()
        console.print(f"{folder}: {found.status}")
        table = Table("model", "epochs", "tokens", "perplexity", "gates", "state")
        for model in found.models:
            table.add_row(*describe_model(model), model.status)
        console.print(table)
        differences = list_differences(type(found.config)(), found.config)
        sections = {
            "settings other than the defaults": differences,
            "measured since": found.evaluations,
            "files": list_files(found),
        }
        for title, lines in sections.items():
            if lines:
                console.print("\n  ".join([f"{title}:", *lines]), soft_wrap=True)
        return 0


class Runs(CommandGroup):
    """The runs of a folder, with their status and best figures.

    Examples:
      new-llm runs
      new-llm runs --runs-dir /data/runs
      new-llm runs show quick-20260131-120000
    """

    commands: ClassVar = {"list": ListRuns, "show": ShowRun}
    default: ClassVar = "list"


def describe_model(model: "ModelStatus") -> tuple[str, str, str, str, str]:
    """Name, epochs, tokens, perplexity and gates for a table."""
    gates = "–" if model.gates is None else f"{model.gates[0]:.2f}–{model.gates[1]:.2f}"
    perplexity = "–" if model.perplexity is None else f"{model.perplexity:,.2f}"
    return model.name, f"{model.epochs}/{model.num_epochs}", shorten_count(model.tokens), perplexity, gates


def shorten_count(number: int) -> str:
    """1234567 as 1.23M."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def list_files(found: "RunStatus") -> list[str]:
    """The report, the results, and how to resume."""
    lines = [str(path) for name in ("report.html", "results.json") if (path := found.folder / name).exists()]
    if found.status != "complete":
        place = "" if found.folder.parent == Path("runs") else f" --runs-dir {found.folder.parent}"
        command = "experiment" if (found.folder / "config.yaml").is_file() else "train-adapter"
        lines.append(f"continue with: new-llm {command}{place} --name {found.folder.name} --resume")
    return lines
