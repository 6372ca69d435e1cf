"""What a measure is. One file per measure: what it scores, its result, its columns in the tables, its charts.

A measure is a class with a name, registered by `register_measure`. The experiment's console, `results.json`, the report
and studies learn of it from there: `results["models"][i]["evaluation"][name]` is what `run` returned, and the tables
show its `columns`, the pages its `charts` and the sentence of `describe`. A measure in a module of your own is taken by
name: `--eval.measures sliding reversal my_module:MyMeasure`.
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
        name: what it is called in the result.
        model: one with the same tokenizer.
        stride: None: documents are read in consecutive segments, its memory, if it has one, carried; else in windows
            as long as its segment, so many tokens from one to the next, each from an empty memory.
        autocast: makes the context in which it computes.
        facts: plain values that say which model it is, for the result.
    """

    name: str
    model: LanguageModel
    stride: int | None = None
    autocast: Autocast = contextlib.nullcontext
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingData:
    """What a model was trained on; only the doctor asks.

    Attributes:
        shapes: how batches are cut from them, one shape per curriculum stage.
        pairs: the reversal pairs whose forward sentences were trained on; empty if there were none.
        differences: where the run's records differ from the data found now, one sentence each.
        facts: fingerprints that agree with the run's records.
    """

    train: TokenSplit
    validation: TokenSplit
    shapes: tuple[BatchShape, ...]
    order: Literal["stream", "shuffled"]
    seed: int
    pairs: tuple[ReversalPair, ...]
    differences: tuple[str, ...]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A trained model and everything that a measure may need to measure it.

    Attributes:
        model: in evaluation mode, on its device.
        split: the documents to measure on, tokenised with it.
        settings: the eval section of the configuration.
        seq_length: tokens of a training sample; the position measure cuts documents into samples of this length.
        seed: of random choices, e.g. of bootstrap resamples.
        autocast: makes the context in which the model computes.
        processes: those that share the work; every one of them calls the measure and gets the whole result.
        on_progress: called with what is done so far and what there is to do in all.
        should_stop: asked after each batch; once it says True, the result is of what has been scored by then.
        baselines: other models that score the same long documents.
        training: what the model was trained on; None: unknown.
        facts: plain values about model and data, e.g. the run's data record.
        shared: what a measure leaves, under its name, for those that run after it, so that nothing is scored twice.
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
        """How measures of perplexity read the documents."""
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
    """One figure of a model: a cell of the summary table, of the console's and the report's alike.

    Attributes:
        key: names the figure within its measure.
        title: the column's heading.
        value: a number, or a word; None: there is none, and the cell stays empty.
        format: writes a number.
        better: which values win, so that the best one is marked; None: neither.
        group: heading over neighbouring columns.
        error: standard error, shown behind the value as ±.
        low: lower end of the interval, shown on request.
        high: upper end.
        hint: a longer explanation of this value, shown on request.
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
    """Figures in more detail than the summary's, for one model: a row per range, length, relation or check.

    Attributes:
        title: what it shows.
        rows: each row's name and its figures.
        is_for_studies: whether a study compares its variants by these figures, too.
    """

    title: str
    rows: list[tuple[str, list[Column]]]
    is_for_studies: bool = False


class ModelResult(NamedTuple):
    """What a measure found for one model.

    Attributes:
        name: what readers know the model by.
        result: what `Measure.run` returned, as it was read from JSON.
    """

    name: str
    result: dict[str, Any]


class Measure(ABC):
    """What can be measured of a trained model. `run` is the only method that must be defined.

    Results are read back from JSON by later versions and by others' tools, so `columns`, `charts` and `describe` are
    given only results that have this measure's form, but must not rely on their model being at hand.
    """

    name: ClassVar[str]
    """The key in `results.json` and in `EvalConfig.measures`."""
    title: ClassVar[str]
    """What readers know the measure by."""
    can_stop: ClassVar[bool] = False
    """Whether `run` asks `Subject.should_stop` and says in `is_complete` that its result is partial."""

    @abstractmethod
    def run(self, subject: Subject) -> dict[str, Any] | None:
        """Measure; plain values for JSON. None: it does not apply to this model or text, and leaves no result."""

    def columns(self, result: dict[str, Any]) -> list[Column]:
        """The figures that the summary table shows of one model."""
        return []

    def losses(self, result: dict[str, Any]) -> dict[str, DocumentLosses]:
        """Each document's loss by way of reading, by which two models are compared; the model's own is first."""
        return {}

    def contrasts(self, result: dict[str, Any]) -> dict[str, tuple[DocumentLosses, DocumentLosses]]:
        """By name two shares of hits, of a document's questions: a model is compared with itself or with a guess."""
        return {}

    def charts(self, results: Sequence[ModelResult]) -> list[Chart]:
        """The charts that compare the models."""
        return []

    def texts(self, results: Sequence[ModelResult]) -> list[ShadedText]:
        """Passages to show, with each token shaded or with several continuations."""
        return []

    def describe(self, result: dict[str, Any]) -> str:
        """The result in one sentence; empty: there is nothing to say."""
        return ""

    def tables(self, result: dict[str, Any]) -> list[Table]:
        """More figures of one model, which `new-llm eval` prints below the columns."""
        return []

    def notes(self, result: dict[str, Any]) -> list[str]:
        """What else the reader of one result should know, a line each."""
        return []


def to_plain(value: Any) -> Any:
    """Dataclasses and named tuples, nested in any way, as dicts and lists for JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: to_plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, tuple) and (names := getattr(value, "_fields", None)):
        return {name: to_plain(one) for name, one in zip(names, value, strict=True)}
    if isinstance(value, dict):
        return {key: to_plain(one) for key, one in value.items()}
    return [to_plain(one) for one in value] if isinstance(value, list | tuple) else value


MEASURES: dict[str, Measure] = {}
"""The registered measures by name. Tables and pages show them in the order of `EvalConfig.measures`."""

MeasureKind = TypeVar("MeasureKind", bound=Measure)


def register_measure(kind: type[MeasureKind]) -> type[MeasureKind]:
    """Make a class known by its `name`.

    Raises:
        ValueError: another class has the name.
    """
    known = type(MEASURES.get(kind.name, kind()))
    if len({(one.__module__, one.__qualname__) for one in (known, kind)}) > 1:  # those of a reloaded module match
        raise ValueError(f"measure {kind.name!r} is registered by {known.__module__} already")
    MEASURES[kind.name] = kind()
    return kind


def find_measures(names: Iterable[str]) -> list[Measure]:
    """The measures of some names, `module:Class` among them, each once.

    Raises:
        UserError: an unknown name, or a class that is no measure.
    """
    found: dict[str, Measure] = {}
    for name in names:
        if ":" in name:
            kind = load_by_name(name, "a measure")
            if not (isinstance(kind, type) and issubclass(kind, Measure)):
                raise UserError(f"eval.measures: {name} is not a subclass of new_llm.evaluation.Measure")
            if inspect.isabstract(kind) or not all(hasattr(kind, needed) for needed in ("name", "title")):
                raise UserError(f"eval.measures: {name}: a measure has a name, a title, and a method run")
            try:
                register_measure(kind)
            except ValueError as error:
                raise UserError(f"eval.measures: {name}: {error}") from None
            name = kind.name
        if name not in MEASURES:
            known = ", ".join(MEASURES)
            raise UserError(f"eval.measures: unknown measure {name!r}; known are {known}, and module:Class of your own")
        found[name] = MEASURES[name]
    return list(found.values())


def load_own_measures(names: Iterable[str]) -> list[str]:
    """Register the measures of a user's own modules among some names.

    Returns:
        For each that can't be loaded, a line that says why.
    """
    lines: list[str] = []
    for name in filter(is_user_name, names):
        try:
            find_measures([name])
        except UserError as error:
            lines.append(f"Figures of a measure are left out: {error}.")
    return lines


def run_measure(one: Measure, subject: Subject) -> dict[str, Any] | None:
    """What a measure finds, which is plain.

    Raises:
        UserError: what the measure refuses; of a user's own measure any error.
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
        raise UserError(f"its result is not made of plain values: {error}") from None
    if not isinstance(result, dict | None):
        raise UserError(f"run returned a value of type {type(result).__name__} in place of a dictionary")
    return result


def ask_measure(name: str, method: str, given: Any, default: Any) -> Any:
    """What a method of a measure says of results; the default where it can't read them, or says what is no answer.

    Results are anyone's JSON, and a measure of a user's own may have bugs: neither may cost a finished run its report.
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
    """Measure a model: the result of each measure by its name, plain values throughout.

    Args:
        names: the measures; None: `EvalConfig.measures`.
        say: told what is measured next.
        refused: takes the reason of each measure that the model or the text does not allow, in place of an error: a
            text without long documents does not end an experiment that has been trained.

    Raises:
        UserError: an unknown measure, or what a measure itself refuses.
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
