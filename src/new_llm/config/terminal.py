"""Printing to a terminal: whatever it can encode, and nothing from a file that it would obey; and answering signals.

Names, metadata and texts come from files of others. Escape sequences in them could rewrite the screen, and rich would
read square brackets as its own markup, so whatever is printed passes `print_text`, `make_line` or `open_console`.
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
    "[\0-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline
    "\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff"  # line separators and changes of direction
    "\ufffe\uffff"  # what is no character; XML, too, may hold neither these nor most of the above
    "\ud800-\udfff]"  # what no encoding has, such as undecodable bytes of a file's name
)
HOME = re.compile(r"(?<![\w./-])(?:/(?:home|Users)/[\w.@-]+|/root)(?![\w.-])")
PLAIN = str.maketrans({"–": "-", "—": "-", "−": "-", "‖": "|", "±": "+-", "→": "->", "…": "...", "·": "*", "×": "x",
                       "α": "alpha", "β": "beta", "≤": "<=", "≥": ">=", "\u00a0": " ", "│": "|",
                       "─": "-", "∞": "inf"})  # fmt: skip
"""Stand-ins in a terminal without these characters."""
MIN_COLUMNS = 60
"""Narrower tables and help would be cut to single letters; a narrower terminal wraps these lines instead."""


def make_printable(text: object) -> str:
    r"""A text with control characters and other invisible commands shown as `\x1b`; tabs and newlines stay."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], str(text))


def make_line(text: object) -> str:
    """A text as one printable line."""
    return make_printable(" ".join(str(text).split()))


def hide_home(text: str) -> str:
    """A text to be shared, with `~` for the home folder in its paths, whoever's it is."""
    return HOME.sub("~", text)


def print_text(text: object, *, stderr: bool = False) -> None:
    """`print` of printable text."""
    print(make_printable(text), file=sys.stderr if stderr else sys.stdout)


def prepare_terminal() -> None:
    """Let stdout and stderr take any text, and tables and help have room; for the rest of the process."""
    codecs.register_error("new_llm.plain", _replace_unencodable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="new_llm.plain")
    if shutil.get_terminal_size().columns < MIN_COLUMNS:
        os.environ["COLUMNS"] = str(MIN_COLUMNS)


def open_console(*, stderr: bool = False, **options: Any) -> "Console":
    """rich's console that prints strings as they are: no markup, no emoji codes, no control characters."""
    # rich is not needed for help and errors, which should not wait for it.
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
    """A progress bar on stderr; gives rich's `update` of it, which takes `advance`, or `completed` and `total`.

    Where stderr is no terminal, what has a unit is reported in one line at its end.
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
    """What stands for characters that a stream's encoding does not have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start : error.end].translate(PLAIN)
    return "".join(c if c.isascii() else ascii(c)[1:-1] if "\ud800" <= c <= "\udfff" else "?" for c in part), error.end


@contextmanager
def handle_signals(numbers: Iterable[int], handler: Callable[..., object]) -> Iterator[None]:
    """Inside the block a handler answers these signals; not so outside the main thread, where none arrive."""
    try:
        before = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:
        before = {}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
