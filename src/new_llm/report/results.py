"""Read runs (results.json and later evaluations), and group their models into the series of a report.

Any part of a file may be missing; a part of unexpected form is an error (`refuse_other_forms`). Models that differ only
in their seed form one series.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from new_llm.charts import Chart
from new_llm.config import UserError
from new_llm.config.evaluation import EVALUATIONS_FOLDER, RECORD_VERSION, RESULTS_VERSION
from new_llm.config.files import read_json_file, read_mapping
from new_llm.config.loading import describe_own_error, flatten_settings, is_user_name
from new_llm.config.model import COMPONENTS
from new_llm.config.terminal import make_line
from new_llm.data.hub import describe_failure
from new_llm.evaluation import MEASURES, Column, ModelResult, ask_measure
from new_llm.evaluation.statistics import Comparison, DocumentLosses, compare_models
from new_llm.formats import MISSING, format_number, format_plural

OWN_TEXT = "validation documents"
"""The name of the text on which a run measures its own models."""


def load_results(path: Path) -> dict[str, Any]:
    """Read a results.json or a run folder's; any part except `schema_version` may be missing.

    Raises:
        UserError: the file is missing, not a JSON mapping, of another schema version, or its models are not a list.
    """
    file = path / "results.json" if path.is_dir() else path
    results = read_mapping(file)
    version = results.get("schema_version")
    if version != RESULTS_VERSION or isinstance(version, bool):
        found = "no schema_version" if version is None else f"schema_version {version!r}"
        raise UserError(f"{file}: {found}; this version of new-llm reads schema_version {RESULTS_VERSION}")
    if not isinstance(results.get("models", []), list):
        raise UserError(f"{file}: models: expected a list, found {type(results['models']).__name__}")
    return results


@dataclass(frozen=True)
class Measured:
    """One measurement of a model on a text; if it has no command, the run itself made it."""

    measure: str
    model: str
    text: str
    result: dict[str, Any]
    is_complete: bool = True
    created: str = ""
    command: str = ""


@dataclass(frozen=True)
class Run:
    """One run's results, later evaluations (oldest first), and notes on what could not be read."""

    results: dict[str, Any]
    evaluations: tuple[Measured, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The run's name."""
        return make_line(self.results.get("name") or "experiment")

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The entries of the models in the results."""
        return self.results.get("models") or []


def name_model(entry: dict[str, Any]) -> str:
    """A model's name in its run."""
    return make_line(entry.get("model_type") or "unnamed")


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs, each given as a folder or a results.json; duplicates are an error."""
    files = [path / "results.json" if path.is_dir() else path for path in paths]
    for index, file in enumerate(files):
        if any(file.resolve() == other.resolve() for other in files[:index]):
            raise UserError(f"{paths[index]}: this run is given twice")
    return [make_run(load_results(file), file.parent) for file in files]


def make_run(results: dict[str, Any], folder: Path | None = None) -> Run:
    """A run from its results, with the later evaluations in its folder."""
    # Normalise results that were not read from a file: lists for tuples, strings for other objects, null for NaN.
    results = json.loads(json.dumps(results, default=str), parse_constant=lambda _: None)
    evaluations, notes = read_evaluations(folder / EVALUATIONS_FOLDER) if folder else ([], [])
    loaded = {f"{type(one).__module__}:{type(one).__qualname__}" for one in MEASURES.values()}
    for name in get_value(results, "config", "eval", "measures") or ():
        if is_user_name(name) and name not in loaded:
            notes.append(
                f"Figures of {make_line(name)} are left out: code named only in a run's files is not loaded; use "
                "--measures."
            )
    run = Run(results, tuple(evaluations))
    for entry in run.entries:
        refused = (entry.get("not_measured") or {}).items()
        notes += [make_line(f"{name_model(entry)}: {name} was not measured: {line}") for name, line in refused]
        for name, result in (entry.get("evaluation") or {}).items():
            try:
                MEASURES[name].columns(result)
            except Exception as error:  # report it for a user's own measure; unknown results are just left out
                if told := describe_own_error(error):
                    notes.append(make_line(f"{name_model(entry)}: columns of {name} are left out: {told}"))
    return replace(run, notes=tuple(notes))


@contextmanager
def refuse_other_forms(runs: Sequence[Path]) -> Iterator[None]:
    """While reporting on these runs: turn errors due to unexpected content of their files into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        names = ", ".join(map(str, runs))
        raise UserError(f"{names}: unexpected content in its files: {describe_failure(error)}") from error


def read_evaluations(folder: Path) -> tuple[list[Measured], list[str]]:
    """The evaluations in a folder, oldest first, and notes on those that could not be read."""
    found: list[tuple[Measured, str]] = []
    texts: dict[str, set[tuple[str, str]]] = {}  # sources and fingerprints of the texts of a name
    notes: list[str] = []
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            record = read_json_file(file)
            if record["record_version"] != RECORD_VERSION:
                raise ValueError(record["record_version"])
            measured = Measured(  # of a kind with several protocols, each is a measure
                measure=make_line(record["result"].get("protocol") or record["kind"]),
                model=make_line(record["subject"].get("model") or ""),
                text=name_text(get_value(record, "text", "source"), record["subject"]),
                result=record["result"],
                is_complete=record["status"] != "partial",
                created=record["created"],
                command=make_line(record["command"]),
            )
            source, fingerprint = (str(get_value(record, "text", key)) for key in ("source", "source_fingerprint"))
            texts.setdefault(measured.text, set()).add((source, fingerprint))
            found.append((measured, source))
        except UserError:
            notes.append(f"The evaluation {make_line(file.name)} could not be read and is left out.")
        except (LookupError, TypeError, ValueError):
            notes.append(f"The evaluation {make_line(file.name)} has an unknown form and is left out.")
    twins = {text for text, known in texts.items() if all(len(set(part)) > 1 for part in zip(*known, strict=True))}
    named = (replace(one, text=make_line(f"{one.text} ({path})")) if one.text in twins else one for one, path in found)
    return sorted(named, key=lambda one: one.created), notes


def name_text(source: str | None, subject: dict[str, Any]) -> str:
    """The name of a measured text, which has its own columns; a model with a cache or an adapter has others again."""
    prefix, cache = f"{OWN_TEXT} of ", subject.get("cache") or {}
    text = OWN_TEXT if source is None else Path(source.removeprefix(prefix)).name
    text = prefix + text if (source or "").startswith(prefix) else text
    order, states = cache.get("ngram_order"), cache.get("num_states")
    parts = [format_plural(states, "state")] if states else []
    parts += [COMPONENTS[1 + order]] if order else []
    parts += ["longest match"] if cache.get("longest_match") else []
    text += f", with a cache of {', '.join(parts)}" if parts else ""
    return make_line(f"{text}, with an adapter" if subject.get("parallel_adapter") else text)


def get_value(entry: Any, *keys: str) -> Any:
    """Follow keys through nested mappings; None if one is missing."""
    for key in keys:
        entry = None if entry is None else entry.get(key)
    return entry


def get_gates(entry: dict[str, Any]) -> dict[str, list[float]]:
    """The gates of each layer's heads, from a model's entry or a line of its steps log; nulls are left out."""
    layers = (entry.get("gates") or {}).items()
    found = {make_line(layer): [gate for gate in gates if gate is not None] for layer, gates in layers}
    return {layer: gates for layer, gates in found.items() if gates}


# The models of a report


Place = tuple[str, str]
"""The name of a measure, and the text on which it was made."""
# Settings that do not make a different model.
INCIDENTAL = {"name", "models", "seed", "device", "runs_dir", "out", "data.cache_dir", "model.recipe"}


@dataclass(frozen=True)
class Member:
    """One trained model: its run, and its entry in the run's results."""

    run: Run
    entry: dict[str, Any]

    @property
    def seed(self) -> Any:
        """The seed it was trained with; None: unknown."""
        return get_value(self.run.results, "config", "seed")

    @cached_property
    def measured(self) -> dict[Place, Measured]:
        """The newest complete measurement by each measure on each text."""
        own, model = self.entry.get("evaluation") or {}, name_model(self.entry)
        found = [Measured(name, model, OWN_TEXT, result) for name, result in own.items() if result]
        found += [one for one in self.run.evaluations if one.model == model and one.is_complete]
        return {(one.measure, one.text): one for one in found}


@dataclass(frozen=True)
class Series:
    """One model of the report; its members differ only in their seeds."""

    index: int
    name: str
    settings: dict[str, Any]
    members: tuple[Member, ...]

    def find_results(self, place: Place) -> dict[Any, dict[str, Any]]:
        """The results of a measure on a text, by seed."""
        found = {member.seed: member.measured.get(place) for member in self.members}
        return {seed: measured.result for seed, measured in found.items() if measured is not None}


def compute_mean(values: Sequence[float]) -> float:
    """The mean of at least one finite number, without overflow."""
    return math.fsum(value / len(values) for value in values)


def compute_spread(values: Sequence[float]) -> float:
    """The standard deviation of at least two finite numbers; may overflow to infinity."""
    with np.errstate(all="ignore"):
        return float(np.std(values, ddof=1))


def group_series(runs: Sequence[Run]) -> list[Series]:
    """Group the models of all runs that differ only in their seed, in order of appearance."""
    groups: list[tuple[str, dict[str, Any], list[Member]]] = []  # (type, settings, members)
    for run in runs:
        for entry in run.entries:
            name, settings, member = name_model(entry), describe_settings(run, entry), Member(run, entry)
            for other, known, members in groups:
                is_other_seed = member.seed is not None and member.seed not in [one.seed for one in members]
                if is_other_seed and name == other and settings == known:
                    members.append(member)
                    break
            else:
                groups.append((name, settings, [member]))
    types, names = [model_type for model_type, *_ in groups], list[str]()
    for model_type, _, members in groups:  # unique names: the type, and if necessary the run's name and a number
        base = f"{model_type}, {members[0].run.name}" if types.count(model_type) > 1 else model_type
        numbered = (base if number == 1 else f"{base} ({number})" for number in count(1))
        names.append(next(name for name in numbered if name not in names))
    return [Series(i, names[i], settings, tuple(members)) for i, (_, settings, members) in enumerate(groups)]


def describe_settings(run: Run, entry: dict[str, Any]) -> dict[str, Any]:
    """The settings that define a model, by dotted name, without options that only other models of its run have."""
    taken = flatten_settings({"model": entry.get("options")})
    all_options = {key for other in run.entries for key in flatten_settings({"model": other.get("options")})}
    settings = flatten_settings(run.results.get("config"))
    own = {key: value for key, value in settings.items() if key not in INCIDENTAL | all_options} | taken
    return {key: value for key, value in own.items() if value is not None}


def say_setting(value: Any) -> str:
    """A setting's value as text in a table."""
    if value is None:
        return MISSING
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def list_differences(series: Sequence[Series]) -> list[tuple[str, list[str]]]:
    """(setting, value for each model) for each setting in which models differ; a dash if a model does not have it."""
    rows = {key: [one.settings.get(key) for one in series] for every in series for key in every.settings}
    differing = [(key, values) for key, values in rows.items() if any(value != values[0] for value in values)]
    return [(key, [say_setting(value) for value in values]) for key, values in differing]


# Their results


def list_places(series: Sequence[Series]) -> list[Place]:
    """The measures and texts of all results: the run's own text first, then in the order of the fullest results."""
    measured = [member.measured for one in series for member in one.members]
    found = dict.fromkeys(place for one in sorted(measured, key=len, reverse=True) for place in one)
    texts = sorted({text for _, text in found}, key=lambda text: (text != OWN_TEXT, text))
    return [place for text in texts for place in found if place[1] == text and place[0] in MEASURES]


def list_results(series: Sequence[Series], place: Place) -> list[ModelResult]:
    """The results of a measure on a text, one per model and seed; those of one model have the same name."""
    return [ModelResult(one.name, result) for one in series for result in one.find_results(place).values()]


def name_section(title: str, place: Place) -> str:
    """The heading of a measure's results on a text; names the text unless it is the run's own."""
    return title[:1].upper() + title[1:] + ("" if place[1] == OWN_TEXT else f": {place[1]}")


def write_value(column: Column, value: float) -> str:
    """A number in its column's format; plain if that fails or the number is not finite."""
    try:
        return make_line(column.format(value)) if math.isfinite(value) else format_number(value)
    except Exception:  # a user's own format
        return format_number(value)


def describe(measure: str, result: dict[str, Any]) -> str:
    """A measure's result in a sentence; empty if it has none."""
    return make_line(ask_measure(measure, "describe", result, ""))


def draw_measure(results: Sequence[ModelResult], place: Place) -> list[Chart]:
    """A measure's charts, without results that it can't draw."""
    drawn = ask_measure(place[0], "charts", results, [])
    readable = [result for result in results if not drawn and ask_measure(place[0], "charts", [result], [])]
    return drawn or ask_measure(place[0], "charts", readable, [])


def compare(
    one: Mapping[Any, Any], other: Mapping[Any, Any], of: tuple[str, str], against: tuple[str, str] | None = None
) -> Comparison | None:
    """Compare two models, paired by seed and document; None if they were not measured on the same documents.

    Args:
        one: one model's results by seed.
        other: the other model's.
        of: the measure and the way of reading whose losses are compared.
        against: the same for the other model; None: as `of`.
    """

    def read(results: Mapping[Any, Any], measure: str, way: str) -> dict[Any, DocumentLosses]:
        found = {seed: ask_measure(measure, "losses", result, {}).get(way) for seed, result in results.items()}
        return {seed: losses for seed, losses in found.items() if losses is not None}

    return compare_models(read(one, *of), read(other, *(against or of)))


def list_unknown(series: Sequence[Series]) -> list[str]:
    """Measures in the results that this version does not know."""
    names = {name for one in series for member in one.members for name, _ in member.measured}
    return sorted(make_line(name) for name in names if name not in MEASURES)
