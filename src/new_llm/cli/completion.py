"""`new-llm completion`: the script by which a shell completes this command's words."""

import contextlib
import dataclasses
import io
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from new_llm.cli import main
from new_llm.cli.command import Command, CommandGroup, choose_command


@dataclasses.dataclass(kw_only=True)
class Completion(Command):
    """Print the script by which a shell completes commands and flags.

    Examples:
      new-llm completion bash > ~/.local/share/bash-completion/completions/new-llm
      new-llm completion zsh > ~/.zfunc/_new-llm
      new-llm completion fish > ~/.config/fish/completions/new-llm.fish
    """

    shell: Positional[Literal["bash", "zsh", "fish"]]
    """The shell that is to read the script."""

    def execute(self) -> int:
        """Print the script."""
        print(write_completion(self.shell))
        return 0


def write_completion(shell: str) -> str:
    """The script of a shell: bash, zsh or fish."""
    kinds = {name: describe_command(name, main.load_command(name)) for name in main.COMMANDS}
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        tyro.cli(
            choose_command(kinds),
            prog="new-llm",
            args=["--tyro-print-completion", shell],
            config=(tyro.conf.EnumChoicesFromValues,),
        )
    return script.getvalue()


def describe_command(name: str, kind: Any) -> type:
    """A command, or the choice that a group of commands offers, as a type that tyro reads."""
    if not issubclass(kind, CommandGroup):
        return kind
    choice = Annotated[choose_command(kind.commands, kind.default), tyro.conf.arg(name="")]
    return dataclasses.make_dataclass(name.title(), [("command", choice)])
