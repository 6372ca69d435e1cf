"""The runs of a folder: what each is, how far it got, and its best figures."""

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from new_llm.config import UserError
from new_llm.config.evaluation import EVALUATIONS_FOLDER
from new_llm.config.loading import TrainingSettings
from new_llm.data.hub import describe_failure
from new_llm.experiments.adapter_config import ADAPTER_MODELS, AdapterTrainingConfig
from new_llm.experiments.config import ExperimentConfig
from new_llm.experiments.record import (
    ENVIRONMENT_FILE,
    MODEL_RESULT_FILE,
    RESULTS_FILE,
    name_model_folder,
    read_begun,
    read_json,
)
from new_llm.training.log import read_metrics

CONFIG_KINDS: tuple[type[TrainingSettings], ...] = (ExperimentConfig, AdapterTrainingConfig)
"""The kinds of runs, by their configuration."""


@dataclass(frozen=True)
class ModelStatus:
    """One model of a run.

    Attributes:
        name: the model type.
        status: waiting, training, or done.
        epochs: epochs that are finished.
        num_epochs: epochs at most.
        perplexity: of the last measurement: sliding-window where the model is done, else the best validation's; None:
            there is none yet.
        tokens: tokens trained on.
        gates: least and greatest gate; None: no memory, or nothing logged yet.
    """

    name: str
    status: str
    epochs: int
    num_epochs: int
    perplexity: float | None
    tokens: int
    gates: tuple[float, float] | None


@dataclass(frozen=True)
class RunStatus:
    """One run.

    Attributes:
        folder: where it is.
        status: complete, or unfinished (running, interrupted or failed: a folder does not tell which).
        created: when it began; None: not known.
        config: its configuration; None: it can't be read.
        models: its models, in order.
        evaluations: measurements made since, as the files' names.
        fault: why its files can't be read; None: they can.
    """

    folder: Path
    status: str
    created: datetime.datetime | None
    config: TrainingSettings | None
    models: tuple[ModelStatus, ...]
    evaluations: tuple[str, ...]
    fault: str | None = None


def list_runs(runs_dir: Path) -> list[RunStatus]:
    """The runs below a folder, studies' runs too, the latest last. A run that can't be read is listed with its fault.

    Raises:
        UserError: there is no such folder.
    """
    if not runs_dir.is_dir():
        raise UserError(f"{runs_dir}: no such folder; runs are made by `new-llm experiment`")
    folders = [
        path.parent
        for kind in CONFIG_KINDS
        for pattern in ("*", "*/*")
        for path in runs_dir.glob(f"{pattern}/{kind.file_name}")
    ]
    found = [describe_run(folder) for folder in folders]
    oldest = datetime.datetime.min.replace(tzinfo=datetime.UTC)
    return sorted(found, key=lambda run: (run.created or oldest, str(run.folder)))


def describe_run(folder: Path) -> RunStatus:
    """How far a run got; what can't be read of it is its `fault`."""
    evaluations = tuple(sorted(path.name for path in (folder / EVALUATIONS_FOLDER).glob("*.json")))
    try:
        kind = next(kind for kind in CONFIG_KINDS if (folder / kind.file_name).exists())
        config = read_begun(folder, kind)
        facts = read_json(folder / ENVIRONMENT_FILE) or {}
        results = read_json(folder / RESULTS_FILE) or {}
        names = config.models if isinstance(config, ExperimentConfig) else ADAPTER_MODELS
        models = tuple(_describe_model(folder / name_model_folder(name), name, config) for name in names)
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
        return RunStatus(folder, "unreadable", None, None, (), evaluations, str(error))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        fault = f"{folder}: its files are not as this program writes them: {describe_failure(error)}"
        return RunStatus(folder, "unreadable", None, None, (), evaluations, fault)


def _describe_model(folder: Path, name: str, config: TrainingSettings) -> ModelStatus:
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
    return ModelStatus(
        name=name,
        status="done" if result is not None else "training" if lines else "waiting",
        epochs=len(epochs),
        num_epochs=config.train.num_epochs,
        perplexity=perplexity,
        tokens=max((line["tokens"] for line in lines), default=0),
        gates=(min(values), max(values)) if values else None,
    )
