"""`new-llm experiment`: the configuration's fields as flags, the experiment, its report."""

import argparse
import dataclasses
import datetime
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from new_llm.cli.arguments import parse_flags
from new_llm.config import ExperimentConfig, ModelType, load_config

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
    from rich.console import Console

    from new_llm.experiments import run_experiment
    from new_llm.experiments.record import REPORT_FILE
    from new_llm.report.tables import render_summary_table
    from new_llm.training import TrainingError, TrainingInterrupted

    console = Console(stderr=True)
    try:
        results = run_experiment(exp_config=parsed.experiment, resume=parsed.resume, console=console)
    except TrainingInterrupted as stopped:
        run_folder = stopped.folder.parent
        place = "" if run_folder.parent == ExperimentConfig.runs_dir else f" --runs-dir {run_folder.parent}"
        again = f"new-llm experiment{place} --name {run_folder.name} --resume"
        console.print(f"{stopped}\ngo on with: {again}", highlight=False, soft_wrap=True)
        return 130
    except TrainingError as error:
        print(f"new-llm: {error}", file=sys.stderr)
        return 1
    folder = Path(results["folder"])
    Console().print(render_summary_table(results))
    print(f"results: {folder / 'results.json'}\nreport:  {folder / REPORT_FILE}")
    return 0


def parse_arguments(
    arguments: list[str],
    *,
    models: tuple[ModelType, ...] | None = None,
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
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--resume", action="store_true")
    first.add_argument("--name")
    first.add_argument("--runs-dir", type=Path, default=ExperimentConfig.runs_dir)
    known, _ = first.parse_known_args(arguments)
    base = ExperimentConfig()
    if known.config is not None:
        base = load_config(known.config)
        if base.name is None and not known.resume:
            base = dataclasses.replace(base, name=name_run(known.config.stem))
    elif known.resume and known.name is not None:
        base = load_config(known.runs_dir / known.name / "config.yaml")
    if models is not None and not known.resume:
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
