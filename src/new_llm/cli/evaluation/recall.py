"""`new-llm eval recall`: is a sentence that was hidden in a long text found again?"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from new_llm.cli.evaluation.common import check_picture, finish, show_progress
from new_llm.config.measurement import SubjectConfig, TextConfig
from new_llm.config.recall import RecallConfig


@dataclasses.dataclass(kw_only=True)
class Recall:
    """Recall of pass keys and of facts about invented persons, hidden in real text and asked for at its end.

    Greedy exact match, and the rank of the right answer among candidates, by the text's length in segments and by the
    depth of the hidden sentence; beside it the same question asked of an empty memory. The text is that of
    --data.source, or of the validation documents of the run. Ctrl-C ends the measurement with the result so far,
    labelled as partial.
    """

    subject: Annotated[SubjectConfig, arg(name="")]
    data: TextConfig = dataclasses.field(default_factory=TextConfig)
    options: Annotated[RecallConfig, arg(name="")] = dataclasses.field(default_factory=RecallConfig)
    out: Path | None = None
    """The JSON file to write; None: a file in the run's folder, under evaluations."""
    picture: Path | None = None
    """The heat map to draw, *.svg or *.png; None: beside the JSON file."""

    def __post_init__(self) -> None:
        check_picture(self.picture)

    def run_command(self) -> int:
        """Measure, print and write; returns the exit code."""
        from new_llm.experiments.evaluation_record import describe_evaluation, plain_settings
        from new_llm.experiments.evaluation_text import load_evaluation_text
        from new_llm.experiments.memory_measurements import measure_recall
        from new_llm.experiments.subject import load_subject
        from new_llm.report.heat_map import plot_recall
        from new_llm.training.signals import catch_stop_signals

        options = self.options
        subject = load_subject(self.subject)
        text = load_evaluation_text(subject, self.data)
        with catch_stop_signals() as should_stop, show_progress("recall") as on_progress:
            result = measure_recall(subject, text.split, options, on_progress=on_progress, should_stop=should_stop)
        record = describe_evaluation(
            "recall",
            subject,
            text.info,
            plain_settings(self.data, options),
            result.to_dict(),
            is_complete=result.is_complete,
        )
        print_result(record)
        return finish(record, subject, self.out, plot_recall, self.picture)


def print_result(record: dict[str, Any]) -> None:
    """A depth × length table for each task and figure, the control's figures beside the lengths' own."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from new_llm.report.heat_map import FIGURES, TASKS

    result = record["result"]
    console = Console()
    partial = "" if record["status"] == "complete" else " (partial)"
    chances = {
        "exact": "",
        "first": f"; chance {100 * result['chance_first']:.1f} %",
        "mean_rank": f" of {result['num_candidates']}; chance {result['chance_rank']:g}",
    }
    for task in dict.fromkeys(cell["task"] for cell in result["cells"]):
        cells = {(cell["depth"], cell["length"]): cell for cell in result["cells"] if cell["task"] == task}
        lengths, depths = (sorted({key[place] for key in cells}) for place in (1, 0))
        for name, words in FIGURES.items():
            table = Table(title=Text(f"{TASKS[task]}: {words}{chances[name]}{partial}"), title_justify="left")
            table.add_column("depth \\ segments")
            for length in lengths:
                table.add_column(f"{length:,}", justify="right")
            for depth in depths:
                found = [cells.get((depth, length)) for length in lengths]
                table.add_row(f"{depth:g}", *(describe_figure(cell, name) for cell in found))
            table.add_section()
            by_length = [[cells[depth, length] for depth in depths if (depth, length) in cells] for length in lengths]
            table.add_row("memory reset", *(describe_control(found, name) for found in by_length))
            console.print(table)
    lines = [f"note: {note}" for note in result["notes"]]
    if not result["has_memory"]:
        lines.append("note: this model has no memory: beyond 1 segment it can know no more than the control")
    lines.append(f"{result['num_trials']:,} of {result['num_planned']:,} texts, {result['num_tokens']:,} tokens")
    for line in lines:
        console.print(Text(line))


def describe_figure(cell: dict[str, Any] | None, name: str) -> str:
    """A cell's figure with the memory carried, and its interval; a dash where nothing was measured."""
    if cell is None:
        return "–"
    found = cell["carried"][name]
    interval = "" if found["low"] is None else f"\n{write(name, found['low'])}–{write(name, found['high'])}"
    return f"{write(name, found['value'])}{interval}"


def describe_control(cells: list[dict[str, Any]], name: str) -> str:
    """The control's mean over the depths of one length."""
    return write(name, sum(cell["reset"][name]["value"] for cell in cells) / len(cells))


def write(name: str, value: float) -> str:
    """A share in percent, a rank as it is."""
    return f"{value:.1f}" if name == "mean_rank" else f"{100 * value:.0f}%"
