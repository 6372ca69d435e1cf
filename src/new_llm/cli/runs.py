"""`new-llm runs`: the runs of a folder, their status and best figures; `new-llm runs show`: one of them."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from new_llm.cli.arguments import parse_flags

if TYPE_CHECKING:
    from new_llm.experiments.run_list import ModelStatus, RunStatus

DESCRIPTION = """The runs of a folder, with their status and best figures.

Examples:
  new-llm runs
  new-llm runs --runs-dir /data/runs
  new-llm runs show quick-20260131-120000"""


@dataclasses.dataclass(kw_only=True)
class RunsArguments:
    """Which runs."""

    runs_dir: Path = Path("runs")
    """The folder of runs."""


@dataclasses.dataclass(kw_only=True)
class ShowArguments:
    """Which run."""

    run: Positional[str]
    """The run's folder, or its name in the folder of runs."""
    runs_dir: Path = Path("runs")
    """The folder of runs."""


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    if arguments[:1] == ["show"]:
        shown = parse_flags(ShowArguments, arguments[1:], prog="new-llm runs show", description="One run.")
        return show_run(shown)
    return show_runs(parse_flags(RunsArguments, arguments, prog="new-llm runs", description=DESCRIPTION))


def show_runs(parsed: RunsArguments) -> int:
    """A line a model of each run."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from new_llm.experiments.run_list import list_runs

    runs = list_runs(parsed.runs_dir)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")
    for name in ("begun", "status", "model", "epochs", "tokens", "perplexity"):
        table.add_column(name, no_wrap=True)
    faults: list[str] = []
    for found in runs:
        name = str(found.folder.relative_to(parsed.runs_dir))
        begun = "–" if found.created is None else f"{found.created.astimezone():%m-%d %H:%M}"
        if found.fault is not None:
            faults.append(f"{name}: {found.fault}")
            table.add_row(name, begun, found.status, end_section=True)
        for place, model in enumerate(found.models):
            head = (name, begun, found.status) if place == 0 else ("", "", "")
            table.add_row(*head, *describe_model(model)[:-1], end_section=place + 1 == len(found.models))
    Console().print(table)
    for fault in faults:
        print(f"unreadable: {fault}")
    print(f"{len(runs)} runs in {parsed.runs_dir}")
    return 0


def show_run(parsed: ShowArguments) -> int:
    """One run: its models, its settings beside the defaults, and where things are.

    Raises:
        UserError: there is no run of this name.
    """
    from rich.console import Console
    from rich.table import Table

    from new_llm.config.errors import UserError
    from new_llm.experiments.config import ExperimentConfig
    from new_llm.experiments.record import list_differences
    from new_llm.experiments.run_list import describe_run

    folder = next(
        (path for path in (Path(parsed.run), parsed.runs_dir / parsed.run) if (path / "config.yaml").is_file()), None
    )
    if folder is None:
        raise UserError(f"{parsed.run}: no run of this name, here or in {parsed.runs_dir}; `new-llm runs` lists them")
    found = describe_run(folder)
    if found.config is None:
        raise UserError(str(found.fault))
    console = Console()
    console.print(f"{folder}: {found.status}", highlight=False)
    table = Table("model", "epochs", "tokens", "perplexity", "gates", "state")
    for model in found.models:
        table.add_row(*describe_model(model), model.status)
    console.print(table)
    console.print("settings other than the defaults:", highlight=False)
    for line in list_differences(ExperimentConfig(), found.config):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    for title, lines in (("measured since", found.evaluations), ("files", list_files(found))):
        if lines:
            console.print(f"{title}:", highlight=False)
        for line in lines:
            console.print(f"  {line}", highlight=False, soft_wrap=True)
    return 0


def describe_model(model: "ModelStatus") -> tuple[str, str, str, str, str]:
    """Name, epochs, tokens, perplexity and gates as they stand in a table."""
    gates = "–" if model.gates is None else f"{model.gates[0]:.2f}–{model.gates[1]:.2f}"
    perplexity = "–" if model.perplexity is None else f"{model.perplexity:,.2f}"
    return model.name, f"{model.epochs}/{model.num_epochs}", shorten_count(model.tokens), perplexity, gates


def shorten_count(number: int) -> str:
    """1234567 as 1.2M."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def list_files(found: "RunStatus") -> list[str]:
    """Where a reader goes on: the report, the results, the way to resume."""
    lines = [str(path) for name in ("report.html", "results.json") if (path := found.folder / name).exists()]
    if found.status != "complete":
        place = "" if found.folder.parent == Path("runs") else f" --runs-dir {found.folder.parent}"
        lines.append(f"go on with: new-llm experiment{place} --name {found.folder.name} --resume")
    return lines
