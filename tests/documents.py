"""What the pages of this project show: their code, their commands, their links."""

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHER_PROGRAMS = {"docker", "git", "pip", "pre-commit", "scp", "tensorboard"}
"""Programs of others whose arguments are not parsed here."""


def name_page(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def find_blocks(page: Path, language: str) -> list[str]:
    """The page's fenced blocks of one language, whatever their indentation."""
    pattern = re.compile(rf"^( *)```{language}\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
    text = page.read_text(encoding="utf-8")
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in pattern.findall(text)]


def find_commands(page: Path) -> list[str]:
    """The command lines of a page: those of bash blocks, and indented ones."""
    text = page.read_text(encoding="utf-8")
    lines = "\n".join(find_blocks(page, "bash")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"^    ((?:python3?|new-llm|make) .*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    commands = [part.split(" > ")[0].strip() for line in lines for part in line.split(" #")[0].split("&&")]
    return [command for command in commands if command]


class ParsedError(SystemExit):
    """A command's arguments have been read; it was not run. An exit, which the command lets pass."""


def stop_after(read: Callable[..., Any]) -> Callable[..., NoReturn]:
    """What reads the arguments, and then ends the command."""

    def read_and_stop(*args: Any, **options: Any) -> NoReturn:
        raise ParsedError(read(*args, **options))

    return read_and_stop


def parse_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a command read its arguments, by its own parser, and do nothing else.

    Raises:
        AssertionError: it does not exist, or does not know its arguments.
    """
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    program, arguments = words[0], words[1:]
    if program in OTHER_PROGRAMS:
        return
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(arguments) <= set(targets), f"the Makefile has no {arguments}"
    elif program in ("python", "python3"):
        parse_script(ROOT / arguments[0], arguments[1:], monkeypatch)
    else:
        assert program == "new-llm", f"{program}: unknown; a program of others belongs in OTHER_PROGRAMS"
        parse_own(arguments, monkeypatch)


def parse_own(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`new-llm`: every command reads its flags by its `read`; the harness of lm-eval reads its own."""
    from new_llm.cli import main

    if not arguments or arguments[0].startswith("-"):
        assert set(arguments) <= {"--help", "--version", "--debug"}
        return
    assert arguments[0] in main.COMMANDS, f"new-llm has no {arguments[0]}"
    if arguments[0] == "lm-eval":
        pytest.importorskip("lm_eval")
    catch_parsing(monkeypatch)
    monkeypatch.setattr(main, "keep_freed_memory", lambda: None)
    try:
        code = main.main(arguments)
    except ParsedError:
        return
    except SystemExit as stopped:
        code = stopped.code
        if "--help" in arguments and not code:
            return
    raise AssertionError(f"new-llm {shlex.join(arguments)}: exit code {code}")


def parse_script(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python program of this repository: a launcher of a command, or one that reads its own flags."""
    assert script.is_file(), f"{script} does not exist"
    source = script.read_text(encoding="utf-8")
    if launched := re.search(r'launch\("([\w-]+)"\)', source):
        parse_own([launched[1], *arguments], monkeypatch)
    elif "argparse" in source and arguments:
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        monkeypatch.syspath_prepend(str(script.parent))
        catch_parsing(monkeypatch)
        with pytest.raises(ParsedError):
            runpy.run_path(str(script), run_name="__main__")
    else:
        compile(source, str(script), "exec")
        assert not arguments, f"{script.name} takes no arguments"


def catch_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read from a command line from now on ends the command."""
    from new_llm.cli.command import Command, CommandGroup
    from new_llm.cli.training import TrainingCommand

    for kind in (Command, CommandGroup, TrainingCommand):
        monkeypatch.setattr(kind, "read", classmethod(stop_after(kind.read.__func__)))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args))
