"""`new-llm runs`: the runs of a folder, their status and best figures; `new-llm runs show`: one of them."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tyro.conf import Positional

from new_llm.cli.command import Command, CommandGroup
from new_llm.config.errors import UserError
from new_llm.config.terminal import open_console
from new_llm.formats import format_short

if TYPE_CHECKING:
    from new_llm.experiments.run_folder import ModelStatus, RunStatus


@dataclasses.dataclass(kw_only=True)
class ListRuns(Command):
    """List the runs of a folder, a line for each model."""

    runs_dir: Path = Path("runs")
    """The folder of runs."""

    def execute(self) -> int:
        """Print the table."""
        from new_llm.experiments.run_folder import list_runs
        from new_llm.report import ColumnTable

        runs = list_runs(self.runs_dir)
        rows: list[tuple[str, dict[str, str]]] = []
        faults: list[str] = []
        for found in runs:
            name = str(found.folder.relative_to(self.runs_dir))
            begun = "–" if found.created is None else f"{found.created.astimezone():%m-%d %H:%M}"
            head = {"begun": begun, "status": found.status}
            if found.fault is not None:
                faults.append(f"unreadable: {name}: {found.fault}")
                rows.append((name, head))
            rows += [(f"{name}: {model.name}", head | describe_model(model)) for model in found.models]
        console = open_console()
        console.print(ColumnTable.of_words(rows))
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
        from new_llm.experiments.run_folder import CONFIG_KINDS, describe_run, list_differences
        from new_llm.report import ColumnTable

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
        rows = [(model.name, describe_model(model) | {"state": model.status}) for model in found.models]
        console.print(ColumnTable.of_words(rows))
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


def describe_model(model: "ModelStatus") -> dict[str, str]:
    """Epochs, tokens, perplexity and gates for a table."""
    return {
        "epochs": f"{model.epochs}/{model.num_epochs}",
        "tokens": format_short(model.tokens),
        "perplexity": "–" if model.perplexity is None else f"{model.perplexity:,.2f}",
        "gates": "–" if model.gates is None else f"{model.gates[0]:.2f}–{model.gates[1]:.2f}",
    }


def list_files(found: "RunStatus") -> list[str]:
    """The report, the results, and how to resume."""
    lines = [str(path) for name in ("report.html", "results.json") if (path := found.folder / name).exists()]
    if found.status != "complete":
        place = "" if found.folder.parent == Path("runs") else f" --runs-dir {found.folder.parent}"
        command = "experiment" if (found.folder / "config.yaml").is_file() else "train-adapter"
        lines.append(f"continue with: new-llm {command}{place} --name {found.folder.name} --resume")
    return lines
