"""The command `new-llm`: finds the sub-command, and turns bad input into one line and exit code 2."""

import errno
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from new_llm import __version__
from new_llm.cli.launched import check_command, end_quietly, is_main_process, tells_errors
from new_llm.config.allocator import keep_freed_memory
from new_llm.config.errors import OtherProcessError, UserError

# Modules are imported only when their command is asked for, so that help never waits for torch.
COMMANDS: dict[str, tuple[str, str]] = {
    "completion": ("new_llm.cli.completion", "print the script by which bash, zsh or fish completes this command"),
    "eval": ("new_llm.cli.evaluation.main", "measure a trained model: perplexity, recall, the reversal curse and more"),
    "evaluate-wikitext": ("new_llm.cli.evaluate_wikitext", "perplexity on WikiText-2's test text"),
    "experiment": ("new_llm.cli.experiment", "train some models on identical data and compare them"),
    "experiment-selective": (
        "new_llm.cli.experiment_selective",
        "compare selective output with baselines of equal parameters and equal compute",
    ),
    "export": ("new_llm.cli.export", "write a model as a folder for Hugging Face's tools"),
    "generate": ("new_llm.cli.generate", "go on with a text"),
    "lm-eval": ("new_llm.cli.lm_eval", "lm-evaluation-harness with this project's models"),
    "memory": ("new_llm.cli.memory", "fill, show, merge and compare memory files"),
    "report": ("new_llm.cli.report", "write a run's report again, or compare several runs"),
    "runs": ("new_llm.cli.runs", "list the runs of a folder, or show one"),
    "study": ("new_llm.cli.study", "train and compare the variants of a study, with several seeds"),
    "train-adapter": ("new_llm.cli.train_adapter", "train a memory beside the layers of an existing Pythia"),
}


BAD_INPUT = 2
"""Exit code."""

# torch's threads spin while they wait for one another. On a machine that does anything else beside, the spinning takes
# the time of the thread that is waited for: one busy neighbour on two cores then costs a factor of five, and sleeping
# threads cost nothing that could be measured. It is read when torch is imported, and a setting of the user's own wins.
THREADS_SLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (2: bad input, 130: interrupted)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if not given or given[0] in ("-h", "--help"):
        print(describe_commands())
        return 0
    if given[0] == "--version":
        print(__version__)
        return 0
    if given[0] not in COMMANDS:
        return complain(f"unknown command {given[0]!r}; allowed are {', '.join(COMMANDS)}")
    module, _ = COMMANDS[given[0]]
    for name, value in THREADS_SLEEP.items():
        os.environ.setdefault(name, value)
    keep_freed_memory()
    try:
        check_command(given[0])
        with interrupt_on_sigterm():
            return importlib.import_module(module).run(given[1:])
    except UserError as error:
        if debug:
            raise
        return complain(str(error)) if tells_errors() else end_quietly(BAD_INPUT)
    except OtherProcessError as error:
        if debug:
            raise
        return end_quietly(BAD_INPUT if error.is_user_error else 1)
    except KeyboardInterrupt:
        if debug:
            raise
        if is_main_process():
            print("new-llm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output is gone; keep Python from complaining about it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, one that is gone, no rights
        if debug:
            raise
        return complain(describe_os_error(error))


@contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Inside the block SIGTERM and SIGUSR1 end what runs as Ctrl-C does: temporary files go, what is done is kept."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    try:
        before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def describe_os_error(error: OSError) -> str:
    """The system's words on what it could not do, and for a full disk the way on."""
    place = f"{error.filename}: " if error.filename else ""
    way = ": free some space; a run then goes on by --resume" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{place}{error.strerror or error}{way}"


def complain(message: str) -> int:
    """Say in one line what was wrong; the exit code of bad input."""
    with suppress(OSError):  # the disk that is full may be the one that this goes to
        print(f"new-llm: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def describe_commands() -> str:
    """The help of the command itself."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: new-llm COMMAND [OPTIONS]",
            "",
            "A laboratory for language models with compressive memory.",
            "",
            "commands:",
            *lines,
            "",
            "new-llm COMMAND --help shows a command's options; --debug shows the traceback of an error; --version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
