"""`new-llm completion`: the script by which a shell completes this command's words."""

import contextlib
import dataclasses
import io
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

import tyro
from tyro.conf import Positional, arg, subcommand

from new_llm.cli import memory
from new_llm.cli.arguments import parse_flags
from new_llm.cli.evaluation import main as evaluation
from new_llm.cli.evaluation.perplexity import Perplexity
from new_llm.cli.experiment import ExperimentArguments
from new_llm.cli.export import ExportArguments
from new_llm.cli.generate import GenerateArguments
from new_llm.cli.report import ReportArguments
from new_llm.cli.runs import RunsArguments, ShowArguments
from new_llm.cli.study import StudyArguments
from new_llm.cli.train_adapter import TrainAdapterArguments

DESCRIPTION = """Print the script by which a shell completes commands and flags.

Examples:
  new-llm completion bash > ~/.local/share/bash-completion/completions/new-llm
  new-llm completion zsh > ~/.zfunc/_new-llm
  new-llm completion fish > ~/.config/fish/completions/new-llm.fish"""


@dataclasses.dataclass(kw_only=True)
class CompletionArguments:
    """The command's options."""

    shell: Positional[Literal["bash", "zsh", "fish"]]
    """The shell that is to read the script."""


@dataclasses.dataclass
class NoArguments:
    """A command whose flags another program reads."""


def choose_command(kinds: Mapping[str, type]) -> Any:
    """The type of one of several commands, by their names."""
    return Union[tuple(Annotated[kind, subcommand(name)] for name, kind in kinds.items())]  # noqa: UP007


def group_commands(name: str, kinds: Mapping[str, type]) -> type:
    """The arguments of a command that has commands of its own."""
    return dataclasses.make_dataclass(name, [("command", Annotated[choose_command(kinds), arg(name="")])])


COMPLETED: dict[str, type] = {
    "completion": CompletionArguments,
    "eval": group_commands("Eval", evaluation.COMMANDS),
    "evaluate-wikitext": Perplexity,
    "experiment": ExperimentArguments,
    "experiment-selective": ExperimentArguments,
    "export": ExportArguments,
    "generate": GenerateArguments,
    "lm-eval": NoArguments,
    "memory": group_commands("Memory", memory.COMMANDS),
    "report": ReportArguments,
    # The command has a flag and one command; a flag in a command's place is completed as well.
    "runs": group_commands("Runs", {"show": ShowArguments, "--runs-dir": RunsArguments}),
    "study": StudyArguments,
    "train-adapter": TrainAdapterArguments,
}
"""What each command reads."""


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    parsed = parse_flags(CompletionArguments, arguments, prog="new-llm completion", description=DESCRIPTION)
    print(write_completion(parsed.shell))
    return 0


def write_completion(shell: str) -> str:
    """The script of a shell: bash, zsh or fish."""
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        tyro.cli(
            choose_command(COMPLETED),
            prog="new-llm",
            args=["--tyro-print-completion", shell],
            config=(tyro.conf.EnumChoicesFromValues,),
        )
    return script.getvalue()
