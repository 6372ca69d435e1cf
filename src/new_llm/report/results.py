"""results.json: reading it, and taking out values that may be missing."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from new_llm.config import UserError
from new_llm.config.bounded_files import read_json_file

SCHEMA_VERSION = 1


def load_results(path: Path) -> dict[str, Any]:
    """Read a run's results.

    Args:
        path: a results.json, or the run folder that holds one.

    Returns:
        The file's mapping. Any part but `schema_version` may be missing or empty: a run can be interrupted.

    Raises:
        UserError: the file is missing, no JSON mapping, of another schema version, or its models are no list.
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


def get_value(entry: Any, *keys: str) -> Any:
    """Follow keys through nested mappings; None where one is missing."""
    for key in keys:
        if not isinstance(entry, dict):
            return None
        entry = entry.get(key)
    return entry


def get_number(entry: Any, *keys: str) -> float | None:
    """The number at the keys, NaN and infinities included; None where there is none."""
    value = get_value(entry, *keys)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # JSON's whole numbers have no end
        return math.inf if value > 0 else -math.inf


def get_finite(entry: Any, *keys: str) -> float | None:
    """The finite number at the keys; None where there is none."""
    value = get_number(entry, *keys)
    return value if value is not None and math.isfinite(value) else None


def get_entries(entry: Any, *keys: str) -> list[dict[str, Any]]:
    """The mappings in the list at the keys; empty where there is none."""
    value = get_value(entry, *keys)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def compute_mean(values: Sequence[float]) -> float:
    """The mean of at least one finite number; huge ones don't overflow."""
    return math.fsum(value / len(values) for value in values)


def compute_spread(values: Sequence[float]) -> float:
    """The standard deviation of at least two finite numbers; infinite where a float can't hold it."""
    mean = compute_mean(values)
    most = max(abs(value - mean) for value in values)
    if most in (0.0, math.inf):
        return most
    return most * math.sqrt(math.fsum(((value - mean) / most) ** 2 for value in values) / (len(values) - 1))


def get_gates(entry: dict[str, Any]) -> dict[str, list[float]]:
    """The gates, from 0 to 1, of each layer's heads, from a model's entry or a line of its steps log."""

    def flatten(value: Any) -> list[float]:
        if isinstance(value, list):
            return [number for item in value for number in flatten(item)]
        number = get_finite({"value": value}, "value")
        return [number] if number is not None and 0 <= number <= 1 else []

    gates = get_value(entry, "gates")
    layers = {str(layer): flatten(values) for layer, values in gates.items()} if isinstance(gates, dict) else {}
    return {layer: values for layer, values in layers.items() if values}
