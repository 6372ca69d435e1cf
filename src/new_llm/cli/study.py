"""`new-llm study`: train and compare the variants of a study, run by run."""

import dataclasses
import sys
from pathlib import Path

from tyro.conf import Positional

from new_llm.cli.arguments import parse_flags

DESCRIPTION = """Train the variants that a study's YAML names, each with its seeds, and compare them.

Examples:
  new-llm study studies/recipes.yaml
  new-llm study studies/recipes.yaml --only reference no-delta
  new-llm study studies/recipes.yaml --jobs 2

A study that was interrupted goes on with the run it was at; what is done is not done again."""


@dataclasses.dataclass(kw_only=True)
class StudyArguments:
    """The command's options."""

    study: Positional[Path]
    """The study's YAML file."""
    only: tuple[str, ...] = ()
    """Variants to run now, with the baselines they are measured against; none named: all."""
    seeds: tuple[int, ...] = ()
    """Seeds in place of the study's."""
    jobs: int = 1
    """Runs at once, each in a process of its own with its share of the cores; small models train faster so."""
    runs_dir: Path | None = None
    """Where the study's folder is made; None: as the file says."""


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    parsed = parse_flags(StudyArguments, arguments, prog="new-llm study", description=DESCRIPTION)
    from new_llm.config import UserError
    from new_llm.config.run_settings import read_settings
    from new_llm.experiments.study_config import StudyConfig

    study = read_settings(parsed.study, StudyConfig)
    if parsed.jobs < 1:
        raise UserError(f"--jobs: {parsed.jobs}; 1 is the least")
    if parsed.seeds:
        study = dataclasses.replace(study, seeds=parsed.seeds)
    if parsed.runs_dir is not None:
        study = dataclasses.replace(study, runs_dir=parsed.runs_dir)

    from rich.console import Console
    from rich.markdown import Markdown

    from new_llm.experiments.study import SUMMARY_FILE, TABLE_FILE, plan_cells, run_study
    from new_llm.experiments.study_table import render_markdown
    from new_llm.report.study_plots import write_study_figures
    from new_llm.training import TrainingError, TrainingInterrupted

    console = Console(stderr=True)
    cells = plan_cells(study, parsed.only)
    console.print(
        f"{study.name}: {study.question}\n{len(cells)} runs in {study.folder}; the whole study took about "
        f"{study.cpu_minutes:g} minutes on two cores when it was written",
        highlight=False,
        soft_wrap=True,
    )
    try:
        summary = run_study(
            study, only=parsed.only, jobs=parsed.jobs, console=console, write_figures=write_study_figures
        )
    except TrainingInterrupted as stopped:
        console.print(f"{stopped}\ngo on with: new-llm study {' '.join(arguments)}", highlight=False, soft_wrap=True)
        return 130
    except TrainingError as error:
        print(f"new-llm: {error}", file=sys.stderr)
        return 1
    Console().print(Markdown(render_markdown(summary)))
    print(f"results: {study.folder / SUMMARY_FILE}\ntable:   {study.folder / TABLE_FILE}")
    return 0
