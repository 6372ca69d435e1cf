"""`new-llm lm-eval`: lm-evaluation-harness, which then knows this project's models."""

import importlib.util
import sys

from new_llm.config.errors import UserError

INSTALL = "pip install 'new-llm[lm-eval]'"


def run(arguments: list[str]) -> int:
    """Hand all arguments to `lm_eval`; returns its exit code.

    Raises:
        UserError: lm_eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"lm-evaluation-harness is not installed: {INSTALL}")
    import new_llm.models.hf  # noqa: F401 - registers the model type with the Auto classes

    # Its own command reads the program's arguments, and changes them.
    before, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

        cli_evaluate()
    finally:
        sys.argv = before
    return 0
