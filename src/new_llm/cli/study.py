"""`new-llm study`: train and compare the variants of a study, run by run."""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tyro.conf import Positional

from new_llm.cli.command import Command
from new_llm.cli.training import run_training
from new_llm.config.errors import UserError
from new_llm.config.terminal import open_console, print_text

if TYPE_CHECKING:
    from rich.console import Console


@dataclasses.dataclass(kw_only=True)
class Study(Command):
    """Train the variants that a study's YAML names, each with its seeds, and compare them.

    Examples:
      new-llm study studies/recipes.yaml
      new-llm study studies/recipes.yaml --only reference no-delta
      new-llm study studies/recipes.yaml --jobs 2

    A study that was interrupted continues with the run it was at; what is done is not done again.
    """

    without_hub: ClassVar[str] = "let the study's base name the embedded text (data: {source: sotu}) or local files"
    study: Positional[Path]
    """The study's YAML file, or the name of one of the project's own, e.g. mechanisms."""
    only: tuple[str, ...] = ()
    """Variants to run now, with the baselines they are measured against; none named: all."""
    seeds: tuple[int, ...] = ()
    """Seeds in place of the study's."""
    jobs: int = 1
    """Runs at once, each in a process of its own with its share of the cores; small models train faster so."""
    runs_dir: Path | None = None
    """Where the study's folder is made; None: as the file says."""

    def execute(self) -> int:
        """Train what has not been trained, compare, and print the table."""
        from new_llm.config.loading import find_committed, read_settings
        from new_llm.experiments.config import StudyConfig

        study = read_settings(find_committed(self.study, "studies"), StudyConfig)
        if self.jobs < 1:
            raise UserError(f"--jobs: {self.jobs}; 1 is the least")
        if self.seeds:
            study = dataclasses.replace(study, seeds=self.seeds)
        if self.runs_dir is not None:
            study = dataclasses.replace(study, runs_dir=self.runs_dir)

        from rich.markdown import Markdown

        from new_llm.experiments.study import SUMMARY_FILE, TABLE_FILE, plan_cells, run_study
        from new_llm.experiments.study_table import render_markdown
        from new_llm.report import write_report
        from new_llm.report.study_page import STUDY_PAGE, write_study_page

        def train(console: "Console") -> dict[str, Any]:
            cells = plan_cells(study, self.only)
            console.print(
                f"{study.name}: {study.question}\n{len(cells)} runs in {study.folder}; the whole study took about "
                f"{study.cpu_minutes:g} minutes on two cores when it was written",
                soft_wrap=True,
            )
            return run_study(
                study,
                only=self.only,
                jobs=self.jobs,
                console=console,
                write_report=write_report,
                write_page=write_study_page,
            )

        summary = run_training(train, lambda _: f"new-llm study {self.describe_flags()}")
        if isinstance(summary, int):
            return summary
        open_console().print(Markdown(render_markdown(summary), hyperlinks=False))
        files = {"results": SUMMARY_FILE, "table": TABLE_FILE, "page": STUDY_PAGE}
        print_text("\n".join(f"{what + ':':<8} {study.folder / name}" for what, name in files.items()))
        return 0

    def describe_flags(self) -> str:
        """The flags that repeat this command."""
        lists = {"--only": self.only, "--seeds": self.seeds}
        words = [str(self.study)]
        words += [word for flag, values in lists.items() if values for word in (flag, *map(str, values))]
        words += ["--jobs", str(self.jobs)] if self.jobs != 1 else []
        words += ["--runs-dir", str(self.runs_dir)] if self.runs_dir is not None else []
        return shlex.join(words)
