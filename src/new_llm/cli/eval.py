"""`new-llm eval` and `new-llm evaluate-wikitext`: measure a trained model, print and record what was found."""

import dataclasses
import hashlib
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tyro.conf import arg

from new_llm.cli.command import Command, CommandGroup
from new_llm.config.errors import UserError
from new_llm.config.evaluation import (
    DoctorConfig,
    LongDocumentsConfig,
    PerplexityConfig,
    RecallConfig,
    ReversalConfig,
    SubjectConfig,
    TextConfig,
)
from new_llm.config.terminal import open_console, print_text

if TYPE_CHECKING:
    from rich.table import Table

    from new_llm.data.reversal_pairs import ReversalPair
    from new_llm.evaluation import Baseline, PerplexityResult
    from new_llm.experiments.subject import EvaluationText, Subject

FAULT_FOUND, INTERRUPTED = 1, 130
PICTURE_ENDINGS = (".svg", ".png")
PARTIAL = {"complete": "", "partial": " (partial)"}
"""What a title says of a result's status."""
LEVELS = {"ok": "green", "warning": "yellow", "fault": "bold red", "skipped": "dim"}
"""Levels of the doctor's findings, and their styles."""
REVERSAL_TABLES = {
    "perplexity of the sentences": ("{}_perplexity", ("ratio", "gap")),
    "perplexity of the answers, given the prompt": ("{}_answer_perplexity", ("answer_ratio",)),
    "right answer first among the answers of its relation": ("{}_accuracy", ("chance_accuracy",)),
    "mean rank of the right answer": ("{}_mean_rank", ("chance_mean_rank",)),
}
"""Title of a table: the figure in both directions, and what stands beside it."""
RECALL_FIGURES = {"exact": "greedy exact match", "first": "right answer ranked first", "mean_rank": "mean rank"}
REVERSAL_HEADINGS = {"answer_ratio": "ratio", "chance_accuracy": "chance", "chance_mean_rank": "chance"}


@dataclasses.dataclass(kw_only=True)
class Measurement(Command):
    """What every measurement does: load a model, measure it, print the result and write a JSON file of it."""

    without_hub: ClassVar[str] = "name a folder by --run, and a local text by --data.source"
    subject: Annotated[SubjectConfig, arg(name="")]
    out: Path | None = None
    """The JSON file to write; None: a file in the run's folder, under evaluations."""

    def execute(self) -> int:
        """Measure, print and write; 130 where the measurement was interrupted and the result is partial."""
        from new_llm.experiments.subject import load_subject, write_evaluation

        self.check()
        subject = load_subject(self.subject)
        record = self.measure(subject)
        self.show(record)
        path = write_evaluation(record, subject, self.out)
        self.draw(record, path)
        if record["status"] == "partial":
            print("interrupted: the result is partial, and is labelled so", file=sys.stderr)
        print_text(f"results: {path}")
        return INTERRUPTED if record["status"] == "partial" else self.judge(record)

    def check(self) -> None:
        """Refuse what can be refused before anything is loaded."""

    @abstractmethod
    def measure(self, subject: "Subject") -> dict[str, Any]:
        """The record of the measurement, of `describe_evaluation`."""

    @abstractmethod
    def show(self, record: dict[str, Any]) -> None:
        """Print the result."""

    def draw(self, record: dict[str, Any], path: Path) -> None:
        """Draw the result, where there is a picture of it."""

    def judge(self, record: dict[str, Any]) -> int:
        """The exit code that a complete result asks for."""
        return 0


@dataclasses.dataclass(kw_only=True)
class PicturedMeasurement(Measurement):
    """A measurement whose result is drawn, too."""

    picture: Path | None = None
    """The picture to draw, *.svg or *.png; None: beside the JSON file."""

    def check(self) -> None:
        """Refuse a picture's name whose ending can't be drawn."""
        if self.picture is not None and self.picture.suffix not in PICTURE_ENDINGS:
            raise UserError(f"--picture: {self.picture} must end with {' or '.join(PICTURE_ENDINGS)}")

    def draw(self, record: dict[str, Any], path: Path) -> None:
        """Draw the measure's charts beside the JSON file, or where --picture says."""
        from new_llm.evaluation import MEASURES, ModelResult
        from new_llm.report import write_chart

        first = self.picture or path.with_suffix(".svg")
        name = record["subject"].get("model") or "model"
        charts = MEASURES[record["kind"]].charts([ModelResult(name, record["result"])])
        for place, chart in enumerate(charts):
            picture = first if place == 0 else first.with_name(f"{first.stem}-{chart.name}{first.suffix}")
            write_chart(chart, picture)
            print_text(f"picture: {picture}")


@dataclasses.dataclass(kw_only=True)
class Perplexity(Measurement):
    """Perplexity of a text: exp(total negative log-likelihood / tokens).

    The text is --data.source, or the validation documents of the run. Ctrl-C ends the measurement with the result so
    far, labelled as partial.
    """

    data: TextConfig = dataclasses.field(default_factory=TextConfig)
    protocol: Annotated[PerplexityConfig, arg(name="")] = dataclasses.field(default_factory=PerplexityConfig)

    def measure(self, subject: "Subject") -> dict[str, Any]:
        """Score the text, and where it is asked for the positions in a window."""
        from new_llm.evaluation import diagnose_perplexity, evaluate_positions
        from new_llm.experiments.subject import describe_evaluation, load_evaluation_text, plain_settings

        settings = self.protocol
        text = load_evaluation_text(subject, self.data)
        common = {
            "batch_size": settings.batch_size,
            "max_tokens": settings.max_tokens,
            "device": subject.device,
            "autocast": subject.autocast,
        }
        with watch(settings.protocol) as hooks:
            result = self.score(subject, text, **common, **hooks)
        positions = None
        if settings.position_edges and result.is_complete:
            lengths = {"seq_length": settings.context, "edges": settings.position_edges}
            with show_progress("by position") as on_progress:
                positions = evaluate_positions(subject.model, text.split, **lengths, **common, on_progress=on_progress)
        values = {"positions": positions, "verdict": diagnose_perplexity(result.perplexity).to_dict()}
        return describe_evaluation(
            "perplexity",
            subject,
            text.info,
            plain_settings(self.data, settings),
            result.to_dict() | values,
            is_complete=result.is_complete,
        )

    def score(self, subject: "Subject", text: "EvaluationText", **options: Any) -> "PerplexityResult":
        """The text's perplexity under the protocol.

        Raises:
            UserError: the rolling protocol needs an end-of-text token, and the tokenizer has none.
        """
        from new_llm import evaluation
        from new_llm.data.tokenizer import END_OF_TEXT

        settings, model, split = self.protocol, subject.model, text.split
        if settings.protocol == "streaming":
            return evaluation.evaluate_streaming(model, split, segments_per_call=settings.segments_per_call, **options)
        if settings.protocol == "independent":
            return evaluation.evaluate_independent(model, split, **options)
        if settings.protocol == "sliding":
            lengths = {"context": settings.context, "stride": settings.stride}
            return evaluation.evaluate_sliding_window(model, split, **lengths, **options)
        prefix = subject.tokenizer.token_to_id(END_OF_TEXT)
        if prefix is None:
            raise UserError(f"--protocol rolling: the tokenizer of {subject.label} has no {END_OF_TEXT} to begin with")
        return evaluation.evaluate_rolling(model, split, context=settings.context, prefix_token=prefix, **options)

    def show(self, record: dict[str, Any]) -> None:
        """Print the figures and what they were measured on."""
        result, error = record["result"], record["result"]["standard_error"]
        rows = {
            "perplexity": f"{result['perplexity']:.4f}" + ("" if error is None else f" ± {error:.4f}"),
            "bits/byte": describe_number(result["bits_per_byte"]),
            "word perplexity": describe_number(result["word_perplexity"]),
            "protocol": self.describe_protocol(result),
            "tokens": f"{result['num_tokens']:,} of {result['num_planned']:,}, {result['num_documents']:,} documents"
            + PARTIAL[record["status"]],
            "text": record["text"]["source"],
            "speed": f"{result['tokens_per_second']:,.0f} tokens/s",
            "verdict": f"{result['verdict']['level']}: {result['verdict']['text']}",
        }
        for entry in result["positions"] or []:
            rows[f"at {entry['start']}–{entry['end']}"] = describe_number(entry["perplexity"])
        table = make_table(f"perplexity of {record['subject']['path']}", "", "", right=0)
        table.show_header = False
        for row in rows.items():
            table.add_row(*row)
        open_console().print(table)

    @staticmethod
    def describe_protocol(result: dict[str, Any]) -> str:
        """The protocol with the lengths that belong to it."""
        segments = f"segments of {result['segment_length']:,}"
        if result["protocol"] in ("streaming", "independent"):
            carried = "memory carried" if result["protocol"] == "streaming" else "each from an empty memory"
            return f"{result['protocol']}, {segments}, {carried}"
        return f"{result['protocol']}, context {result['context']:,}, stride {result['stride']:,}; {segments}"


@dataclasses.dataclass(kw_only=True)
class EvaluateWikitext(Perplexity):
    """Perplexity on WikiText-2's test text: sliding windows over the whole text, as published figures are.

    Examples:
      new-llm evaluate-wikitext --run EleutherAI/pythia-70m
      new-llm evaluate-wikitext --run runs/quick --model infini --data.source wiki.test.raw
      new-llm evaluate-wikitext --parallel-adapter parallel_adapter.pt

    The text comes from the hub or its cache here; --data.source names a local wiki.test.raw in its place.
    """

    without_hub: ClassVar[str] = "name a local wiki.test.raw by --data.source, and a folder by --run"
    data: TextConfig = dataclasses.field(default_factory=lambda: TextConfig(source="wikitext-2", whole_files=True))


@dataclasses.dataclass(kw_only=True)
class LongDocuments(PicturedMeasurement):
    """Perplexity of long documents by distance from their start, three ways on the same weights.

    The memory is carried along the document; it is reset at every segment; it is that of another document. The
    differences, with paired bootstrap intervals over documents, say whether memory helps. The text is --data.source,
    or the validation documents of the run. Ctrl-C ends the measurement with the result so far, labelled as partial.
    """

    data: TextConfig = dataclasses.field(default_factory=TextConfig)
    options: Annotated[LongDocumentsConfig, arg(name="")] = dataclasses.field(default_factory=LongDocumentsConfig)

    def measure(self, subject: "Subject") -> dict[str, Any]:
        """Read the documents with the model and its baselines."""
        from new_llm.evaluation import evaluate_long_documents
        from new_llm.experiments.subject import describe_evaluation, load_evaluation_text, plain_settings

        baselines, facts = load_baselines(subject, self.subject, self.options)
        text = load_evaluation_text(subject, self.data)
        with watch("long documents") as hooks:
            reading = subject.reading | hooks
            result = evaluate_long_documents(subject.model, text.split, self.options, baselines=baselines, **reading)
        values = result.to_dict()
        for name, found in facts.items():
            values["baselines"][name] |= {"subject": found}
        settings = plain_settings(self.data, self.options)
        return describe_evaluation("long", subject, text.info, settings, values, is_complete=result.is_complete)

    def show(self, record: dict[str, Any]) -> None:
        """Print perplexities, and what the carried memory is worth against each other way, by distance."""
        from new_llm.formats import WAYS, name_range

        result = record["result"]
        rows = [*((name_range(entry), entry) for entry in result["ranges"]), ("all", result["overall"])]
        names: list[str] = list(result["overall"]["perplexity"])
        others = [name for name in names if name != "carried"]
        titles = {name: WAYS.get(name, name) for name in names}
        perplexities = make_table(
            f"perplexity of {record['subject']['path']} by distance from the start{PARTIAL[record['status']]}",
            *("distance", "documents", "tokens", *titles.values()),
        )
        changes = make_table(
            f"perplexity with the memory carried, against each other way, with {100 * result['confidence']:g} % "
            "intervals",
            *("distance", "documents", *(titles[name] for name in others)),
        )
        for place, entry in rows:
            cells = [place, f"{entry['num_documents']:,}"]
            found = [entry["perplexity"].get(name) for name in names]
            figures = ["–" if value is None else f"{value['value']:.3f}" for value in found]
            perplexities.add_row(*cells, f"{entry['num_tokens']:,}", *figures)
            changes.add_row(*cells, *(self.describe_change(entry["differences"].get(name)) for name in others))
        console = open_console()
        console.print(perplexities)
        console.print(changes)
        if "foreign" not in names:
            console.print("one document alone: there is no other document's memory")
        if result["overall"]["perplexity"]["carried"]["low"] is None:
            console.print(f"{result['num_documents']} documents are too few for intervals over documents")

    @staticmethod
    def describe_change(found: dict[str, Any] | None) -> str:
        """The relative change of perplexity with its interval, and the difference in nats/token."""
        if found is None:
            return "–"
        change, low, high = found["relative"]["value"], found["relative"]["low"], found["relative"]["high"]
        interval = "" if low is None else f"\n{100 * low:+.2f} to {100 * high:+.2f} %"
        return f"{100 * change:+.2f} %{interval}\n{found['nats']['value']:+.4f} nats"


@dataclasses.dataclass(kw_only=True)
class Recall(PicturedMeasurement):
    """Recall of pass keys and of facts about invented persons, hidden in real text and asked for at its end.

    Greedy exact match, and the rank of the right answer among candidates, by the text's length in segments and by the
    depth of the hidden sentence; beside it the same question asked of an empty memory. The text is that of
    --data.source, or of the validation documents of the run. Ctrl-C ends the measurement with the result so far,
    labelled as partial.
    """

    data: TextConfig = dataclasses.field(default_factory=TextConfig)
    options: Annotated[RecallConfig, arg(name="")] = dataclasses.field(default_factory=RecallConfig)

    def measure(self, subject: "Subject") -> dict[str, Any]:
        """Hide, read and ask."""
        from new_llm.evaluation import evaluate_recall
        from new_llm.experiments.subject import describe_evaluation, load_evaluation_text, plain_settings

        text = load_evaluation_text(subject, self.data)
        with watch("recall") as hooks:
            reading = subject.reading | hooks
            result = evaluate_recall(subject.model, subject.tokenizer, text.split, self.options, **reading)
        settings = plain_settings(self.data, self.options)
        return describe_evaluation(
            "recall", subject, text.info, settings, result.to_dict(), is_complete=result.is_complete
        )

    def show(self, record: dict[str, Any]) -> None:
        """Print a depth × length table for each task and figure, the control's figures below."""
        from new_llm.evaluation.recall import TASKS

        result = record["result"]
        console = open_console()
        chances = {
            "exact": "",
            "first": f"; chance {100 * result['chance_first']:.1f} %",
            "mean_rank": f" of {result['num_candidates']}; chance {result['chance_rank']:g}",
        }
        for task in dict.fromkeys(cell["task"] for cell in result["cells"]):
            cells = {(cell["depth"], cell["length"]): cell for cell in result["cells"] if cell["task"] == task}
            lengths, depths = (sorted({key[place] for key in cells}) for place in (1, 0))
            for name, words in RECALL_FIGURES.items():
                title = f"{TASKS[task]}: {words}{chances[name]}{PARTIAL[record['status']]}"
                table = make_table(title, "depth \\ segments", *(f"{length:,}" for length in lengths))
                for depth in depths:
                    figures = (self.describe_cell(cells.get((depth, length)), name) for length in lengths)
                    table.add_row(f"{depth:g}", *figures)
                table.add_section()
                columns = ([cells[depth, length] for depth in depths if (depth, length) in cells] for length in lengths)
                table.add_row("memory reset", *(self.describe_control(column, name) for column in columns))
                console.print(table)
        for note in result["notes"]:
            console.print(f"note: {note}")
        if not result["has_memory"]:
            console.print("note: this model has no memory: beyond 1 segment it can know no more than the control")
        console.print(f"{result['num_trials']:,} of {result['num_planned']:,} texts, {result['num_tokens']:,} tokens")

    @classmethod
    def describe_cell(cls, cell: dict[str, Any] | None, name: str) -> str:
        """A cell's figure with the memory carried, and its interval; a dash where nothing was measured."""
        if cell is None:
            return "–"
        found = cell["carried"][name]
        low, high = (cls.describe_figure(name, found[end]) for end in ("low", "high"))
        return cls.describe_figure(name, found["value"]) + ("" if found["low"] is None else f"\n{low}–{high}")

    @classmethod
    def describe_control(cls, cells: list[dict[str, Any]], name: str) -> str:
        """The control's mean over the depths of one length."""
        return cls.describe_figure(name, sum(cell["reset"][name]["value"] for cell in cells) / len(cells))

    @staticmethod
    def describe_figure(name: str, value: float | None) -> str:
        """A share in percent, a rank as it is."""
        if value is None:
            return "–"
        return f"{value:.1f}" if name == "mean_rank" else f"{100 * value:.0f}%"


@dataclasses.dataclass(kw_only=True)
class Reversal(Measurement):
    """The reversal curse: a model that learned "A is B" need not know "B is A".

    Perplexity of the sentences and of the answers alone, first-place accuracy and mean rank of the right answer among
    the other answers of its relation, each direction, with bootstrap intervals. The pairs are the project's own, or
    those of --pairs: a .csv or .jsonl file with the fields relation, forward_prompt, forward_answer, backward_prompt,
    backward_answer; or relation, subject, object, forward_template, backward_template, such as "The capital of
    {subject} is {object}."
    """

    without_hub: ClassVar[str] = "name a folder by --run"
    options: Annotated[ReversalConfig, arg(name="")] = dataclasses.field(default_factory=ReversalConfig)

    def measure(self, subject: "Subject") -> dict[str, Any]:
        """Score every pair in both directions."""
        from new_llm.data.reversal_pairs import draw_pairs, get_reversal_pairs, read_reversal_pairs
        from new_llm.evaluation import evaluate_reversal_curse
        from new_llm.experiments.subject import describe_evaluation, plain_settings

        options = self.options
        pairs = get_reversal_pairs() if options.pairs is None else read_reversal_pairs(options.pairs)
        if options.pairs_per_relation is not None:
            pairs = draw_pairs(pairs, options.pairs_per_relation, options.seed)
        with show_progress("reversal", "sentences") as on_progress:
            result = evaluate_reversal_curse(
                subject.model,
                subject.tokenizer,
                pairs,
                subject.device,
                batch_size=options.batch_size,
                max_sentences=options.max_sentences,
                num_resamples=options.num_resamples,
                confidence=options.confidence,
                seed=options.seed,
                autocast=subject.autocast,
                on_progress=on_progress,
            )
        values = result.to_dict() | {"training": describe_pair_training(subject, pairs)}
        return describe_evaluation(
            "reversal", subject, describe_pairs(pairs, options.pairs), plain_settings(options), values
        )

    def show(self, record: dict[str, Any]) -> None:
        """Print the figures of all pairs, of each kind and of each relation, with their intervals."""
        from rich import box

        result, text, bootstrap = record["result"], record["text"], record["result"]["bootstrap"]
        groups = [("all pairs", result)]
        if len(result["by_kind"]) > 1:
            groups += [(f"{kind} facts", scores) for kind, scores in result["by_kind"].items()]
        relations = [(entry["relation"].replace("_", " "), entry) for entry in result["per_relation"]]
        console = open_console()
        console.print(f"reversal curse of {record['subject']['path']}")
        for title, (figure, beside) in REVERSAL_TABLES.items():
            keys = [figure.format("forward"), figure.format("backward"), *beside]
            headings = (REVERSAL_HEADINGS.get(key) or key for key in beside)
            table = make_table(title, "", "pairs", "forward", "backward", *headings)
            table.box, table.pad_edge = box.SIMPLE_HEAD, False
            for section in (groups, relations if len(relations) > 1 else []):
                for name, scores in section:
                    table.add_row(name, str(scores["num_pairs"]), *(describe_score(scores, key) for key in keys))
                table.add_section()
            console.print(table)
        console.print(
            f"{100 * bootstrap['confidence']:g}% intervals of {bootstrap['num_resamples']:,} bootstrap resamples, seed "
            f"{bootstrap['seed']}; {text['num_pairs']} pairs in {text['num_relations']} relations from {text['source']}"
            f"\ntraining: {result['training']}"
        )


@dataclasses.dataclass(kw_only=True)
class Doctor(Measurement):
    """Look for what makes readings of a model wrong: shifted labels, leaks, written memory, overlapping splits.

    The text is the validation documents of the run, or --data.source. Exit code 1: a fault was found.
    """

    data: TextConfig = dataclasses.field(default_factory=TextConfig)
    options: Annotated[DoctorConfig, arg(name="")] = dataclasses.field(default_factory=DoctorConfig)

    def check(self) -> None:
        """Refuse a check that is unknown."""
        from new_llm.evaluation.doctor import choose_checks

        choose_checks(self.options.checks)

    def measure(self, subject: "Subject") -> dict[str, Any]:
        """Run the checks."""
        from new_llm.experiments.doctor import examine_subject
        from new_llm.experiments.subject import describe_evaluation, plain_settings

        with open_console(stderr=True).status("") as status:
            report, text = examine_subject(
                subject, self.data, self.options, lambda name: status.update(f"doctor: {name}")
            )
        return describe_evaluation("doctor", subject, text, plain_settings(self.data, self.options), report.to_dict())

    def show(self, record: dict[str, Any]) -> None:
        """Print a row for each check, with what to do unless all is well."""
        from rich.text import Text

        result = record["result"]
        table = make_table(f"self-check of {record['subject']['path']}", "check", "result", "found", right=0)
        for finding in result["findings"]:
            words = Text(finding["found"])
            if finding["advice"]:
                words.append(f"\nto do: {finding['advice']}", style="italic")
            table.add_row(finding["check"], Text(finding["level"], style=LEVELS[finding["level"]]), words)
        console = open_console()
        console.print(table)
        counts = ", ".join(f"{result[f'num_{level}']} {level}" for level in LEVELS)
        console.print(f"{counts}; text: {record['text']['source']}")

    def judge(self, record: dict[str, Any]) -> int:
        """1 where a fault was found."""
        num_faults = record["result"]["num_fault"]
        if num_faults:
            print(f"{num_faults} found: readings of this model can't be trusted", file=sys.stderr)
        return FAULT_FOUND if num_faults else 0


class Eval(CommandGroup):
    """Measure a trained model.

    Every measurement writes a JSON file that says what was measured, how and by which code.

    Examples:
      new-llm eval ppl --run runs/quick --model infini --protocol streaming
      new-llm eval ppl --run runs/quick --model infini --data.source my_text.txt
      new-llm eval reversal --run runs/quick --model infini --pairs-per-relation 10
      new-llm eval long --run runs/quick --model infini --min-tokens 2048 --baselines runs/quick:pythia
      new-llm eval recall --run runs/quick --model infini --lengths 1 2 4 8 --trials 20
      new-llm eval doctor --run runs/quick --model infini
    """

    commands: ClassVar = {
        "doctor": Doctor,
        "long": LongDocuments,
        "ppl": Perplexity,
        "recall": Recall,
        "reversal": Reversal,
    }


@contextmanager
def show_progress(what: str, unit: str = "tokens") -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr where that is a terminal; gives a function of (done, in all)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = open_console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    disabled = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=disabled, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def watch(what: str) -> Iterator[dict[str, Any]]:
    """Inside the block a measurement shows its progress, and Ctrl-C asks it to stop; gives both as its arguments."""
    from new_llm.training.devices import catch_stop_signals

    with catch_stop_signals() as should_stop, show_progress(what) as on_progress:
        yield {"on_progress": on_progress, "should_stop": should_stop}


def make_table(title: str, *headings: str, right: int | None = None) -> "Table":
    """An empty table; the first column is to the left, the others to the right, or only the last `right` ones."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    first_right = 1 if right is None else len(headings) - right
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place >= first_right else "left", overflow="fold")
    return table


def describe_number(value: float | None) -> str:
    """Four decimals; a dash where there is no figure."""
    return "–" if value is None else f"{value:.4f}"


def load_baselines(
    subject: "Subject", config: SubjectConfig, options: LongDocumentsConfig
) -> "tuple[list[Baseline], dict[str, dict[str, Any]]]":
    """The other models, and what they are by their names in the result.

    A baseline without memory that is read in segments is cut as the subject is, where its own segments are not shorter;
    one with a memory keeps its own.

    Raises:
        UserError: one can't be loaded, has another tokenizer, or a stride that is longer than its window.
    """
    from new_llm.evaluation import Baseline
    from new_llm.evaluation.recall import has_memory
    from new_llm.experiments.subject import check_tokenizer, load_subject

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


def describe_pairs(pairs: "list[ReversalPair]", path: Path | None) -> dict[str, Any]:
    """Where the pairs come from, how many they are, and a fingerprint of their text."""
    text = "\n".join(repr(dataclasses.astuple(pair)) for pair in pairs)
    return {
        "source": "the project's own pairs" if path is None else str(path),
        "pairs_fingerprint": hashlib.sha256(text.encode()).hexdigest(),
        "num_pairs": len(pairs),
        "num_relations": len({pair.relation for pair in pairs}),
    }


def describe_pair_training(subject: "Subject", pairs: "list[ReversalPair]") -> str:
    """Whether the model's training held the forward sentences: what the difference of the directions rests on."""
    from new_llm.data.reversal_pairs import get_reversal_pairs

    if subject.config is None:
        return "unknown: the model belongs to no run"
    if not subject.config.data.reversal_pairs:
        return "the run added no reversal pairs to its training text"
    known = {pair.forward for pair in get_reversal_pairs()}
    count = sum(pair.forward in known for pair in pairs)
    if count == len(pairs):
        return "the run's training held the forward sentences"
    return f"the run added the forward sentences of {count} of these {len(pairs)} pairs to its training text"


def describe_score(scores: dict[str, Any], name: str) -> str:
    """A figure, and below it its interval where it has one."""
    from new_llm.formats import format_number, format_percent

    def write(value: float) -> str:
        return format_percent(value) if name.endswith("accuracy") else format_number(value, 3)

    if name not in scores["intervals"]:
        return write(scores[name])
    low, high = scores["intervals"][name]
    return f"{write(scores[name])}\n{write(low)} – {write(high)}"
