"""The interface of measures. Each measure has one file: what it scores, its result, table columns and charts.

A measure is a class registered by `register_measure`. Everything else follows: what `run` returns is stored in
`results.json` under `results["models"][i]["evaluation"][name]`; the console, the report and studies show its `columns`,
`charts` and `describe`. To use a measure from your own module, name it:
`--eval.measures sliding reversal my_module:MyMeasure`.
"""

import contextlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from tokenizers import Tokenizer

from new_llm.charts import Chart, ShadedText
from new_llm.config import EvalConfig, UserError
from new_llm.config.errors import OtherProcessError
from new_llm.config.loading import describe_own_error, is_user_name, load_by_name
from new_llm.data.batches import BatchShape
from new_llm.data.reversal_pairs import ReversalPair
from new_llm.data.tokenizer import TokenSplit
from new_llm.evaluation.scoring import Autocast, LanguageModel, Progress, Reading
from new_llm.evaluation.statistics import DocumentLosses
from new_llm.formats import format_number
from new_llm.processes import ALONE, Processes


@dataclass(frozen=True)
class Baseline:
    """Another model that scores the same tokens.

    Attributes:
        name: its key in the result.
        model: has the same tokenizer as the subject.
        stride: None: read documents in consecutive segments with its memory, if any, carried. Otherwise: read sliding
            windows as long as its segment with this stride, each from an empty memory.
        autocast: makes the context in which it computes.
        facts: plain values that identify the model in the result.
    """

    name: str
    model: LanguageModel
    stride: int | None = None
    autocast: Autocast = contextlib.nullcontext
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingData:
    """What a model was trained on; only the doctor uses it.

    Attributes:
        shapes: the shapes of its batches (see `list_shapes`).
        pairs: the reversal pairs whose forward sentences were trained on, if any.
        differences: how today's data differ from the run's records, one sentence each.
    """

    train: TokenSplit
    validation: TokenSplit
    shapes: tuple[BatchShape, ...]
    order: Literal["stream", "shuffled"]
    seed: int
    pairs: tuple[ReversalPair, ...]
    differences: tuple[str, ...]


@dataclass(frozen=True)
class Subject:
    """A trained model and everything that a measure may need.

    Attributes:
        model: on its device; measures put it into evaluation mode.
        tokenizer: the model's.
        split: the documents to measure on, encoded with the tokenizer.
        settings: the eval section of the configuration.
        seq_length: tokens per training sample, T; the position measure cuts documents into samples of this length.
        seed: for random choices, e.g. sampled continuations.
        autocast: makes the context in which the model computes.
        processes: the processes that share the work. All of them call the measure and get the whole result.
        on_progress: called with the work done so far and in all, e.g. in tokens.
        should_stop: called after each batch; once it returns True, the result covers only what was scored until then.
        baselines: other models that score the same long documents.
        training: what the model was trained on; None: unknown.
        facts: plain values about model and data, e.g. from the run's results.
        shared: values that a measure stores under its name for later measures, so that nothing is scored twice.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    split: TokenSplit
    settings: EvalConfig = field(default_factory=EvalConfig)
    seq_length: int = 256
    seed: int = 0
    autocast: Autocast = contextlib.nullcontext
    processes: Processes = ALONE
    on_progress: Progress | None = None
    should_stop: Callable[[], bool] = lambda: False
    baselines: Sequence[Baseline] = ()
    training: TrainingData | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def reading(self) -> Reading:
        """The options with which perplexity measures read documents."""
        return {
            "batch_size": self.settings.batch_size,
            "max_tokens": self.settings.max_tokens,
            "autocast": self.autocast,
            "on_progress": self.on_progress,
            "should_stop": self.should_stop,
            "processes": self.processes,
        }


@dataclass(frozen=True)
class Column:
    """One figure of a model: a cell of the summary table on the console and in the report.

    Attributes:
        key: identifies the figure within its measure.
        title: the column's heading.
        value: a number or a word; None leaves the cell empty.
        format: formats a number.
        better: whether lower or higher values are better, to mark the best one; None: neither.
        group: a heading over neighbouring columns.
        error: standard error, shown after the value as ±.
        low: lower end of the confidence interval.
        high: upper end of the confidence interval.
        hint: a longer explanation of this value.
    """

    key: str
    title: str
    value: float | str | None
    format: Callable[[float], str] = format_number
    better: Literal["lower", "higher"] | None = None
    group: str = ""
    error: float | None = None
    low: float | None = None
    high: float | None = None
    hint: str = ""


@dataclass(frozen=True)
class Table:
    """More detailed figures of one model, e.g. a row per range of positions, length or relation.

    Attributes:
        title: what it shows.
        rows: (name, figures) of each row.
        is_for_studies: whether studies also compare their variants by these figures.
    """

    title: str
    rows: list[tuple[str, list[Column]]]
    is_for_studies: bool = False


class ModelResult(NamedTuple):
    """A measure's result for one model.

    Attributes:
        name: the model's name for readers.
        result: what `Measure.run` returned, as read back from JSON.
    """

    name: str
    result: dict[str, Any]


class Measure(ABC):
    """A measurement of a trained model. Subclasses must define `name`, `title` and `run`.

    All other methods get results as read back from JSON, possibly written by another version, and without the model.
    """

    name: ClassVar[str]
    """The key in `results.json` and in `EvalConfig.measures`."""
    title: ClassVar[str]
    """The measure's name for readers."""
    can_stop: ClassVar[bool] = False
    """Whether `run` calls `Subject.should_stop` and reports in `is_complete` whether its result is complete."""

    @abstractmethod
    def run(self, subject: Subject) -> dict[str, Any] | None:
        """Measure the model. Return plain values for JSON, or None if this does not apply to the model or text."""

    def columns(self, result: dict[str, Any]) -> list[Column]:
        """Return the figures of one model for the summary table."""
        return []

    def losses(self, result: dict[str, Any]) -> dict[str, DocumentLosses]:
        """Return the losses of each document for comparing models, by way of reading; the model's main way first."""
        return {}

    def contrasts(self, result: dict[str, Any]) -> dict[str, tuple[DocumentLosses, DocumentLosses]]:
        """Return named pairs of hit rates to compare, as hits (`total_nll`) among questions (`num_tokens`)."""
        return {}

    def charts(self, results: Sequence[ModelResult]) -> list[Chart]:
        """Return charts that compare the models."""
        return []

    def texts(self, results: Sequence[ModelResult]) -> list[ShadedText]:
        """Return passages to show, with shaded tokens or with several continuations."""
        return []

    def describe(self, result: dict[str, Any]) -> str:
        """Summarise the result in one sentence; may be empty."""
        return ""

    def tables(self, result: dict[str, Any]) -> list[Table]:
        """Return more figures of one model; `new-llm eval` prints them below the columns."""
        return []

    def notes(self, result: dict[str, Any]) -> list[str]:
        """Return further lines for the reader of one result."""
        return []


def to_plain(value: Any) -> Any:
    """Convert nested dataclasses and named tuples to dicts and lists for JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: to_plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, tuple) and (names := getattr(value, "_fields", None)):
        return {name: to_plain(one) for name, one in zip(names, value, strict=True)}
    if isinstance(value, dict):
        return {key: to_plain(one) for key, one in value.items()}
    return [to_plain(one) for one in value] if isinstance(value, list | tuple) else value


MEASURES: dict[str, Measure] = {}
"""The registered measures by name. Tables and pages follow the order of `EvalConfig.measures`."""

MeasureKind = TypeVar("MeasureKind", bound=Measure)


def register_measure(kind: type[MeasureKind]) -> type[MeasureKind]:
    """Register a measure class under its `name`.

    Raises:
        ValueError: another class is registered under this name.
    """
    known = type(MEASURES.get(kind.name, kind()))
    if len({(one.__module__, one.__qualname__) for one in (known, kind)}) > 1:  # a reloaded module may register again
        raise ValueError(f"measure {kind.name!r} is already registered by {known.__module__}")
    MEASURES[kind.name] = kind()
    return kind


def find_measures(names: Iterable[str]) -> list[Measure]:
    """Find measures by name, without duplicates; a name `module:Class` is loaded and registered.

    Raises:
        UserError: a name is unknown, or a class is not a valid measure.
    """
    found: dict[str, Measure] = {}
    for name in names:
        if ":" in name:
            kind = load_by_name(name, "a measure")
            if not (isinstance(kind, type) and issubclass(kind, Measure)):
                raise UserError(f"eval.measures: {name} is not a subclass of new_llm.evaluation.Measure")
            if inspect.isabstract(kind) or not all(hasattr(kind, needed) for needed in ("name", "title")):
                raise UserError(f"eval.measures: {name}: a measure needs a name, a title and a method run")
            try:
                register_measure(kind)
            except Exception as error:  # e.g. of its constructor
                raise UserError(f"eval.measures: {name}: {describe_own_error(error) or error}") from error
            name = kind.name
        if name not in MEASURES:
            known = ", ".join(MEASURES)
            raise UserError(f"eval.measures: unknown measure {name!r}; known are {known}, and module:Class of your own")
        found[name] = MEASURES[name]
    return list(found.values())


def load_own_measures(names: Iterable[str]) -> list[str]:
    """Register those of the named measures that are in a user's own modules.

    Returns:
        For each measure that can't be loaded, a line that says why.
    """
    lines: list[str] = []
    for name in filter(is_user_name, names):
        try:
            find_measures([name])
        except UserError as error:
            lines.append(f"Figures of a measure are left out: {error}.")
    return lines


def run_measure(one: Measure, subject: Subject) -> dict[str, Any] | None:
    """Run a measure and check that its result is a dictionary of plain values, or None.

    Raises:
        UserError: the measure rejects the model or text, its result is invalid, or a user's own measure fails.
    """
    try:
        result = one.run(subject)
    except (UserError, OtherProcessError):
        raise
    except Exception as error:
        if (told := describe_own_error(error)) is None:
            raise
        raise UserError(told) from error
    try:
        json.dumps(result)
    except (TypeError, ValueError) as error:
        raise UserError(f"its result can't be written as JSON: {error}") from None
    if not isinstance(result, dict | None):
        raise UserError(f"run returned a {type(result).__name__} instead of a dictionary")
    return result


def ask_measure(name: str, method: str, given: Any, default: Any) -> Any:
    """Call a measure's method on results; return the default if it fails or returns a value of another type.

    Malformed results or bugs in a user's own measure should not prevent the report of a finished run.
    """
    try:
        found = getattr(MEASURES[name], method)(given)
    except Exception:
        return default
    return found if isinstance(found, list | tuple if default == [] else type(default)) else default


def measure(
    subject: Subject,
    names: Iterable[str] | None = None,
    say: Callable[[str], None] = lambda _: None,
    refused: dict[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run measures on a model; return their results by name, all plain values.

    Args:
        names: the measures; None: `EvalConfig.measures`.
        say: called with the title of each measure before it runs.
        refused: if given, a measure that raises a `UserError` is skipped and the message is stored here by name, so
            that, for example, a text without long documents does not abort a finished training.

    Raises:
        UserError: a measure is unknown or, without `refused`, fails.
    """
    results: dict[str, dict[str, Any]] = {}
    for one in find_measures(subject.settings.measures if names is None else names):
        say(one.title)
        try:
            with subject.processes.agree():
                result = run_measure(one, subject)
        except (UserError, OtherProcessError) as error:
            if refused is None or (isinstance(error, OtherProcessError) and not error.is_user_error):
                raise
            refused[one.name] = str(error)
            continue
        if result is not None:
            results[one.name] = result
    return results
