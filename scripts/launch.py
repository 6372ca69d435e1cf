"""Run a command of the package from a checkout; if this Python lacks the package, use the checkout's .venv."""

import os
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def launch(command: str) -> int:
    """Run `new-llm COMMAND` with this script's arguments; returns its exit code."""
    try:
        from new_llm.cli.main import main
    except ModuleNotFoundError:
        python = CHECKOUT / ".venv" / "bin" / "python"
        if not python.exists():
            print(
                f"{Path(sys.argv[0]).name}: New-LLM is not installed; run `make setup` in {CHECKOUT}",
                file=sys.stderr,
            )
            return 2
        if Path(sys.prefix).resolve() == python.parent.parent.resolve():
            raise  # already in .venv, so the installation itself is incomplete
        os.execv(python, [str(python), *sys.argv])
    return main([command, *sys.argv[1:]])
