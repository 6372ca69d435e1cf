"""The run folder: what an experiment writes down and where, and how one process holds it.

```
runs/<name>/
  config.yaml        the resolved configuration     environment.json   machine, versions, code revision, command
  data.json          fingerprints and counts        tokenizer.json     the tokenizer of all models
  <model>/metrics.jsonl, tensorboard/, best/ (weights), checkpoints/ (while training), faults/ (if any),
                  result.json (when done)
  results.json       everything the report shows    report.html        one self-contained file
  .lock              held by the process that uses the folder
```
"""

import dataclasses
import datetime
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from new_llm import __version__
from new_llm.config import UserError
from new_llm.config.files import read_json_file, remove_leftovers, write_text_atomically
from new_llm.config.loading import RunSettings, Settings, read_settings
from new_llm.config.locks import hold_lock
from new_llm.experiments.config import ExperimentConfig
from new_llm.processes import ALONE, Processes

CONFIG_FILE = ExperimentConfig.file_name
ENVIRONMENT_FILE = "environment.json"
DATA_FILE = "data.json"
RESULTS_FILE = "results.json"
REPORT_FILE = "report.html"
MODEL_RESULT_FILE = "result.json"
LOCK_FILE = ".lock"
UNNAMED = "experiment"
RESULTS_VERSION = 1
MAY_CHANGE = ("runs_dir", "train.sharding", "train.checkpoint_every_steps", "train.keep_checkpoints")
"""Settings of where and how a run is computed, not of what: it may go on with others."""


@contextmanager
def hold_run(config: Settings, *, resume: bool, processes: Processes = ALONE) -> Iterator[tuple[Settings, Path]]:
    """Inside the block: a run that is to begin or to continue, and that no other process can use.

    The lock is a file inside the folder, wherever links to it point. Unless the block makes a run (`create_run`), the
    folder is removed at its end.

    Args:
        config: the run's, perhaps without a name.
        resume: whether it continues.
        processes: those that work in it together: the main one holds it for all.

    Returns:
        The configuration with its name filled in, and the folder.

    Raises:
        UserError: another process is using it; the folder exists already, or there is nothing to resume, or it began
            with other settings.
        OtherProcessError: on the others, likewise.
    """
    with ExitStack() as held:
        yield processes.run_on_main(lambda: held.enter_context(_hold_alone(config, resume)))


@contextmanager
def _hold_alone(config: Settings, resume: bool) -> Iterator[tuple[Settings, Path]]:
    if config.name is None:
        if resume:
            raise UserError("--resume needs --name NAME, the run to continue")
        name = f"{UNNAMED}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        config = dataclasses.replace(cast(Any, config), name=name)
    folder = config.runs_dir / str(config.name)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    lock = folder.resolve() / LOCK_FILE
    try:
        with hold_lock(lock, str(folder)):
            try:
                yield _find_run(config, folder, resume=resume), folder
            finally:
                if folder in made and not (folder / config.file_name).exists():  # bad input leaves nothing behind
                    lock.unlink(missing_ok=True)
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()


def _find_run(config: Settings, folder: Path, *, resume: bool) -> Settings:
    """The configuration of a run that can begin or continue in a folder. Leftovers of a killed process are removed.

    Raises:
        UserError: see `hold_run`.
    """
    if not resume:
        if any(entry.name != LOCK_FILE for entry in folder.iterdir()):
            raise UserError(
                f"{folder}: a run of this name exists; choose another --name, or continue it by "
                f"--name {config.name} --resume"
            )
        return config
    begun = read_begun(folder, type(config))
    changed = list_differences(begun, config, but=MAY_CHANGE)
    if changed:
        raise UserError(
            f"{folder}: a run continues with the settings it began with; different now: {'; '.join(changed)}"
        )
    for place, _, _ in os.walk(folder):
        remove_leftovers(Path(place))
    return dataclasses.replace(cast(Any, config), runs_dir=begun.runs_dir)


def create_run(config: RunSettings, folder: Path) -> None:
    """Make a new run of a held folder: it is one from when its configuration is in it.

    Raises:
        UserError: it can't be written.
    """
    try:
        write_text_atomically(folder / config.file_name, config.to_yaml())
    except OSError as error:
        raise UserError(f"{folder}: can't make the run's folder: {error.strerror}") from None


def read_run_config(folder: Path) -> ExperimentConfig:
    """The configuration that an experiment began with.

    Raises:
        UserError: there is no run in this folder.
    """
    return read_begun(folder, ExperimentConfig)


def read_begun(folder: Path, kind: type[Settings]) -> Settings:
    """The configuration, of its kind, that a run began with.

    Raises:
        UserError: there is no run of this kind in this folder.
    """
    if not (folder / kind.file_name).exists():
        raise UserError(f"{folder}: no run here ({kind.file_name} is missing)")
    return read_settings(folder / kind.file_name, kind)


def name_model_folder(name: str) -> str:
    """The folder of a model in its run: the model's name, or for `my_module:MyLayer` "my_module-MyLayer"."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def list_differences(first: RunSettings, second: RunSettings, but: Collection[str] = ("runs_dir",)) -> list[str]:
    """The fields, `but` some, in which two configurations differ: "train.learning_rate 0.0001 → 0.001"."""

    def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in values.items():
            if isinstance(value, dict):
                flat |= flatten(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value
        return flat

    one, two = flatten(first.to_dict()), flatten(second.to_dict())
    return [f"{key} {one[key]} → {two[key]}" for key in one if one[key] != two[key] and key not in but]


def describe_environment(device: str, precision: str, num_threads: int) -> dict[str, Any]:
    """The machine and the versions that a result depends on."""
    import accelerate
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "processor": torch.cuda.get_device_name() if device.startswith("cuda") else read_processor_name(),
        "device": device,
        "precision": precision,
        "num_threads": num_threads,
        "num_cpus": os.cpu_count(),
    }


def read_processor_name() -> str:
    """The processor's name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe_code() -> dict[str, Any]:
    """The program's version and, where it runs from a git checkout, its revision."""
    checkout = Path(__file__).resolve().parents[3]
    code: dict[str, Any] = {"version": __version__, "git_revision": None, "git_dirty": None}
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return code

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        code["git_revision"] = git("rev-parse", "HEAD")
        code["git_dirty"] = bool(git("status", "--porcelain", "--untracked-files=no"))
    except (subprocess.SubprocessError, OSError):
        pass
    return code


def describe_command() -> str:
    """The command line, without the paths of interpreter and program."""
    program = Path(sys.argv[0])
    start = ["python3", f"scripts/{program.name}"] if program.parent.name == "scripts" else ["new-llm"]
    return shlex.join([*start, *sys.argv[1:]])


def write_json(path: Path, values: Any) -> None:
    """Write strict JSON atomically; NaN and infinity, which JSON lacks, become null."""
    write_text_atomically(path, json.dumps(_strict(values), indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a file that `write_json` wrote; None where there is none.

    Raises:
        UserError: it is no JSON.
    """
    try:
        return read_json_file(path)
    except FileNotFoundError:
        return None


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
