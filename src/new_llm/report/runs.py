"""What is read of a run: its results, and the evaluations made of its models since."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from new_llm.config import UserError
from new_llm.config.bounded_files import read_json_file
from new_llm.config.measurement import EVALUATIONS_FOLDER, RECORD_VERSION
from new_llm.report.results import get_entries, get_number, get_value, load_results

ADAPTER = "parallel_adapter"


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        results: as in results.json; any part may be missing.
        evaluations: records of `new-llm eval`, oldest first.
        notes: files that could not be read.
    """

    results: dict[str, Any]
    evaluations: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The run's name."""
        return " ".join(str(self.results.get("name") or "experiment").split())


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read some runs, each a folder or its results.json.

    Raises:
        UserError: one can't be read, or is given twice.
    """
    files = [path / "results.json" if path.is_dir() else path for path in paths]
    for index, file in enumerate(files):
        if any(file.resolve() == other.resolve() for other in files[:index]):
            raise UserError(f"{paths[index]}: this run is given twice; each run is compared once")
    return [make_run(load_results(file), file.parent) for file in files]


def make_run(results: dict[str, Any], folder: Path) -> Run:
    """Results with the evaluations that lie in the run's folder."""
    evaluations, notes = read_evaluations(folder / EVALUATIONS_FOLDER)
    # One form, however the results were made: lists for tuples, text for what JSON has no form for.
    results = json.loads(json.dumps(results, default=str))
    if results.get("kind") == ADAPTER:
        results, measured = convert_adapter(results)
        evaluations = [*measured, *evaluations]
    return Run(results, tuple(evaluations), tuple(notes))


def read_evaluations(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records in a folder, oldest first, and what could not be read."""
    records: list[dict[str, Any]] = []
    notes: list[str] = []
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            record = read_json_file(file)
        except (OSError, UserError):
            notes.append(f"The evaluation {file.name} could not be read, and is left out.")
            continue
        is_known = get_number(record, "record_version") == RECORD_VERSION and isinstance(record.get("result"), dict)
        if is_known and isinstance(record.get("kind"), str):
            records.append(record)
        else:
            notes.append(f"The evaluation {file.name} has another form than this version reads, and is left out.")
    return sorted(records, key=lambda record: str(record.get("created") or "")), notes


def convert_adapter(results: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An adapter's results as those of an experiment with one model, and its measurements as records."""
    parameters = get_value(results, "num_parameters")
    numbers = [get_number(parameters, key) for key in ("base", "adapter")]
    entry = {
        "model_type": ADAPTER,
        "num_parameters": {"total": sum(number for number in numbers if number is not None)} if any(numbers) else None,
        **{key: results.get(key) for key in ("memory_info", "training", "gates", "alpha")},
    }
    evaluation = get_value(results, "evaluation")
    records = [
        {
            "kind": "long",
            "status": "complete",
            "created": results.get("created"),
            "command": results.get("command"),
            "subject": {"model": ADAPTER},
            "text": {"source": str(text).replace("_", " ")},
            "result": measured,
        }
        for text, measured in (evaluation.items() if isinstance(evaluation, dict) else ())
        if isinstance(measured, dict) and get_entries(measured, "ranges")
    ]
    return results | {"models": [entry]}, records
