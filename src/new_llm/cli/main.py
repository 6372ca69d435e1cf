"""The `new-llm` command: finds the subcommand, and turns every failure into one line and an exit code."""

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

# Module and class of each command. A module is imported only for its own command, so that help never waits for torch.
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
    "inspect": ("eval:Inspect", "show, token by token, how much the memory helped on your own text"),
    "lm-eval": ("export:LmEval", "run lm-evaluation-harness on this project's models"),
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

new-llm COMMAND --help lists a command's options; --debug shows the traceback of an error, --version the version."""

BUG, BAD_INPUT, INTERRUPTED = 1, 2, 130
"""Exit codes. System failures such as a full disk count as bad input, because the user can fix them."""
OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "can't start new thread",
                 "failed to map segment")  # fmt: skip
"""Phrases in library errors that mean out of memory."""

# By default torch's threads spin while they wait for one another. If the machine does anything else, the spinning takes
# time from the very thread that is waited for: one busy neighbour on two cores then costs a factor of five. Sleeping
# threads cost nothing measurable. torch reads this variable when it is imported; a value set by the user wins.
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
        # These signals end a command like Ctrl-C: temporary files are removed, finished work is kept.
        with handle_signals((signal.SIGTERM, signal.SIGUSR1), signal.default_int_handler):
            gc.disable()  # imports create many objects but no garbage; looking for it took a sixth of the start-up time
            try:
                command = load_command(given[0])
                command = command.read(given[1:], f"new-llm {given[0]}")  # for a group, the chosen subcommand
            finally:
                gc.enable()
                if arguments is None:  # our own process: modules live until exit, which spent 0.4 s searching them
                    gc.freeze()
            return command.execute() or 0
    except SystemExit:
        raise
    # Not only Exception: libraries written in Rust raise a BaseException when they panic.
    except BaseException as error:
        if debug:
            traceback.print_exception(error)
        return explain(error, getattr(command, "without_hub", ""))


def load_command(name: str) -> Any:
    """The class of a command."""
    module, _, kind = COMMANDS[name][0].partition(":")
    return getattr(importlib.import_module(f"new_llm.cli.{module}"), kind)


def explain(error: BaseException, without_hub: str = "") -> int:
    """Print one line about the error that ended a command; returns its exit code.

    Args:
        without_hub: what the command suggests if the hub is out of reach.
    """
    if isinstance(error, OtherProcessError):  # that process reports it
        return end_quietly(BAD_INPUT if error.is_user_error else BUG)
    if isinstance(error, BrokenPipeError):
        # The reader of our output is gone; keep Python from reporting this again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, KeyboardInterrupt):
        if is_main_process():
            complain("interrupted")
        return INTERRUPTED
    code, message = describe_error(error, without_hub)
    processes = sys.modules.get("new_llm.processes")
    # Until the processes have met, all hit the same error and the main one reports it; later each reports its own.
    if not (is_main_process() or (processes is not None and processes.have_met())):
        return end_quietly(code)
    complain(message)
    if code == BUG:
        complain("this is a bug in New-LLM: please report it, with the output of the same command with --debug")
    return code


def describe_error(error: BaseException, without_hub: str) -> tuple[int, str]:
    """The exit code and the message for an error that ends a command."""
    text = str(error)
    kind = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, HubError) and without_hub:
        return BAD_INPUT, f"{text}: {without_hub}"
    if isinstance(error, UserError):
        return BAD_INPUT, text
    is_full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if is_full or any(words in text.lower() for words in OUT_OF_MEMORY):
        return BAD_INPUT, f"out of memory ({kind[:200]}); a smaller model, batch or text needs less"
    if isinstance(error, OSError):  # a full or missing disk, no permission
        return BAD_INPUT, describe_os_error(error)
    if isinstance(error, RuntimeError) and "home directory" in text:
        return BAD_INPUT, "there is no home directory for ~: set HOME, or give the full path"
    if type(error).__module__ == "pyo3_runtime":
        return BAD_INPUT, f"the tokenizer library failed ({kind[:200]}); is the tokenizer's file damaged?"
    loading = sys.modules.get("new_llm.config.loading")
    if loading is not None and (told := loading.describe_own_error(error)) is not None:
        return BAD_INPUT, f"{told}; --debug shows the traceback"
    return BUG, f"{kind} ({find_place(error)})"


def find_place(error: BaseException) -> str:
    """The file and line of this package where an error was raised, relative to the package."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        _, package, place = frame.filename.rpartition(f"{os.sep}new_llm{os.sep}")
        if package:
            return f"new_llm/{place}, line {frame.lineno}"
    return "outside this package"


def complain(message: str) -> int:
    """Print one line on stderr; returns the exit code of bad input."""
    with suppress(OSError):  # stderr may go to the disk that is full
        print(f"new-llm: {make_line(message)}", file=sys.stderr)
    return BAD_INPUT


TOGETHER = ("experiment", "experiment-selective", "train-adapter")
"""Commands that can run in several processes."""
QUIET_SECONDS = 1.0
"""Time for another process to report an error before this one exits."""


def is_main_process() -> bool:
    """Whether this process is the one that prints."""
    return os.environ.get("RANK") in (None, "", "0")


def check_command(command: str) -> None:
    """Reject several processes for a command that would do the same work in each."""
    count = os.environ.get("WORLD_SIZE") or "1"
    if not count.isdigit():
        raise UserError(f"WORLD_SIZE: {count!r} is not a number of processes")
    if int(count) > 1 and command not in TOGETHER:
        raise UserError(f"{command} runs in one process, not in {count}; only {', '.join(TOGETHER)} can use several")


def end_quietly(exit_code: int) -> int:
    """Wait, so that another process can report the error: a launcher kills all as soon as one exits."""
    time.sleep(QUIET_SECONDS)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
