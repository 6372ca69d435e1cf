"""The command `new-llm`: finds the sub-command, and turns every failure into one line and an exit code."""

import gc
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from new_llm import __version__
from new_llm.config.allocator import keep_freed_memory
from new_llm.config.errors import HubError, OtherProcessError, UserError
from new_llm.config.files import describe_os_error
from new_llm.config.terminal import handle_signals, make_line, prepare_terminal

# Module and class of each command. Modules are imported only when their command is asked for, so that help never waits
# for torch.
COMMANDS: dict[str, tuple[str, str]] = {
    "completion": ("command:Completion", "print a completion script for bash, zsh or fish"),
    "eval": ("eval:Eval", "measure a trained model: perplexity, recall, the reversal curse and more"),
    "evaluate-wikitext": ("eval:EvaluateWikitext", "perplexity on WikiText-2's test text"),
    "experiment": ("experiment:Experiment", "train models on identical data and compare them"),
    "experiment-selective": (
        "experiment:ExperimentSelective",
        "compare selective output with baselines of equal parameters and equal compute",
    ),
    "export": ("export:Export", "export a model as a folder for Hugging Face's tools"),
    "generate": ("generate:Generate", "continue a text"),
    "inspect": ("eval:Inspect", "show what the memory knew about a text of yours, token by token"),
    "lm-eval": ("export:LmEval", "lm-evaluation-harness with this project's models"),
    "memory": ("memory:Memory", "fill, show, merge and compare memory files"),
    "report": ("runs:Report", "rewrite a run's report, or compare several runs"),
    "runs": ("runs:Runs", "list the runs of a folder, or show one"),
    "study": ("training:Study", "train and compare the variants of a study, with several seeds"),
    "train-adapter": ("experiment:TrainAdapter", "train a memory adapter on an existing Pythia"),
}

HELP = """usage: new-llm COMMAND [OPTIONS]

A laboratory for language models with compressive memory.

commands:
{commands}

new-llm COMMAND --help shows a command's options; --debug shows the traceback of an error; --version."""

BUG, BAD_INPUT, INTERRUPTED = 1, 2, 130
"""Exit codes. What the machine refuses, such as a full disk, counts as bad input: the user can mend it."""
OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "can't start new thread",
                 "failed to map segment")  # fmt: skip
"""Words of errors by which libraries say that memory is at its limit."""

# torch's threads spin while they wait for one another. On a machine that does anything else beside, the spinning takes
# the time of the thread that is waited for: one busy neighbour on two cores then costs a factor of five, and sleeping
# threads cost nothing that could be measured. It is read when torch is imported, and a setting of the user's own wins.
WAIT_POLICY = "PASSIVE"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (1: a bug, 2: bad input, 130: interrupted)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    prepare_terminal()
    if not given or given[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
        print(HELP.format(commands="\n".join(lines)))
        return 0
    if given[0] == "--version":
        print(__version__)
        return 0
    if given[0] not in COMMANDS:
        return complain(f"unknown command {given[0]!r}; allowed are {', '.join(COMMANDS)}")
    os.environ.setdefault("OMP_WAIT_POLICY", WAIT_POLICY)
    keep_freed_memory()
    command: Any = None
    try:
        check_command(given[0])
        # These end what runs as Ctrl-C does: temporary files go, what is done is kept.
        with handle_signals((signal.SIGTERM, signal.SIGUSR1), signal.default_int_handler):
            gc.disable()  # imports make many objects and no garbage: looking for some took a sixth of the start
            try:
                command = load_command(given[0])
                command = command.read(given[1:], f"new-llm {given[0]}")  # of a group, the chosen one
            finally:
                gc.enable()
                if arguments is None:  # the process is ours: modules stay to its end, which searched them for 0.4 s
                    gc.freeze()
            return command.execute() or 0
    except SystemExit:
        raise
    # Not only Exception: libraries written in Rust raise a BaseException where their own code fails.
    except BaseException as error:
        if debug:
            traceback.print_exception(error)
        return explain(error, getattr(command, "without_hub", ""))


def load_command(name: str) -> Any:
    """The class of a command."""
    module, _, kind = COMMANDS[name][0].partition(":")
    return getattr(importlib.import_module(f"new_llm.cli.{module}"), kind)


def explain(error: BaseException, without_hub: str = "") -> int:
    """Say in a line what ended a command; returns its exit code.

    Args:
        without_hub: what the command offers where the hub is out of reach.
    """
    if isinstance(error, OtherProcessError):  # which has said why
        return end_quietly(BAD_INPUT if error.is_user_error else BUG)
    if isinstance(error, BrokenPipeError):
        # The reader of our output is gone; keep Python from complaining about it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, KeyboardInterrupt):
        if is_main_process():
            complain("interrupted")
        return INTERRUPTED
    code, message = describe_error(error, without_hub)
    processes = sys.modules.get("new_llm.processes")
    # Before the processes have met all find the same, and the main one says it; later each says what only it found.
    if not (is_main_process() or (processes is not None and processes.have_met())):
        return end_quietly(code)
    complain(message)
    if code == BUG:
        complain("this is a bug in New-LLM: please report it, with the output of the same command with --debug")
    return code


def describe_error(error: BaseException, without_hub: str) -> tuple[int, str]:
    """The exit code and the words for an error that ends a command."""
    text = str(error)
    kind = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, HubError) and without_hub:
        return BAD_INPUT, f"{text}: {without_hub}"
    if isinstance(error, UserError):
        return BAD_INPUT, text
    is_full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if is_full or any(words in text.lower() for words in OUT_OF_MEMORY):
        return BAD_INPUT, f"out of memory ({kind[:200]}); a smaller model, batch or text needs less"
    if isinstance(error, OSError):  # a full disk, one that is gone, no rights
        return BAD_INPUT, describe_os_error(error)
    if isinstance(error, RuntimeError) and "home directory" in text:
        return BAD_INPUT, "there is no home directory for ~: set HOME, or name the folder"
    if type(error).__module__ == "pyo3_runtime":
        return BAD_INPUT, f"the tokenizer failed in its own code ({kind[:200]}); is its file damaged?"
    loading = sys.modules.get("new_llm.config.loading")
    if loading is not None and (told := loading.describe_own_error(error)) is not None:
        return BAD_INPUT, f"{told}; --debug shows the traceback"
    return BUG, f"{kind} ({find_place(error)})"


def find_place(error: BaseException) -> str:
    """File and line of this package where an error came from, without the path that leads to the package."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        _, package, place = frame.filename.rpartition(f"{os.sep}new_llm{os.sep}")
        if package:
            return f"new_llm/{place}, line {frame.lineno}"
    return "outside this package"


def complain(message: str) -> int:
    """Print one line on stderr; returns the exit code of bad input."""
    with suppress(OSError):  # the disk that is full may be the one that this goes to
        print(f"new-llm: {make_line(message)}", file=sys.stderr)
    return BAD_INPUT


TOGETHER = ("experiment", "experiment-selective", "train-adapter")
"""Commands whose processes work together."""
QUIET_SECONDS = 1.0
"""What the process that says what is wrong is given for it."""


def is_main_process() -> bool:
    """Whether this process is the one that prints."""
    return os.environ.get("RANK") in (None, "", "0")


def check_command(command: str) -> None:
    """Refuse several processes for a command that would do the same in each of them."""
    count = os.environ.get("WORLD_SIZE") or "1"
    if not count.isdigit():
        raise UserError(f"WORLD_SIZE: {count!r} is not a number of processes")
    if int(count) > 1 and command not in TOGETHER:
        raise UserError(f"{command} runs in one process, not in {count}; in several run {', '.join(TOGETHER)}")


def end_quietly(exit_code: int) -> int:
    """Leave it to another process to say what is wrong: a launcher ends all as soon as the first one has ended."""
    time.sleep(QUIET_SECONDS)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
