"""The run folder: what a run writes where, how a process locks it, and how to list runs and load their models.

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
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import accelerate
import torch
import transformers
from tokenizers import Tokenizer

from new_llm import __version__
from new_llm.config import UserError
from new_llm.config.evaluation import EVALUATIONS_FOLDER, EvalConfig
from new_llm.config.files import hold_lock, read_json_file, remove_leftovers, write_text_atomically
from new_llm.config.loading import (
    RunSettings,
    Settings,
    TrainingSettings,
    flatten_settings,
    is_user_name,
    read_settings,
)
from new_llm.data.hub import describe_failure
from new_llm.data.tokenizer import TOKENIZER_FILE, check_vocabulary, read_tokenizer_file
from new_llm.experiments.config import AdapterTrainingConfig, ExperimentConfig, name_model_folder
from new_llm.models import TransformerLM
from new_llm.models.factory import find_model_kind
from new_llm.models.layers import LAYER_KINDS
from new_llm.models.model_file import STRUCTURE_FILE, load_model, read_structure
from new_llm.models.tensor_files import now
from new_llm.processes import ALONE, Processes
from new_llm.training.checkpoint import BEST_FOLDER, list_checkpoints
from new_llm.training.log import read_metrics

CONFIG_FILE = ExperimentConfig.file_name
ENVIRONMENT_FILE = "environment.json"
DATA_FILE = "data.json"
RESULTS_FILE = "results.json"
REPORT_FILE = "report.html"
MODEL_RESULT_FILE = "result.json"
LOCK_FILE = ".lock"
UNNAMED = "experiment"
MAY_CHANGE = (
    "runs_dir",
    "train.sharding",
    "train.checkpoint_every_steps",
    "train.keep_checkpoints",
    "train.keep_last_checkpoint",
)
"""Settings of where and how a run is computed; a resumed run may change them."""
LENGTHS = ("train.num_epochs", "train.cpu_seconds", "train.patience")
"""Settings of how long a run trains; a resumed run may change them, and this is recorded."""
TOKENIZER_LEVELS = 3
"""A model's tokenizer is in its folder or in one of the two above: runs/<name>/<model>/best."""
CONFIG_KINDS: tuple[type[TrainingSettings], ...] = (ExperimentConfig, AdapterTrainingConfig)
"""The configurations that a run can have."""

# Holding a run


@contextmanager
def hold_run(config: Settings, *, resume: bool, processes: Processes = ALONE) -> Iterator[tuple[Settings, Path]]:
    """Lock a new or resumed run's folder while the block runs; yields the configuration, now named, and the folder.

    The lock is a file in the folder itself, whatever links lead there; the main process holds it for all. A new folder
    is removed after the block unless the block created the run (`create_run`).

    Raises:
        UserError: another process is using the run, a new run's folder already exists, there is nothing to resume, or
            the run began with other settings.
        OtherProcessError: the same, in processes other than the main one.
    """
    with ExitStack() as held:
        yield processes.run_on_main(lambda: held.enter_context(_hold_alone(config, resume)))


@contextmanager
def _hold_alone(config: Settings, resume: bool) -> Iterator[tuple[Settings, Path]]:
    if config.name is None:
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
                if folder in made and not (folder / config.file_name).exists():  # leave nothing behind after bad input
                    lock.unlink(missing_ok=True)
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()


def _find_run(config: Settings, folder: Path, *, resume: bool) -> Settings:
    """The configuration with which a run can begin or continue here. Removes leftovers of a killed process."""
    if not resume:
        if any(entry.name != LOCK_FILE for entry in folder.iterdir()):
            raise UserError(
                f"{folder}: a run of this name exists; choose another --name, or continue it with "
                f"--name {config.name} --resume"
            )
        return config
    begun = read_begun(folder, type(config))
    changed = list_differences(begun, config, but=(*MAY_CHANGE, *LENGTHS))
    if changed:
        raise UserError(
            f"{folder}: a run can only continue with the settings it began with; changed: {'; '.join(changed)}"
        )
    one, two = flatten_settings(begun.to_dict()), flatten_settings(config.to_dict())
    if shorter := [key for key in LENGTHS[:2] if two[key] < one[key]]:
        raise UserError(f"{folder}: {shorter[0]} {one[shorter[0]]} → {two[shorter[0]]}: a run can't be shortened")
    for place, _, _ in os.walk(folder):
        remove_leftovers(Path(place))
    return dataclasses.replace(cast(Any, config), runs_dir=begun.runs_dir)


def create_run(config: RunSettings, folder: Path) -> None:
    """Turn a locked folder into a run by writing its configuration."""
    write_text_atomically(folder / config.file_name, config.to_yaml())


def read_begun(folder: Path, kind: type[Settings]) -> Settings:
    """The configuration that a run began with; users' modules named in it are not imported."""
    if not (folder / kind.file_name).exists():
        raise UserError(f"{folder}: no run here ({kind.file_name} is missing)")
    return read_settings(folder / kind.file_name, kind, is_record=True)


def list_differences(first: RunSettings, second: RunSettings, but: Collection[str] = ("runs_dir",)) -> list[str]:
    """The fields, except `but`, in which two configurations differ: "train.learning_rate 0.0001 → 0.001"."""
    one, two = flatten_settings(first.to_dict()), flatten_settings(second.to_dict())
    return [f"{key} {one[key]} → {two[key]}" for key in one if one[key] != two[key] and key not in but]


# What a result depends on


def describe_making(device: torch.device, precision: str) -> dict[str, Any]:
    """Record how a result is made: time, command, code revision, machine and versions."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        processor = found[1].strip() if found else processor
    return {
        "created": now(),
        "command": describe_command(),
        "code": describe_code(),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
            "transformers": transformers.__version__,
            "platform": platform.platform(),
            "processor": torch.cuda.get_device_name() if device.type == "cuda" else processor,
            "device": str(device),
            "precision": precision,
            "num_threads": torch.get_num_threads(),
            "num_cpus": os.cpu_count(),
        },
    }


def describe_code() -> dict[str, Any]:
    """The program's version and, in a git checkout, its revision."""
    checkout = Path(__file__).resolve().parents[3]
    code: dict[str, Any] = {"version": __version__, "git_revision": None, "git_dirty": None}
    if (checkout / ".git").exists() and shutil.which("git"):
        asked = {"git_revision": "rev-parse HEAD", "git_dirty": "status --porcelain --untracked-files=no"}
        with suppress(subprocess.SubprocessError, OSError):
            for key, words in asked.items():
                command = ["git", "-C", str(checkout), *words.split()]
                done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
                code[key] = done.stdout.strip()
            code["git_dirty"] = bool(code["git_dirty"])
    return code


def describe_command() -> str:
    """The command line, without the paths of interpreter and program."""
    program = Path(sys.argv[0])
    start = ["python3", f"scripts/{program.name}"] if program.parent.name == "scripts" else ["new-llm"]
    return shlex.join([*start, *sys.argv[1:]])


def write_json(path: Path, values: Any) -> None:
    """Write strict JSON atomically; NaN and infinity become null."""
    strict = json.loads(json.dumps(values), parse_constant=lambda _: None)
    write_text_atomically(path, json.dumps(strict, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a file that `write_json` wrote; None if it does not exist."""
    return read_json_file(path) if path.exists() else None


def list_refused(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The measures that a run requested and that failed, with the reasons, model by model.

    Empty for the default measures: some of these may not apply to the text.
    """
    if list(results["config"]["eval"]["measures"]) == list(EvalConfig().measures):
        return []
    return [item for model in results["models"] for item in (model.get("not_measured") or {}).items()]


def describe_resumption(folder: Path, command: str) -> str:
    """The command line that resumes a run."""
    place = "" if folder.parent == Path("runs") else f" --runs-dir {folder.parent}"
    return f"new-llm {command}{place} --name {folder.name} --resume"


# Finding a model and its tokenizer


def find_model_folder(run: Path, model: str | None = None, *, needs_memory: bool = False) -> Path:
    """The folder of one saved model.

    Args:
        run: a run folder with `<model>/best` folders, one such `<model>` folder, or a model's own folder.
        model: which model of a run folder; the module of my_module:MyLayer is imported. None: the only one.
        needs_memory: ignore models without memory layers.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; expected a run folder, or a folder with {STRUCTURE_FILE}")
    own = next((folder for folder in (run, run / BEST_FOLDER) if (folder / STRUCTURE_FILE).is_file()), None)
    if own is not None and model is not None and not is_user_name(model):
        raise UserError(f"{run}: contains a single model; leave out the model's name ({model!r})")
    inside = sorted(run.glob(f"*/{BEST_FOLDER}/{STRUCTURE_FILE}"))
    folders = {path.parent.parent.name: path.parent for path in inside} if own is None else {run.name: own}
    if not folders:
        raise UserError(
            f"{run}: no saved model here: no {STRUCTURE_FILE} and no <model>/{BEST_FOLDER}/{STRUCTURE_FILE}"
        )
    if model is not None and own is None:
        names = [name for name in (model, name_model_folder(model)) if name in folders]
        if not names:
            raise UserError(f"{run}: no model {model!r} here; it has {', '.join(folders)}")
        folders = {names[0]: folders[names[0]]}
    if model is not None and is_user_name(model):
        find_model_kind(model)
    found = {name: folder for name, folder in folders.items() if not needs_memory or may_have_memory(folder)}
    if not found:
        raise UserError(f"{run}: no memory layer in {', '.join(folders)}")
    if len(found) > 1:
        raise UserError(f"{run}: several models; choose one with --model: {', '.join(found)}")
    return next(iter(found.values()))


def split_spec(spec: str) -> tuple[str, str | None]:
    """Split RUN:MODEL; the model of RUN alone is None."""
    run, _, model = spec.rpartition(":")
    place, _, module = run.rpartition(":")
    if place and is_user_name(f"{module}:{model}") and not Path(run).exists():  # RUN:my_module:MyLayer
        run, model = place, f"{module}:{model}"
    return (run, model) if run and model and not Path(spec).exists() else (spec, None)


def may_have_memory(folder: Path) -> bool:
    """Whether a saved model may have a memory layer, judging by its structure file; unknown layer kinds count."""
    try:
        kinds = [LAYER_KINDS.get(layer["kind"]) for layer in read_structure(folder)["layers"]]
    except (LookupError, TypeError):
        raise UserError(f"{folder / STRUCTURE_FILE}: not a model description") from None
    return any(kind is None or kind.has_memory for kind in kinds)


def load_run_model(
    run: Path, model: str | None = None, *, needs_memory: bool = False
) -> tuple[TransformerLM, Tokenizer]:
    """Load a run's model with its best weights, and its tokenizer; arguments as in `find_model_folder`."""
    folder = find_model_folder(run, model, needs_memory=needs_memory)
    tokenizer_path = find_tokenizer_file(folder)
    tokenizer = read_tokenizer_file(tokenizer_path)
    loaded = load_model(folder).eval()
    check_vocabulary(tokenizer, loaded.vocab_size, f"{tokenizer_path}: has ids up to {{}}; the model in {folder}")
    return loaded, tokenizer


def find_tokenizer_file(folder: Path) -> Path:
    """The tokenizer file of a model: in its folder, or in one of the two folders above."""
    for place in [folder, *folder.resolve().parents][:TOKENIZER_LEVELS]:
        if (place / TOKENIZER_FILE).is_file():
            return place / TOKENIZER_FILE
    raise UserError(f"{folder}: no {TOKENIZER_FILE} here or in the {TOKENIZER_LEVELS - 1} folders above")


# Listing runs


@dataclass(frozen=True)
class RunStatus:
    """One run: complete, unreadable (see `fault`), or unfinished.

    Unfinished means running, interrupted or failed; the folder does not tell which. `models` are the results of
    `_describe_model`, `evaluations` file names.
    """

    folder: Path
    status: str
    created: datetime.datetime | None
    config: TrainingSettings | None
    models: tuple[dict[str, Any], ...]
    evaluations: tuple[str, ...]
    fault: str | None = None


def list_runs(runs_dir: Path) -> list[RunStatus]:
    """The runs below a folder, including those of studies, newest last; unreadable ones with their fault."""
    if not runs_dir.is_dir():
        raise UserError(f"{runs_dir}: no such folder; `new-llm experiment` creates runs")
    patterns = [f"{place}/{kind.file_name}" for kind in CONFIG_KINDS for place in ("*", "*/*")]
    folders = [path.parent for pattern in patterns for path in runs_dir.glob(pattern)]
    found = [describe_run(folder) for folder in folders]
    oldest = datetime.datetime.min.replace(tzinfo=datetime.UTC)
    return sorted(found, key=lambda run: (run.created or oldest, str(run.folder)))


def describe_run(folder: Path) -> RunStatus:
    """The progress of a run; for an unreadable run, its `fault`."""
    evaluations = tuple(sorted(path.name for path in (folder / EVALUATIONS_FOLDER).glob("*.json")))
    try:
        kind = next(kind for kind in CONFIG_KINDS if (folder / kind.file_name).exists())
        config = read_begun(folder, kind)
        facts = read_json(folder / ENVIRONMENT_FILE) or {}
        results = read_json(folder / RESULTS_FILE) or {}
        models = tuple(_describe_model(folder / name_model_folder(name), name, config) for name in config.models)
        created = datetime.datetime.fromisoformat(facts["created"]) if facts.get("created") else None
        if created is not None and created.tzinfo is None:
            created = created.replace(tzinfo=datetime.UTC)
        return RunStatus(
            folder=folder,
            status="complete" if results.get("status") == "complete" else "unfinished",
            created=created,
            config=config,
            models=models,
            evaluations=evaluations,
        )
    except UserError as error:
        fault = str(error)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        fault = f"{folder}: unexpected content in its files: {describe_failure(error)}"
    return RunStatus(folder, "unreadable", None, None, (), evaluations, fault)


def _describe_model(folder: Path, name: str, config: TrainingSettings) -> dict[str, Any]:
    """The state of one model of a run as plain values; its `status` is waiting, training or done.

    `perplexity` is that of sliding windows if the model is done, else the best validation perplexity so far; `gates`
    are the smallest and the largest; `checkpoints` are the names of those to continue from, newest first.
    """
    lines = read_metrics(folder)
    epochs = [line for line in lines if line["event"] == "epoch"]
    steps = [line for line in lines if line["event"] == "train"]
    result: dict[str, Any] | None = read_json(folder / MODEL_RESULT_FILE)
    if result is not None:
        perplexity = result["evaluation"].get("sliding", {}).get("perplexity")
    else:
        perplexity = min((line["validation_perplexity"] for line in epochs), default=None)
    gates = result["gates"] if result else next((line["gates"] for line in reversed(steps) if line.get("gates")), {})
    values = [value for heads in gates.values() for value in heads]
    return {
        "name": name,
        "status": "done" if result is not None else "training" if lines else "waiting",
        "epochs": len(epochs),
        "num_epochs": config.train.num_epochs,
        "perplexity": perplexity,
        "tokens": max((line["tokens"] for line in lines), default=0),
        "gates": (min(values), max(values)) if values else None,
        "checkpoints": tuple(path.name for path in list_checkpoints(folder)),
    }
