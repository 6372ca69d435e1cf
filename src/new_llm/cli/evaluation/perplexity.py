"""`new-llm eval ppl`: perplexity under one of several protocols."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from new_llm.cli.evaluation.common import finish, show_progress
from new_llm.config.errors import UserError
from new_llm.config.measurement import PerplexityConfig, SubjectConfig, TextConfig

if TYPE_CHECKING:
    from new_llm.data.tokens import TokenSplit
    from new_llm.evaluation import PerplexityResult
    from new_llm.experiments.subject import Subject


@dataclasses.dataclass(kw_only=True)
class Perplexity:
    """Perplexity of a text: exp(total negative log-likelihood / tokens).

    The text is --data.source, or the validation documents of the run. Ctrl-C ends the measurement with the result so
    far, labelled as partial.
    """

    subject: Annotated[SubjectConfig, arg(name="")]
    data: TextConfig = dataclasses.field(default_factory=TextConfig)
    protocol: Annotated[PerplexityConfig, arg(name="")] = dataclasses.field(default_factory=PerplexityConfig)
    out: Path | None = None
    """The JSON file to write; None: a file in the run's folder, under evaluations."""

    def run_command(self) -> int:
        """Measure, print and write; returns the exit code."""
        from new_llm.evaluation import diagnose_perplexity, evaluate_positions
        from new_llm.experiments.evaluation_record import describe_evaluation, plain_settings
        from new_llm.experiments.evaluation_text import load_evaluation_text
        from new_llm.experiments.subject import load_subject
        from new_llm.training.signals import catch_stop_signals

        subject = load_subject(self.subject)
        text = load_evaluation_text(subject, self.data)
        with catch_stop_signals() as should_stop, show_progress(self.protocol.protocol) as on_progress:
            result = self._measure(subject, text.split, on_progress=on_progress, should_stop=should_stop)
        positions = None
        if self.protocol.position_edges and result.is_complete:
            with show_progress("by position") as on_progress:
                positions = evaluate_positions(
                    subject.model,
                    text.split,
                    seq_length=self.protocol.context,
                    edges=self.protocol.position_edges,
                    batch_size=self.protocol.batch_size,
                    max_tokens=self.protocol.max_tokens,
                    device=subject.device,
                    autocast=subject.autocast,
                    on_progress=on_progress,
                )
        values = {"positions": positions, "verdict": diagnose_perplexity(result.perplexity).to_dict()}
        record = describe_evaluation(
            "perplexity",
            subject,
            text.info,
            plain_settings(self.data, self.protocol),
            result.to_dict() | values,
            is_complete=result.is_complete,
        )
        print_result(record)
        return finish(record, subject, self.out)

    def _measure(self, subject: "Subject", split: "TokenSplit", **options: Any) -> "PerplexityResult":
        from new_llm import evaluation

        settings = self.protocol
        options |= {
            "batch_size": settings.batch_size,
            "max_tokens": settings.max_tokens,
            "device": subject.device,
            "autocast": subject.autocast,
        }
        model = subject.model
        if settings.protocol == "streaming":
            return evaluation.evaluate_streaming(model, split, segments_per_call=settings.segments_per_call, **options)
        if settings.protocol == "independent":
            return evaluation.evaluate_independent(model, split, **options)
        if settings.protocol == "rolling":
            prefix = find_prefix_token(subject)
            return evaluation.evaluate_rolling(model, split, context=settings.context, prefix_token=prefix, **options)
        return evaluation.evaluate_sliding_window(
            model, split, context=settings.context, stride=settings.stride, **options
        )


def find_prefix_token(subject: "Subject") -> int:
    """The end-of-text token, which stands before a document in the rolling protocol.

    Raises:
        UserError: the tokenizer has none.
    """
    from new_llm.data.tokenizer import END_OF_TEXT

    token = subject.tokenizer.token_to_id(END_OF_TEXT)
    if token is None:
        raise UserError(f"--protocol rolling: the tokenizer of {subject.label} has no {END_OF_TEXT} to begin with")
    return token


def print_result(record: dict[str, Any]) -> None:
    """The figures and what they were measured on, as a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    result, text = record["result"], record["text"]
    table = Table(title=f"perplexity of {record['subject']['path']}", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    error = result["standard_error"]
    rows = {
        "perplexity": f"{result['perplexity']:.4f}" + ("" if error is None else f" ± {error:.4f}"),
        "bits a byte": describe_number(result["bits_per_byte"]),
        "word perplexity": describe_number(result["word_perplexity"]),
        "protocol": describe_protocol(result),
        "tokens": f"{result['num_tokens']:,} of {result['num_planned']:,}, {result['num_documents']:,} documents"
        + ("" if record["status"] == "complete" else " (partial)"),
        "text": text["source"],
        "speed": f"{result['tokens_per_second']:,.0f} tokens/s",
        "verdict": f"{result['verdict']['level']}: {result['verdict']['text']}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    for entry in result["positions"] or []:
        table.add_row(f"at {entry['start']}–{entry['end']}", describe_number(entry["perplexity"]))
    Console().print(table)


def describe_protocol(result: dict[str, Any]) -> str:
    """The protocol with the lengths that belong to it."""
    segments = f"segments of {result['segment_length']:,}"
    if result["protocol"] in ("streaming", "independent"):
        carried = "memory carried" if result["protocol"] == "streaming" else "each from an empty memory"
        return f"{result['protocol']}, {segments}, {carried}"
    return f"{result['protocol']}, context {result['context']:,}, stride {result['stride']:,}; {segments}"


def describe_number(value: float | None) -> str:
    """Four decimals; a dash where there is no figure."""
    return "–" if value is None else f"{value:.4f}"
