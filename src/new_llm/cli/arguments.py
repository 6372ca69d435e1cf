"""Reading a command's flags with tyro; what is wrong with them is one line, like all bad input."""

import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import tyro

from new_llm.config import UserError

T = TypeVar("T")


def parse_flags(kind: type[T] | Any, arguments: list[str], **options: Any) -> T:
    """`tyro.cli` with enums by their values.

    Raises:
        UserError: an unknown flag or a value that is refused.
        SystemExit: help was asked for and has been printed.
    """
    with read_errors():
        return tyro.cli(kind, args=arguments, config=(tyro.conf.EnumChoicesFromValues,), **options)


@contextlib.contextmanager
def read_errors() -> Iterator[None]:
    """Inside the block what tyro has to complain of is a `UserError` of one line.

    Raises:
        UserError: an unknown flag or a value that is refused.
        SystemExit: help was asked for and has been printed.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            yield
    except SystemExit as stopped:
        if stopped.code in (0, None):
            raise
        raise UserError(_flatten(complaint.getvalue())) from None


def _flatten(box: str) -> str:
    """The message of tyro's framed box, without the frame and the pointer to the help."""
    lines = [re.sub(r"^\s*│\s?|\s*│\s*$", "", line).rstrip() for line in box.splitlines()]
    words = [line.strip() for line in lines if line.strip() and not re.fullmatch(r"[╭╰├]?─.*|[╭╰].*", line.strip())]
    message = re.sub(r"^Error parsing [\w.-]+: ", "", " ".join(words))
    message, _, pointer = message.partition(" For full helptext, ")
    message, _, _ = message.partition(" Argument helptext: ")
    message, _, suggestions = message.partition(" Perhaps you meant: ")
    if suggestions:
        message += f"; perhaps you meant {re.split(r'[ ,]', suggestions, maxsplit=1)[0]}"
    return f"{message or 'the flags can not be read'} (see {pointer.split(' ', 1)[-1] or '--help'})"
