"""`new-llm eval long`: does the memory help on long documents?"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from new_llm.cli.evaluation.common import check_picture, finish, show_progress
from new_llm.config.errors import UserError
from new_llm.config.long_documents import LongDocumentsConfig
from new_llm.config.measurement import SubjectConfig, TextConfig

if TYPE_CHECKING:
    from new_llm.evaluation.long_documents import Baseline
    from new_llm.experiments.subject import Subject


@dataclasses.dataclass(kw_only=True)
class LongDocuments:
    """Perplexity of long documents by distance from their start, three ways on the same weights.

    The memory is carried along the document; it is reset at every segment; it is that of another document. The
    differences, with paired bootstrap intervals over documents, say whether memory helps. The text is --data.source,
    or the validation documents of the run. Ctrl-C ends the measurement with the result so far, labelled as partial.
    """

    subject: Annotated[SubjectConfig, arg(name="")]
    data: TextConfig = dataclasses.field(default_factory=TextConfig)
    options: Annotated[LongDocumentsConfig, arg(name="")] = dataclasses.field(default_factory=LongDocumentsConfig)
    out: Path | None = None
    """The JSON file to write; None: a file in the run's folder, under evaluations."""
    picture: Path | None = None
    """The picture to draw, *.svg or *.png; None: beside the JSON file."""

    def __post_init__(self) -> None:
        check_picture(self.picture)

    def run_command(self) -> int:
        """Measure, print and write; returns the exit code."""
        from new_llm.experiments.evaluation_record import describe_evaluation, plain_settings
        from new_llm.experiments.evaluation_text import load_evaluation_text
        from new_llm.experiments.memory_measurements import measure_long_documents
        from new_llm.experiments.subject import load_subject
        from new_llm.report.distance_plot import plot_distance
        from new_llm.training.signals import catch_stop_signals

        options = self.options
        subject = load_subject(self.subject)
        baselines, facts = load_baselines(subject, self.subject, options)
        text = load_evaluation_text(subject, self.data)
        with catch_stop_signals() as should_stop, show_progress("long documents") as on_progress:
            result = measure_long_documents(
                subject, text.split, options, baselines, on_progress=on_progress, should_stop=should_stop
            )
        values = result.to_dict()
        for name, found in facts.items():
            values["baselines"][name] |= {"subject": found}
        settings = plain_settings(self.data, options)
        record = describe_evaluation("long", subject, text.info, settings, values, is_complete=result.is_complete)
        print_result(record)
        return finish(record, subject, self.out, plot_distance, self.picture)


def load_baselines(
    subject: "Subject", config: SubjectConfig, options: LongDocumentsConfig
) -> "tuple[list[Baseline], dict[str, dict[str, Any]]]":
    """The other models, and what they are by their names in the result.

    A baseline without memory that is read in segments is cut as the subject is, where its own segments are not shorter;
    one with a memory keeps its own.

    Raises:
        UserError: one can't be loaded, has another tokenizer, or a stride that is longer than its window.
    """
    from new_llm.evaluation.long_documents import Baseline
    from new_llm.evaluation.recall_scoring import has_memory
    from new_llm.experiments.memory_measurements import check_tokenizer
    from new_llm.experiments.subject import load_subject

    specs = [(spec, False) for spec in options.baselines] + [(spec, True) for spec in options.window_baselines]
    shorts = [shorten_spec(spec) for spec, _ in specs]
    baselines: list[Baseline] = []
    facts: dict[str, dict[str, Any]] = {}
    for (spec, has_windows), short in zip(specs, shorts, strict=True):
        flag = "--window-baselines" if has_windows else "--baselines"
        run, model_name = split_spec(spec)
        other = load_subject(SubjectConfig(run=run, model=model_name, device=config.device, precision=config.precision))
        check_tokenizer(other, subject, f"{flag} {spec}", subject.label)
        model: Any = other.model
        stride = None
        if has_windows:
            stride = options.choose_window_stride(model.segment_length, "--window-stride", spec)
        elif not has_memory(model):
            model.segment_length = min(model.segment_length, subject.model.segment_length)
        kind = "windows" if has_windows else "segments"
        is_known = sum(shorts[i] == short for i in range(len(specs)) if specs[i][1] == has_windows) > 1
        name = f"{spec if is_known else short}, {kind} of {model.segment_length:,}"
        if name in facts:
            raise UserError(f"{flag} {spec}: is named twice")
        baselines.append(Baseline(name, model, stride, other.device, other.autocast))
        facts[name] = other.facts | {"segment_length": model.segment_length}
    return baselines, facts


def split_spec(spec: str) -> tuple[str, str | None]:
    """RUN:MODEL as its two parts; RUN alone has no model."""
    run, colon, model = spec.rpartition(":")
    return (run, model) if colon and run and model and not Path(spec).exists() else (spec, None)


def shorten_spec(spec: str) -> str:
    """The last part of the run's path, with the model."""
    run, model = split_spec(spec)
    return Path(run).name + (f":{model}" if model else "")


def print_result(record: dict[str, Any]) -> None:
    """Perplexities, and what the carried memory is worth against each other way, by distance."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from new_llm.report.distance_plot import WAYS, name_range

    result = record["result"]
    rows = [*((name_range(entry), entry) for entry in result["ranges"]), ("all", result["overall"])]
    names: list[str] = list(result["overall"]["perplexity"])
    share = f"{100 * result['confidence']:g} %"
    partial = "" if record["status"] == "complete" else " (partial)"
    others = [name for name in names if name != "carried"]
    console = Console()
    perplexities = Table(title=Text(f"perplexity of {record['subject']['path']} by distance from the start{partial}"))
    changes = Table(title=Text(f"perplexity with the memory carried, against each other way, with {share} intervals"))
    for table, columns in ((perplexities, names), (changes, others)):
        table.add_column("distance")
        table.add_column("documents", justify="right")
        if table is perplexities:
            table.add_column("tokens", justify="right")
        for name in columns:
            table.add_column(Text(WAYS.get(name, name)), justify="right", overflow="fold")
    for place, entry in rows:
        cells = [place, f"{entry['num_documents']:,}"]
        values = [entry["perplexity"].get(name) for name in names]
        perplexities.add_row(*cells, f"{entry['num_tokens']:,}", *(describe_perplexity(value) for value in values))
        changes.add_row(*cells, *(describe_change(entry["differences"].get(name)) for name in others))
    console.print(perplexities)
    console.print(changes)
    if "foreign" not in names:
        console.print("one document alone: there is no other document's memory, and no interval")


def describe_perplexity(found: dict[str, Any] | None) -> str:
    """The value; a dash where the way has not been measured."""
    return "–" if found is None else f"{found['value']:.3f}"


def describe_change(found: dict[str, Any] | None) -> str:
    """The relative change of perplexity with its interval, and the difference in nats a token."""
    if found is None:
        return "–"
    relative, nats = found["relative"], found["nats"]
    interval = "" if relative["low"] is None else f"\n{100 * relative['low']:+.2f} to {100 * relative['high']:+.2f} %"
    return f"{100 * relative['value']:+.2f} %{interval}\n{nats['value']:+.4f} nats"
