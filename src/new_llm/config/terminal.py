"""Printing safely to any terminal, and handling signals.

Names, metadata and texts can come from other people's files. Escape sequences in them could rewrite the screen, and
rich would read square brackets as markup. So everything is printed by `print_text`, `make_line` or `open_console`.
"""

import codecs
import functools
import io
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

UNPRINTABLE = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f"  # control characters except tab and newline
    "\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff"  # line separators and changes of direction
    "\ufffe\uffff"  # noncharacters; XML allows neither these nor most of the above
    "\ud800-\udfff]"  # surrogates, which no encoding has, e.g. from undecodable bytes in a file's name
)
HOME = re.compile(r"(?<![\w./-])(?:/(?:home|Users)/[\w.@-]+|/root)(?![\w.-])")
PLAIN = str.maketrans({"–": "-", "—": "-", "−": "-", "‖": "|", "±": "+-", "→": "->", "…": "...", "·": "*", "×": "x",
                       "α": "alpha", "β": "beta", "≤": "<=", "≥": ">=", "\u00a0": " ", "│": "|",
                       "─": "-", "∞": "inf"})  # fmt: skip
"""Replacements in a terminal without these characters."""
MIN_COLUMNS = 60
"""In less, tables and help would be cut to single letters; a narrower terminal wraps these lines instead."""


def make_printable(text: object) -> str:
    r"""A text with control and other invisible characters escaped, e.g. as `\x1b`; tabs and newlines stay."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], str(text))


def make_line(text: object) -> str:
    """A text as one printable line."""
    return make_printable(" ".join(str(text).split()))


def hide_home(text: str) -> str:
    """A text with `~` for any user's home folder in its paths, so that it can be shared."""
    return HOME.sub("~", text)


def print_text(text: object, *, stderr: bool = False) -> None:
    """Print a text with control characters escaped."""
    print(make_printable(text), file=sys.stderr if stderr else sys.stdout)


def prepare_terminal() -> None:
    """Make stdout and stderr accept any text, and give tables and help enough columns."""
    codecs.register_error("new_llm.plain", _replace_unencodable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="new_llm.plain")
    if shutil.get_terminal_size().columns < MIN_COLUMNS:
        os.environ["COLUMNS"] = str(MIN_COLUMNS)


def open_console(*, stderr: bool = False, **options: Any) -> "Console":
    """A rich console that prints strings literally: no markup, no emoji codes, no control characters."""
    # Imported here, because help and errors should not wait for rich.
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class PrintableConsole(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                text, style, control = segment
                yield segment if control else Segment(make_printable(text), style)

    return PrintableConsole(stderr=stderr, markup=False, emoji=False, highlight=False, **options)


@contextmanager
def show_progress(
    what: str, unit: str = "", total: float | None = None, *, in_bytes: bool = False
) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr; yields rich's `update`, which takes `advance`, or `completed` and `total`.

    If stderr is not a terminal, one line at the end reports the total, provided that there is a `unit`.
    """
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = open_console(stderr=True)
    count = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), count, TextColumn(unit))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=not unit
    ) as bars:
        task = bars.add_task(what, total=total)
        yield functools.partial(bars.update, task)
    if unit and not console.is_terminal:
        done = bars.tasks[0]
        print_text(f"{what}: {done.completed:,.0f} {unit} in {done.elapsed:.1f} s", stderr=True)


def _replace_unencodable(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that a stream can't encode."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start : error.end].translate(PLAIN)
    return "".join(c if c.isascii() else ascii(c)[1:-1] if "\ud800" <= c <= "\udfff" else "?" for c in part), error.end


@contextmanager
def handle_signals(numbers: Iterable[int], handler: Callable[..., object]) -> Iterator[None]:
    """Handle these signals while the block runs; does nothing outside the main thread, where no signals arrive."""
    try:
        before = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:
        before = {}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
