"""What the command must know of a launcher that has started it several times, without importing torch."""

import os
import sys
import time
from collections.abc import Mapping

from new_llm.config.errors import UserError

TOGETHER = ("experiment", "experiment-selective", "train-adapter")
"""Commands whose processes work together."""
QUIET_SECONDS = 1.0
"""What the process that says what is wrong is given for it."""


def is_main_process(environment: Mapping[str, str] | None = None) -> bool:
    """Whether this process is the one that prints; None: this process's environment, as it is now."""
    return (os.environ if environment is None else environment).get("RANK") in (None, "", "0")


def check_command(command: str, environment: Mapping[str, str] | None = None) -> None:
    """Refuse several processes for a command that would do the same in each of them.

    Raises:
        UserError: names the commands that several processes work on together.
    """
    count = (os.environ if environment is None else environment).get("WORLD_SIZE") or "1"
    if not count.isdigit():
        raise UserError(f"WORLD_SIZE: {count!r} is not a number of processes")
    if int(count) > 1 and command not in TOGETHER:
        raise UserError(f"{command} runs in one process, not in {count}; in several run {', '.join(TOGETHER)}")


def end_quietly(exit_code: int) -> int:
    """Leave it to another process to say what is wrong: a launcher ends all as soon as the first one has ended."""
    time.sleep(QUIET_SECONDS)
    return exit_code


def tells_errors() -> bool:
    """Whether this process says what is wrong: before processes have met all find the same, and one of them says it."""
    processes = sys.modules.get("new_llm.processes")
    return is_main_process() or (processes is not None and processes.have_met())
