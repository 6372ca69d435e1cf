"""What the commands that train share: settings from a file or from the run itself, and how a training ends."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

from new_llm.cli.launched import end_quietly, is_main_process
from new_llm.config.run_settings import RunSettings, Settings, read_settings

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Start(Generic[Settings]):
    """What flags override, and the flags that have chosen it.

    Attributes:
        settings: of --config, or with --resume of the run itself; else the defaults.
        config: the file that --config names.
        resume: whether --resume is there.
    """

    settings: Settings
    config: Path | None
    resume: bool


def read_start(arguments: list[str], kind: type[Settings]) -> Start[Settings]:
    """Find the settings that a command begins from, before its other flags are read.

    Args:
        arguments: the command line after the command.
        kind: the command's settings.

    Raises:
        UserError: the configuration file is bad.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--resume", action="store_true")
    first.add_argument("--name")
    first.add_argument("--runs-dir", type=Path, default=kind.runs_dir)
    known, _ = first.parse_known_args(arguments)
    settings = kind()
    if known.config is not None:
        settings = read_settings(known.config, kind)
    elif known.resume and known.name is not None:
        settings = read_settings(known.runs_dir / known.name / kind.file_name, kind)
    return Start(settings, known.config, known.resume)


def run_training(
    train: "Callable[[Console], dict[str, Any]]",
    show: Callable[[dict[str, Any]], None],
    command: str,
    kind: type[RunSettings],
) -> int:
    """Train and show the results; where it was stopped or failed, say so in words. Of several processes one prints.

    Args:
        train: given the console for its progress, returns the results.
        show: prints them.
        command: the command that goes on with an interrupted run.
        kind: the command's settings.

    Returns:
        The exit code: 130 where training was interrupted, 1 where it can't go on.
    """
    from rich.console import Console

    from new_llm.training import TrainingError, TrainingInterrupted

    console = Console(stderr=True)
    try:
        results = train(console)
    except TrainingInterrupted as stopped:
        if not is_main_process():
            return end_quietly(130)
        run_folder = stopped.folder.parent
        place = "" if run_folder.parent == kind.runs_dir else f" --runs-dir {run_folder.parent}"
        again = f"new-llm {command}{place} --name {run_folder.name} --resume"
        console.print(f"{stopped}\ngo on with: {again}", highlight=False, soft_wrap=True)
        return 130
    except TrainingError as error:
        print(f"new-llm: {error}", file=sys.stderr)
        return 1
    if is_main_process():
        show(results)
    return 0
