"""Reading runs: results.json, and the evaluations made of their models since. Any value may be missing or wrong."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from new_llm.config import UserError
from new_llm.config.evaluation import EVALUATIONS_FOLDER, RECORD_VERSION
from new_llm.config.files import read_json_file
from new_llm.config.loading import is_user_name
from new_llm.config.terminal import make_line
from new_llm.evaluation import MEASURES

SCHEMA_VERSION = 1
VALIDATION = "validation documents"
"""What the text is called that a run measures its models on."""


def load_results(path: Path) -> dict[str, Any]:
    """Read a results.json, or that of a run folder; any part but `schema_version` may be missing.

    Raises:
        UserError: the file is missing, not a JSON mapping, of another schema version, or its models are not a list.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        results = read_json_file(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such results file; give a run folder or its results.json") from None
    if not isinstance(results, dict):
        raise UserError(f"{file}: expected a mapping of results, found {type(results).__name__}")
    version = results.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        found = "no schema_version" if version is None else f"schema_version {version!r}"
        raise UserError(f"{file}: {found}; this version of new-llm reads schema_version {SCHEMA_VERSION}")
    if not isinstance(results.get("models", []), list):
        raise UserError(f"{file}: models: expected a list, found {type(results['models']).__name__}")
    return results


@dataclass(frozen=True)
class Measured:
    """One model measured once, on a text; without a command by its own run."""

    measure: str
    model: str
    text: str
    result: dict[str, Any]
    is_complete: bool = True
    created: str = ""
    command: str = ""


@dataclass(frozen=True)
class Run:
    """One run's results, the evaluations made since (oldest first), and notes on unreadable files."""

    results: dict[str, Any]
    evaluations: tuple[Measured, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The run's name."""
        return make_line(self.results.get("name") or "experiment")

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The models that have an entry in the results."""
        return get_entries(self.results, "models")

    def find_measured(self, entry: dict[str, Any]) -> list[Measured]:
        """What was measured of a model: by the run itself, then later; partial measurements are left out."""
        model = name_model(entry)
        own = entry.get("evaluation")
        found = [
            Measured(name, model, VALIDATION, result)
            for name, result in (own.items() if isinstance(own, dict) else ())
            if isinstance(result, dict)
        ]
        return found + [one for one in self.evaluations if one.model == model and one.is_complete]


def name_model(entry: dict[str, Any]) -> str:
    """A model's name in its run."""
    return make_line(entry.get("model_type") or "unnamed")


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read some runs, each a folder or its results.json, and each once."""
    files = [path / "results.json" if path.is_dir() else path for path in paths]
    for index, file in enumerate(files):
        if any(file.resolve() == other.resolve() for other in files[:index]):
            raise UserError(f"{paths[index]}: this run is given twice; each run is compared once")
    return [make_run(load_results(file), file.parent) for file in files]


def make_run(results: dict[str, Any], folder: Path | None = None) -> Run:
    """Results, with the evaluations that lie in the run's folder."""
    # One form, however the results were made: lists for tuples, text for what JSON has no form for.
    results = json.loads(json.dumps(results, default=str))
    evaluations, notes = read_evaluations(folder / EVALUATIONS_FOLDER) if folder else ([], [])
    names = get_value(results, "config", "eval", "measures")
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and is_user_name(name) and not is_loaded(name):
            notes.append(
                f"Figures of {make_line(name)} are left out: code that a file names is not loaded; --measures is."
            )
    for entry in get_entries(results, "models"):
        refused = get_value(entry, "not_measured")
        for measure, line in refused.items() if isinstance(refused, dict) else ():
            notes.append(make_line(f"{name_model(entry)}: {measure} was not measured: {line}"))
    return Run(results, tuple(evaluations), tuple(notes))


def is_loaded(name: str) -> bool:
    """Whether the measure that `module:Class` names is registered."""
    return any(name == f"{type(one).__module__}:{type(one).__qualname__}" for one in MEASURES.values())


def read_evaluations(folder: Path) -> tuple[list[Measured], list[str]]:
    """The evaluations in a folder, oldest first, and what could not be read."""
    found: list[Measured] = []
    notes: list[str] = []
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            record = read_json_file(file)
        except (OSError, UserError):
            notes.append(f"The evaluation {make_line(file.name)} could not be read and is left out.")
            continue
        if get_number(record, "record_version") == RECORD_VERSION and isinstance(record.get("result"), dict):
            found.append(read_record(record))
        else:
            notes.append(f"The evaluation {make_line(file.name)} has an unknown form and is left out.")
    return sorted(found, key=lambda one: one.created), notes


def read_record(record: dict[str, Any]) -> Measured:
    """One evaluation's record."""
    source = get_value(record, "text", "source")
    return Measured(
        measure=get_text(record, "result", "protocol") or get_text(record, "kind"),  # one kind has several protocols
        model=get_text(record, "subject", "model"),
        text=make_line(Path(str(source)).name if source is not None else VALIDATION),
        result=record["result"],
        is_complete=record.get("status") != "partial",
        created=get_text(record, "created"),
        command=get_text(record, "command"),
    )


def get_value(entry: Any, *keys: str) -> Any:
    """Follow keys through nested mappings; None where one is missing."""
    for key in keys:
        if not isinstance(entry, dict):
            return None
        entry = entry.get(key)
    return entry


def get_text(entry: Any, *keys: str) -> str:
    """The value at the keys as one printable line; empty where there is none."""
    value = get_value(entry, *keys)
    return "" if value is None else make_line(value)


def get_number(entry: Any, *keys: str) -> float | None:
    """The number at the keys, NaN and infinities included; None where there is none."""
    return as_number(get_value(entry, *keys))


def get_finite(entry: Any, *keys: str) -> float | None:
    """The finite number at the keys; None where there is none."""
    value = get_number(entry, *keys)
    return value if value is not None and math.isfinite(value) else None


def as_number(value: Any) -> float | None:
    """A value that is a number as a float; None: it isn't."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # JSON's whole numbers have no end
        return math.inf if value > 0 else -math.inf


def get_entries(entry: Any, *keys: str) -> list[dict[str, Any]]:
    """The mappings in the list at the keys; empty where there is none."""
    value = get_value(entry, *keys)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def list_numbers(value: Any) -> list[float]:
    """The finite numbers in a number or in nested lists of them."""
    if isinstance(value, list):
        return [number for item in value for number in list_numbers(item)]
    number = as_number(value)
    return [number] if number is not None and math.isfinite(number) else []


def get_gates(entry: dict[str, Any]) -> dict[str, list[float]]:
    """The gates, from 0 to 1, of each layer's heads, from a model's entry or a line of its steps log."""
    gates = entry.get("gates")
    layers = gates.items() if isinstance(gates, dict) else ()
    found = {make_line(layer): [gate for gate in list_numbers(values) if 0 <= gate <= 1] for layer, values in layers}
    return {layer: values for layer, values in found.items() if values}
