"""`new-llm eval reversal`: what a model knows forward, against what it knows backward."""

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from new_llm.cli.evaluation.common import finish, show_progress
from new_llm.config.measurement import SubjectConfig
from new_llm.config.reversal import ReversalConfig

if TYPE_CHECKING:
    from new_llm.data.reversal_pairs import ReversalPair
    from new_llm.experiments.subject import Subject

OWN_PAIRS = "the project's own pairs"


@dataclasses.dataclass(kw_only=True)
class Reversal:
    """The reversal curse: a model that learned "A is B" need not know "B is A".

    Perplexity of the sentences and of the answers alone, first-place accuracy and mean rank of the right answer among
    the other answers of its relation, each direction, with bootstrap intervals. The pairs are the project's own, or
    those of --pairs: a .csv or .jsonl file with the fields relation, forward_prompt, forward_answer, backward_prompt,
    backward_answer; or relation, subject, object, forward_template, backward_template, such as "The capital of
    {subject} is {object}."
    """

    subject: Annotated[SubjectConfig, arg(name="")]
    options: Annotated[ReversalConfig, arg(name="")] = dataclasses.field(default_factory=ReversalConfig)
    out: Path | None = None
    """The JSON file to write; None: a file in the run's folder, under evaluations."""

    def run_command(self) -> int:
        """Measure, print and write; returns the exit code."""
        from new_llm.data.reversal_files import draw_pairs, read_reversal_pairs
        from new_llm.data.reversal_pairs import get_reversal_pairs
        from new_llm.evaluation import evaluate_reversal_curse
        from new_llm.experiments.evaluation_record import describe_evaluation, plain_settings
        from new_llm.experiments.subject import load_subject

        options = self.options
        pairs = get_reversal_pairs() if options.pairs is None else read_reversal_pairs(options.pairs)
        if options.pairs_per_relation is not None:
            pairs = draw_pairs(pairs, options.pairs_per_relation, options.seed)
        subject = load_subject(self.subject)
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
        values = result.to_dict() | {"training": describe_training(subject, pairs)}
        record = describe_evaluation(
            "reversal", subject, describe_pairs(pairs, options.pairs), plain_settings(options), values
        )
        print_result(record)
        return finish(record, subject, self.out)


def describe_pairs(pairs: "list[ReversalPair]", path: Path | None) -> dict[str, Any]:
    """Where the pairs come from, how many they are, and a fingerprint of their text."""
    text = "\n".join(repr(dataclasses.astuple(pair)) for pair in pairs)
    return {
        "source": OWN_PAIRS if path is None else str(path),
        "pairs_fingerprint": hashlib.sha256(text.encode()).hexdigest(),
        "num_pairs": len(pairs),
        "num_relations": len({pair.relation for pair in pairs}),
    }


def describe_training(subject: "Subject", pairs: "list[ReversalPair]") -> str:
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


TABLES = {
    "perplexity of the sentences": ("{}_perplexity", ("ratio", "gap")),
    "perplexity of the answers, given the prompt": ("{}_answer_perplexity", ("answer_ratio",)),
    "right answer first among the answers of its relation": ("{}_accuracy", ("chance_accuracy",)),
    "mean rank of the right answer": ("{}_mean_rank", ("chance_mean_rank",)),
}
"""Title of a table: the figure in both directions, and what stands beside it."""
HEADINGS = {"answer_ratio": "ratio", "chance_accuracy": "chance", "chance_mean_rank": "chance"}


def print_result(record: dict[str, Any]) -> None:
    """The figures of all pairs, of each kind and of each relation, with their intervals."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    result, text = record["result"], record["text"]
    bootstrap = result["bootstrap"]
    console = Console()
    console.print(Text(f"reversal curse of {record['subject']['path']}", style="bold"))
    groups = [("all pairs", result)]
    if len(result["by_kind"]) > 1:
        groups += [(f"{kind} facts", scores) for kind, scores in result["by_kind"].items()]
    relations = [(entry["relation"].replace("_", " "), entry) for entry in result["per_relation"]]
    for title, (figure, beside) in TABLES.items():
        keys = [figure.format("forward"), figure.format("backward"), *beside]
        table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("", overflow="fold")
        for heading in ("pairs", "forward", "backward", *(HEADINGS.get(key) or key for key in beside)):
            table.add_column(heading, justify="right")
        for section in (groups, relations if len(relations) > 1 else []):
            for name, scores in section:
                cells = [describe_figure(scores, key) for key in keys]
                table.add_row(Text(name), str(scores["num_pairs"]), *cells)
            table.add_section()
        console.print(table)
    console.print(
        Text(
            f"{100 * bootstrap['confidence']:g}% intervals of {bootstrap['num_resamples']:,} bootstrap resamples, seed "
            f"{bootstrap['seed']}; {text['num_pairs']} pairs in {text['num_relations']} relations from {text['source']}"
        )
    )
    console.print(Text(f"training: {result['training']}"))


def describe_figure(scores: dict[str, Any], name: str) -> str:
    """A figure, and below it its interval where it has one."""
    from new_llm.report.tables import format_number, format_percent

    def write(value: float) -> str:
        return format_percent(value) if name.endswith("accuracy") else format_number(value, 3)

    if name not in scores["intervals"]:
        return write(scores[name])
    low, high = scores["intervals"][name]
    return f"{write(scores[name])}\n{write(low)} – {write(high)}"
