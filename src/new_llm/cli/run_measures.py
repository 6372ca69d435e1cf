"""Run the measures of an evaluation command: load the model, measure it, write the record, print and draw results."""

import dataclasses
import sys
from contextlib import nullcontext
from typing import Any

from new_llm.cli.eval import Evaluation
from new_llm.config.errors import UserError
from new_llm.config.terminal import open_console, print_text, show_progress
from new_llm.evaluation import Measure, ModelResult, Subject, find_measures, register_measure, run_measure
from new_llm.evaluation.doctor import Doctor
from new_llm.experiments.evaluation import (
    add_cache,
    describe_added_cache,
    describe_evaluation,
    plain_settings,
    prepare_subject,
    write_evaluation,
)
from new_llm.experiments.subject import load_any_model
from new_llm.report import ColumnTable, make_run, write_chart, write_page
from new_llm.training.devices import catch_stop_signals

FAULT_FOUND, INTERRUPTED = 1, 130


def run_measures(command: Evaluation) -> int:
    """Run the command's measures, and print and write their results.

    Returns:
        The exit code: 0; 1 if the doctor found a fault; 130 if a measurement was interrupted and its result is partial.

    Raises:
        UserError: a measure failed; those that worked have been written.
    """
    register_measure(Doctor)  # here, so that experiments need not import its modules
    settings, measures = command.settings, find_measures(command.measures)
    text_config = command.evaluated_text
    loaded = add_cache(load_any_model(command.subject), command.subject.cache, text_config)
    subject, text = prepare_subject(loaded, settings, command.subject, text_config)
    flags = plain_settings(*([] if text_config is None else [text_config]), command.options)
    refused: list[str] = []
    for measure in measures:
        out = command.out
        if out is not None and len(measures) > 1:
            out = out.with_stem(f"{out.stem}-{measure.name}")
        try:
            result = run_with_progress(measure, subject)
        except UserError as error:
            refused.append(f"{measure.name}: {error}" if len(measures) > 1 else str(error))
            continue
        if result is None:
            refused.append(f"{loaded.label}: {measure.title} does not apply to this model or text")
            continue
        record = describe_evaluation(measure.name, loaded, text, flags, result)
        path = write_evaluation(record, loaded, out)
        show(measure, record, loaded.label)
        for place, chart in enumerate(measure.charts([ModelResult(loaded.label, record["result"])])):
            picture = path.with_name(f"{path.stem}-{chart.name}.svg") if place else path.with_suffix(".svg")
            write_chart(chart, picture)
            print_text(f"chart: {picture}")
        if measure.texts([ModelResult(loaded.label, record["result"])]):
            page = path.with_suffix(".html")
            models = [{"model_type": loaded.label, "evaluation": {measure.name: record["result"]}}]
            facts = {key: record[key] for key in ("created", "command", "code", "environment", "settings")}
            name = f"{loaded.label}: {measure.title}"
            write_page(
                [make_run(facts | {"name": name, "status": "complete", "models": models})], page, with_figures=False
            )
            print_text(f"page: {page}")
        print_text(f"results: {path}")
        if record["status"] == "partial":
            print("interrupted: the result is partial and marked as such", file=sys.stderr)
            return INTERRUPTED
        if result.get("num_fault"):
            print(f"faults found: {result['num_fault']}; don't trust measurements of this model", file=sys.stderr)
            return FAULT_FOUND
    if refused:
        raise UserError("; ".join(refused))
    return 0


def run_with_progress(measure: Measure, subject: Subject) -> dict[str, Any] | None:
    """Run a measure with progress on stderr; if it supports this, Ctrl-C stops it and keeps the result so far."""
    stopping = catch_stop_signals() if measure.can_stop else nullcontext()
    with stopping as should_stop, show_progress(measure.title) as update:
        hooks: dict[str, Any] = {"on_progress": lambda done, total: update(completed=done, total=total)}
        hooks |= {"should_stop": should_stop} if should_stop else {}
        return run_measure(measure, dataclasses.replace(subject, **hooks))


def show(measure: Measure, record: dict[str, Any], label: str) -> None:
    """Print the measure's columns and tables, its summary in words, and notes."""
    result, console = record["result"], open_console()
    partial = " (partial)" if record["status"] == "partial" else ""
    console.print(f"{measure.title} of {record['subject']['path']}{partial}", style="bold", soft_wrap=True)
    console.print(ColumnTable([(label, measure.columns(result))]))
    for table in measure.tables(result):
        console.print(f"\n{table.title}{partial}", style="bold")
        console.print(ColumnTable(table.rows))
    console.print()
    cache = record["subject"].get("cache") and describe_added_cache(record["subject"]["cache"])
    source = record["text"] and f"text: {record['text']['source']}"
    for line in filter(None, (measure.describe(result), *measure.notes(result), cache, source)):
        console.print(line)
