"""`new-llm experiment`: the configuration's fields as flags, the experiment, its report."""

import dataclasses
import datetime
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from new_llm.cli.arguments import parse_flags
from new_llm.cli.resumable import read_start, run_training
from new_llm.experiments.config import ExperimentConfig

DESCRIPTION = """Train some models on identical data, measure them, and write a report.

Examples:
  new-llm experiment --config configs/quick.yaml
  new-llm experiment --models pythia infini multi_memory hierarchical
  new-llm experiment --models infini --data.source my_text.txt --samples 1000 --epochs 3
  new-llm experiment --name my-run --resume

Without --config and --data.source it is the reference experiment on the Pile."""


@dataclasses.dataclass(kw_only=True)
class ExperimentArguments:
    """The command's own options, and the configuration's fields beside them."""

    config: Path | None = None
    """A YAML file with the settings to begin from; flags override it."""
    resume: bool = False
    """Go on with the run that --name names, where it was interrupted."""
    experiment: Annotated[ExperimentConfig, arg(name="")] = dataclasses.field(default_factory=ExperimentConfig)


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    return run_parsed(parse_arguments(arguments))


def run_parsed(parsed: ExperimentArguments) -> int:
    """Run the experiment of parsed arguments; returns the command's exit code."""
    # Everything below imports torch; help and bad flags have been answered by now.
    from new_llm.experiments import run_experiment

    return run_training(
        lambda console: run_experiment(exp_config=parsed.experiment, resume=parsed.resume, console=console),
        show,
        "experiment",
        ExperimentConfig,
    )


def show(results: dict[str, Any]) -> None:
    """The summary table, and where results and report stand."""
    from rich.console import Console

    from new_llm.experiments.record import REPORT_FILE
    from new_llm.report.tables import render_summary_table

    folder = Path(results["folder"])
    Console().print(render_summary_table(results))
    print(f"results: {folder / 'results.json'}\nreport:  {folder / REPORT_FILE}")


def parse_arguments(
    arguments: list[str],
    *,
    models: tuple[str, ...] | None = None,
    command: str = "experiment",
    description: str = DESCRIPTION,
) -> ExperimentArguments:
    """Defaults from --config, or with --resume from the run itself; flags override them.

    Args:
        arguments: the command line after the command.
        models: the models where --models is not given; None: the configuration's.
        command: the command's name, for its help.
        description: the help's text.

    Raises:
        UserError: the configuration file or a value is bad.
        SystemExit: help was asked for, or a flag is unknown.
    """
    start = read_start(arguments, ExperimentConfig)
    base = start.settings
    if start.config is not None and base.name is None and not start.resume:
        base = dataclasses.replace(base, name=name_run(start.config.stem))
    if models is not None and not start.resume:
        base = dataclasses.replace(base, models=models)
    return parse_flags(
        ExperimentArguments,
        arguments,
        prog=f"new-llm {command}",
        description=description,
        default=ExperimentArguments(experiment=base),
    )


def name_run(stem: str) -> str:
    """A run's name from its configuration's and the time."""
    return f"{stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
