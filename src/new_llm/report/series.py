"""Which models of which runs are one: the same type and configuration, trained with several seeds."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from new_llm.config.model import SIZES, PythiaConfig
from new_llm.experiments.config import ExperimentConfig, list_option_fields
from new_llm.report.results import compute_mean, get_entries, get_finite, get_value
from new_llm.report.runs import Run

ANYTIME = {
    "model.recipe",
    "name",
    "models",
    "seed",
    "device",
    "runs_dir",
    "out",
    "data.cache_dir",
}  # what makes no other model
OPTIONS = {f"model.{name}" for name in list_option_fields()}
MAX_LINES = 2000  # log lines that are read of one training, evenly; more are no finer on a screen
MAX_NAMED = 2  # settings that a name holds; more are in the table of differences


@dataclass(frozen=True)
class Member:
    """One trained model."""

    run: Run
    entry: dict[str, Any]
    """Its entry in the run's results."""

    @property
    def seed(self) -> Any:
        """The seed it was trained with; None: unknown."""
        return get_value(self.run.results, "config", "seed")


@dataclass(frozen=True)
class Series:
    """One model of the report: its members differ by their seeds alone."""

    index: int
    name: str
    model_type: str
    settings: dict[str, Any]
    members: tuple[Member, ...]

    def collect(self, *keys: str) -> list[float]:
        """The finite numbers at the keys of the members' entries."""
        found = [get_finite(member.entry, *keys) for member in self.members]
        return [value for value in found if value is not None]

    def mean(self, *keys: str) -> float | None:
        """Their mean; None where there are none."""
        values = self.collect(*keys)
        return compute_mean(values) if values else None

    def by_seed(self, *keys: str) -> dict[Any, float]:
        """The numbers of the members whose seed is known."""
        found = {member.seed: get_finite(member.entry, *keys) for member in self.members if is_seed(member.seed)}
        return {seed: value for seed, value in found.items() if value is not None}


def is_seed(value: Any) -> bool:
    """Whether a value can tell one training from another."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def group_series(runs: Sequence[Run]) -> list[Series]:
    """The models of all runs, those that differ by their seed alone together, in the order they are met."""
    groups: list[tuple[str, dict[str, Any], list[Member]]] = []
    for run in runs:
        for entry in get_entries(run.results, "models"):
            model_type = " ".join(str(entry.get("model_type") or "unnamed").split())
            settings = describe_settings(run.results, model_type)
            member = Member(run, entry)
            for other_type, other, members in groups:
                is_same = model_type == other_type and settings == other
                if is_same and is_seed(member.seed) and member.seed not in [known.seed for known in members]:
                    members.append(member)
                    break
            else:
                groups.append((model_type, settings, [member]))
    names = name_groups(groups)
    return [
        Series(index, names[index], model_type, settings, tuple(members))
        for index, (model_type, settings, members) in enumerate(groups)
    ]


def describe_settings(results: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The settings that make this model, by their dotted names, and the options that its type takes.

    What an older configuration lacks has its default.
    """
    config = results.get("config")
    if not isinstance(config, dict):
        return {}
    settings = flatten_settings(config)
    if results.get("kind") is None:
        size = SIZES.get(str(settings.pop("model.size", None)), {})
        settings = DEFAULTS | {f"model.{name}": value for name, value in size.items()} | settings
    kept = {key: value for key, value in settings.items() if key not in ANYTIME | OPTIONS}
    entries = [entry for entry in get_entries(results, "models") if entry.get("model_type") == model_type]
    options = entries[0].get("options") if entries else None
    return kept | {f"model.{name}": value for name, value in (options or {}).items()}


def flatten_settings(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.batch_size": 4, …} of nested mappings."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


DEFAULTS = flatten_settings(
    json.loads(json.dumps(ExperimentConfig().to_dict())) | {"model": dataclasses.asdict(PythiaConfig())}
)


def name_groups(groups: Sequence[tuple[str, dict[str, Any], list[Member]]]) -> list[str]:
    """A name of its own for each group: its type; where that is not enough, what is special about it."""
    names: list[str] = []
    for model_type, settings, members in groups:
        same = [other for other_type, other, _ in groups if other_type == model_type]
        changed = [key for key in settings if any(other.get(key) != settings[key] for other in same)]
        name = model_type
        if len(same) > 1:
            said = ", ".join(f"{key.rsplit('.', 1)[-1]} {say_setting(settings[key])}" for key in changed)
            runs = {id(member.run) for _, _, all_members in groups for member in all_members}
            if 0 < len(changed) <= MAX_NAMED:
                name = f"{model_type}, {said}"
            elif len(runs) > 1:
                name = f"{model_type}, {members[0].run.name}"
        number = 1
        while (name if number == 1 else f"{name} ({number})") in names:
            number += 1
        names.append(name if number == 1 else f"{name} ({number})")
    return names


def say_setting(value: Any) -> str:
    """A setting's value in a table or a name."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def list_differences(series: Sequence[Series]) -> list[tuple[str, list[str]]]:
    """(setting, its value for each model) of the settings in which models differ; a dash: it takes none."""
    keys = list(dict.fromkeys(key for one in series for key in one.settings))
    missing = object()
    rows = []
    for key in keys:
        values = [one.settings.get(key, missing) for one in series]
        if any(value != values[0] for value in values):
            rows.append((key, ["—" if value is missing else say_setting(value) for value in values]))
    return rows


Find = Callable[[dict[str, Any]], Any]


def merge_lines(series: Series, find: Find, key: str) -> list[tuple[float, list[dict[str, Any]]]]:
    """Log lines of the members side by side.

    Args:
        series: the model.
        find: gives the lines of an entry.
        key: what lines that belong together have in common, a number.

    Returns:
        (the number, a line a member), rising, of those that all members with lines have; about `MAX_LINES` at most.
    """
    logs: list[dict[float, dict[str, Any]]] = []
    for member in series.members:
        lines = {value: line for line in find(member.entry) if (value := get_finite(line, key)) is not None}
        if lines:
            logs.append(lines)
    if not logs:
        return []
    common = set(logs[0]).intersection(*logs[1:])
    chosen = sorted(common)
    step = math.ceil(len(chosen) / MAX_LINES) or 1
    return [(value, [log[value] for log in logs]) for value in (*chosen[:-1:step], *chosen[-1:])]
