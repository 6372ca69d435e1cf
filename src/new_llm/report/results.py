"""results.json: reading it, taking out values that may be missing, and the one sentence that sums it up."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from new_llm.config import UserError

SCHEMA_VERSION = 1
BASELINE = "pythia"  # what every other model is compared with


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
        results = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such results file; give a run folder or its results.json") from None
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {' '.join(str(error).split())}") from None
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
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def get_finite(entry: Any, *keys: str) -> float | None:
    """The finite number at the keys; None where there is none."""
    value = get_number(entry, *keys)
    return value if value is not None and math.isfinite(value) else None


def get_entries(entry: Any, *keys: str) -> list[dict[str, Any]]:
    """The mappings in the list at the keys; empty where there is none."""
    value = get_value(entry, *keys)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


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


def named_models(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The models' entries with a name each; a repeated type is numbered."""
    named: list[tuple[str, dict[str, Any]]] = []
    seen: dict[str, int] = {}
    for entry in get_entries(results, "models"):
        name = " ".join(str(entry.get("model_type") or "unnamed").split())
        seen[name] = seen.get(name, 0) + 1
        named.append((name if seen[name] == 1 else f"{name} ({seen[name]})", entry))
    return named


@dataclass(frozen=True)
class Outcome:
    """What the results say, in words."""

    headline: str
    caveats: list[str]


def describe_outcome(results: dict[str, Any]) -> Outcome:
    """Say which model has the lowest validation perplexity, by how much, and how far to trust it."""
    named = named_models(results)
    for protocol in ("sliding", "streaming"):
        scored = [
            (value, name, get_finite(entry, "evaluation", protocol, "standard_error"))
            for name, entry in named
            if (value := get_finite(entry, "evaluation", protocol, "perplexity")) is not None
        ]
        if scored:
            break
    else:
        return Outcome("No model has been evaluated in this run.", [])
    scored.sort(key=lambda item: item[0])
    best, best_name, best_error = scored[0]
    unigram = get_finite(results, "unigram_perplexity")
    kind = "validation perplexity" if protocol == "sliding" else "streaming validation perplexity"
    missing = [name for name, _ in named if name not in {item[1] for item in scored}]
    caveats = [f"Not evaluated: {', '.join(missing)}."] if missing else []
    if len(scored) == 1:
        floor = f", {100 * best / unigram:.1f}% of the unigram's {_plain(unigram)}" if unigram else ""
        headline = f"{best_name} reaches a {kind} of {_plain(best)}{floor}."
        caveats.append("One model and one seed: nothing to compare with, and the spread between seeds is unmeasured.")
    else:
        second, second_name, second_error = scored[1]
        percent = 100 * (second - best) / second
        if percent < 0.05:
            headline = f"{best_name} and {second_name} have the same {kind}, {_plain(best)}, to within 0.05%."
        else:
            others = f"{percent:.1f}% below {second_name} ({_plain(second)})"
            for value, name, _ in scored[2:]:
                if name == BASELINE:
                    others += f" and {100 * (value - best) / value:.1f}% below {name} ({_plain(value)})"
            headline = f"{best_name} has the lowest {kind}: {_plain(best)}, {others}."
        caveats.append(_describe_spread(second - best, best_error, second_error))
    if unigram and best >= unigram:
        floor = f"No model beats the unigram perplexity of {_plain(unigram)}"
        caveats.insert(0, f"{floor}: none has learned more than how frequent tokens are.")
    return Outcome(headline, caveats)


def _describe_spread(gap: float, *errors: float | None) -> str:
    """How the gap compares with what chance in the tokens alone could do; seeds are never claimed."""
    unmeasured = "Each model was trained with one seed, so the spread between seeds is unmeasured."
    if any(not error for error in errors):
        return unmeasured
    error = math.hypot(*(error or 0.0 for error in errors))
    if gap < 2 * error:
        return f"The gap is under two standard errors of the measurement, so read it as a tie. {unmeasured}"
    return f"The gap is {gap / error:.1f} standard errors of the measurement. {unmeasured}"


def _plain(value: float) -> str:
    return f"{value:,.2f}" if value < 100 else f"{value:,.1f}"
