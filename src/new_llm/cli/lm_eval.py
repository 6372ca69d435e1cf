"""`new-llm lm-eval`: lm-evaluation-harness, which then knows this project's models."""

import dataclasses
import importlib.util
import sys
from typing import Self

from new_llm.cli.command import Command
from new_llm.config.errors import UserError


@dataclasses.dataclass(kw_only=True)
class LmEval(Command):
    """Run lm-evaluation-harness on any model that transformers loads, this project's included."""

    arguments: tuple[str, ...] = ()
    """The harness's own flags; it reads and documents them itself."""

    @classmethod
    def read(cls, arguments: list[str], prog: str) -> Self:
        """All arguments, unread."""
        return cls(arguments=tuple(arguments))

    def execute(self) -> int:
        """Hand the arguments to `lm_eval`.

        Raises:
            UserError: lm_eval is not installed.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("lm-evaluation-harness is not installed: pip install 'new-llm[lm-eval]'")
        import new_llm.models.hf  # noqa: F401 - registers the model type with the Auto classes

        # Its own command reads the program's arguments, and changes them.
        before, sys.argv = sys.argv, ["lm_eval", *self.arguments]
        try:
            from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

            cli_evaluate()
        finally:
            sys.argv = before
        return 0
